"""A configuration keeps its values through every form, and says all that is wrong with it."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config import SECTIONS, Config, ParallelConfig, all_flags
from megatron.config.flags import flags_of, in_interval
from megatron.errors import ConfigError
from megatron.validation import CHECKS, validate
from tests.configs import small, valid_values


@settings(deadline=None, derandomize=True)
@given(valid_values())
def test_every_form_gives_the_same_configuration_back(drawn: tuple[dict[str, Any], int]) -> None:
    values, world_size = drawn
    config = Config.from_flags(values)
    assert validate(config, world_size) == []
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_yaml(config.to_yaml()) == config
    assert Config.from_flags(config.to_flags()) == config


def test_a_configuration_cannot_be_changed() -> None:
    config = small()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.num_layers = 3  # type: ignore[misc]
    assert config.with_vocab_size(77).model.vocab_size == 77
    assert config.model.vocab_size is None


def test_flag_names_are_unique_over_all_sections() -> None:
    names = [flag.name for section in SECTIONS.values() for flag in flags_of(section)]
    assert len(names) == len(set(names))


def test_every_flag_is_described_and_keeps_its_own_bounds() -> None:
    for flag in all_flags().values():
        assert flag.help
        assert flag.topic
        assert not flag.help.endswith(".")
        if not flag.required:
            assert list(flag.problems(flag.default)) == [], flag.name
        if flag.is_switch:
            assert flag.default is False


def test_topics_are_contiguous() -> None:
    topics = [flag.topic for flag in all_flags().values()]
    changes = [new for old, new in zip([None, *topics], topics, strict=False) if old != new]
    assert len(changes) == len(set(changes))


def test_from_dict_names_everything_that_is_wrong() -> None:
    values = small().to_dict()
    values["model"]["num_layers"] = "many"
    values["model"]["hiden_size"] = 3
    values["train"].pop("micro_batch_size")
    values["mdel"] = {}
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(values)
    assert set(caught.value.problems) == {
        "--num-layers expects an integer, found 'many'",
        "unknown hiden_size in section model",
        "--micro-batch-size is required",
        "unknown section mdel",
    }


@pytest.mark.parametrize("text", ["", "- a", "model: [", "model: 3"])
def test_from_yaml_refuses_what_is_no_configuration(text: str) -> None:
    with pytest.raises(ConfigError):
        Config.from_yaml(text)


def test_what_is_derived_from_the_fields() -> None:
    model = small().model
    assert (model.ffn_size, model.head_size, model.dtype) == (128, 8, "float32")
    model = dataclasses.replace(model, ffn_hidden_size=50, kv_channels=3, bf16=True)
    assert (model.ffn_size, model.head_size, model.dtype) == (50, 3, "bfloat16")
    assert dataclasses.replace(model, bf16=False, fp16=True).dtype == "float16"
    assert dataclasses.replace(model, bf16=False, fp64=True).dtype == "float64"
    model = small(hidden_size=4096, swiglu=True, num_query_groups=2).model
    assert (model.ffn_size, model.is_gated, model.key_value_heads) == (10880, True, 2)
    assert small(geglu=True).model.ffn_size == 64
    assert small(rotary_percent=0.5).model.rotary_channels == 4
    assert (small().model.decoder_layers, small(decoder_num_layers=7).model.decoder_layers) == (
        4,
        7,
    )
    assert small(decoder_seq_length=7).data.decoder_length == 7


@settings(deadline=None, derandomize=True)
@given(vocab=st.integers(1, 10**6), multiple=st.integers(1, 512), tensor=st.integers(1, 16))
def test_the_padded_vocabulary_is_the_next_multiple(vocab: int, multiple: int, tensor: int) -> None:
    model = small(vocab_size=vocab, make_vocab_size_divisible_by=multiple).model
    padded = model.padded_vocab_size(tensor)
    assert padded % (multiple * tensor) == 0
    assert 0 <= padded - vocab < multiple * tensor


def test_a_vocabulary_that_is_not_known_cannot_be_padded() -> None:
    with pytest.raises(ConfigError, match="--vocab-size"):
        small().model.padded_vocab_size(2)


def test_layers_are_shared_equally_or_as_stated() -> None:
    assert ParallelConfig(pipeline_model_parallel_size=3).stage_layers(6) == (2, 2, 2)
    stated = ParallelConfig(pipeline_model_parallel_size=2, pipeline_layers=(2, 3))
    assert stated.stage_layers(5) == (2, 3)
    assert stated.encoder_decoder_layers(2, 3) == ((2,), (3,))
    assert stated.virtual_stages(5) == 1
    interleaved = ParallelConfig(
        pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1
    )
    assert (interleaved.schedule, interleaved.virtual_stages(6)) == ("interleaved", 3)
    assert interleaved.stage_layers(6) == (1,) * 6


def test_a_decoder_has_ranks_of_its_own_where_there_are_several() -> None:
    assert ParallelConfig().encoder_decoder_layers(4, 3) == ((4,), (3,))
    assert ParallelConfig(pipeline_layers=(7,)).encoder_decoder_layers(4, 3) == ((4,), (3,))
    three = ParallelConfig(pipeline_model_parallel_size=3)
    assert (three.split_rank(), three.encoder_decoder_layers(4, 2)) == (1, ((4,), (1, 1)))
    late = dataclasses.replace(three, pipeline_model_parallel_split_rank=2)
    assert late.encoder_decoder_layers(4, 2) == ((2, 2), (2,))


def test_batches_are_cut_into_micro_batches() -> None:
    train = small(micro_batch_size=2, global_batch_size=24).train
    assert (train.global_batch(4), train.num_micro_batches(4)) == (24, 3)
    train = small(micro_batch_size=2).train
    assert (train.global_batch(4), train.num_micro_batches(4)) == (8, 1)


@settings(deadline=None, derandomize=True)
@given(value=st.floats(-3, 3), low=st.integers(-2, 0), high=st.integers(1, 2))
def test_intervals(value: float, low: int, high: int) -> None:
    assert in_interval(value, f"[{low}, {high}]") == (low <= value <= high)
    assert in_interval(value, f"(-inf, {high})") == (value < high)
    assert not in_interval(low, f"({low}, {high})")


GPT = {"model_type": "gpt"}
T5 = {"model_type": "t5", "vocab_extra_ids": 100}
ROPE = {"position_embedding_type": "rope"}
TWO_STAGES = {"pipeline_model_parallel_size": 2}
RAMP = {"train_iters": None, "train_samples": 99, "global_batch_size": 8}

# Fields that are set, number of ranks, and the one problem that they are.
MISTAKES: list[tuple[dict[str, Any], int, str]] = [
    (
        {"tensor_model_parallel_size": 8},
        8,
        "--num-attention-heads 4 is not divisible by --tensor-model-parallel-size 8",
    ),
    (
        {"num_layers": 5, "pipeline_model_parallel_size": 2},
        2,
        "--num-layers 5 is not divisible by the 2 stages of --pipeline-model-parallel-size 2: "
        "state the layers of each stage with --pipeline-layers",
    ),
    (
        {"pipeline_model_parallel_size": 2, "pipeline_layers": (1, 2, 1)},
        2,
        "--pipeline-layers 1,2,1 states 3 stages, expected 2 by --pipeline-model-parallel-size 2",
    ),
    (
        {"pipeline_model_parallel_size": 2, "pipeline_layers": (2, 3)},
        2,
        "--pipeline-layers 2,3 sums to 5, --num-layers is 4",
    ),
    (
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        6,
        "the number of ranks, 6, is not a multiple of --tensor-model-parallel-size 2 x "
        "--pipeline-model-parallel-size 2 = 4",
    ),
    (
        {"global_batch_size": 10},
        2,
        "--global-batch-size 10 is not divisible by --micro-batch-size 2 x "
        "data-parallel size 2 = 4",
    ),
    (
        {"hidden_size": 34},
        1,
        "--hidden-size 34 is not divisible by --num-attention-heads 4: "
        "state the width of a head with --kv-channels",
    ),
    (
        {"ffn_hidden_size": 33, "tensor_model_parallel_size": 2},
        2,
        "--ffn-hidden-size 33 is not divisible by --tensor-model-parallel-size 2",
    ),
    ({"seq_length": 65}, 1, "--seq-length 65 is larger than --max-position-embeddings 64"),
    ({"fp16": True, "bf16": True}, 1, "--fp16 and --bf16 exclude each other"),
    ({"train_iters": None}, 1, "--train-iters or --train-samples is required"),
    ({"train_samples": 20}, 1, "--train-iters and --train-samples exclude each other"),
    (
        {"lr_warmup_samples": 5},
        1,
        "--lr-warmup-samples counts samples, but the run is counted by --train-iters: "
        "use --lr-warmup-iters",
    ),
    (
        {"train_iters": None, "train_samples": 99, "lr_decay_iters": 5},
        1,
        "--lr-decay-iters counts iters, but the run is counted by --train-samples: "
        "use --lr-decay-samples",
    ),
    (
        {"lr_warmup_fraction": 0.1, "lr_warmup_iters": 3},
        1,
        "--lr-warmup-fraction and --lr-warmup-iters exclude each other",
    ),
    ({"lr_warmup_iters": 11}, 1, "--lr-warmup-iters 11 is longer than the decay, --train-iters 10"),
    (
        {"lr_warmup_iters": 6, "lr_decay_iters": 5},
        1,
        "--lr-warmup-iters 6 is longer than the decay, --lr-decay-iters 5",
    ),
    (
        {"train_iters": None, "train_samples": 9, "lr_warmup_samples": 10},
        1,
        "--lr-warmup-samples 10 is longer than the decay, --train-samples 9",
    ),
    ({"merge_file": "/nowhere"}, 1, "--merge-file /nowhere does not exist"),
    ({"min_lr": 0.5}, 1, "--min-lr 0.5 is larger than --lr 0.0001"),
    (
        {"override_lr_scheduler": True, "use_checkpoint_lr_scheduler": True},
        1,
        "--override-lr-scheduler and --use-checkpoint-lr-scheduler exclude each other",
    ),
    (
        {"loss_scale": 1000.0},
        1,
        "--loss-scale 1000.0 is not a power of two, so scaling by it would round",
    ),
    (
        {"initial_loss_scale": 2.0, "min_loss_scale": 4.0},
        1,
        "--min-loss-scale 4.0 is larger than --initial-loss-scale 2.0",
    ),
    ({"attention_dropout": 1.0}, 1, "--attention-dropout 1.0 is outside [0, 1)"),
    ({"mask_prob": 0.0}, 1, "--mask-prob 0.0 is outside (0, 1)"),
    ({"num_layers": 0}, 1, "--num-layers 0 is outside [1, inf)"),
    ({"optimizer": "adagrad"}, 1, "--optimizer adagrad is none of adam, sgd"),
    ({"save_interval": 5}, 1, "--save-interval needs --save"),
    ({"finetune": True}, 1, "--finetune needs --load"),
    ({"distributed_backend": "nccl", "use_cpu": True}, 1, "--distributed-backend nccl needs GPUs"),
    ({"split": "969, 30, x"}, 1, "--split '969, 30, x': expected up to three weights"),
    ({"split": "0,0,0"}, 1, "--split '0,0,0': expected up to three weights"),
    ({"split": "1,1,1,1"}, 1, "--split '1,1,1,1': expected up to three weights"),
    ({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": __file__}, 1, "needs --merge-file"),
    ({"data_path": ("a", "b")}, 1, "--data-path expects a positive weight before b, found 'a'"),
    ({"data_path": ("1", "a", "b")}, 1, "or a weight in front of each; found 3 values: 1 a b"),
    ({"data_path": ("a.idx",)}, 1, "--data-path a.idx is a file: give its path without .idx"),
    ({"tokenizer_model": "/nowhere"}, 1, "--tokenizer-model /nowhere does not exist"),
    (
        {"tokenizer_type": "SentencePieceTokenizer"},
        1,
        "--tokenizer-type SentencePieceTokenizer needs --tokenizer-model",
    ),
    ({"vocab_file": "/nowhere/vocab.txt"}, 1, "--vocab-file /nowhere/vocab.txt does not exist"),
    ({"vocab_file": "/"}, 1, "--vocab-file / is no file"),
    ({"load": "/nowhere"}, 1, "--load /nowhere does not exist"),
    ({"save": __file__}, 1, "is a file, not a directory"),
    # Models
    ({"decoder_num_layers": 2}, 1, "--decoder-num-layers is for T5 alone; the model is BERT"),
    (GPT | {"decoder_seq_length": 9}, 1, "--decoder-seq-length is for T5 alone; the model is GPT"),
    (
        {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_split_rank": 1},
        2,
        "--pipeline-model-parallel-split-rank is for T5 alone; the model is BERT",
    ),
    ({"vocab_extra_ids": 100}, 1, "--vocab-extra-ids is for T5 alone; the model is BERT"),
    (GPT | {"mean_span_length": 2.0}, 1, "--mean-span-length is for T5 alone; the model is GPT"),
    (T5 | {"vocab_extra_ids": 0}, 1, "--vocab-extra-ids 0 leaves T5 no sentinel tokens"),
    (
        GPT | {"position_embedding_type": "relative"},
        1,
        "--position-embedding-type relative is for T5 alone; the model is GPT",
    ),
    ({"reset_position_ids": True}, 1, "--reset-position-ids is for GPT alone; the model is BERT"),
    (T5 | {"reset_attention_mask": True}, 1, "--reset-attention-mask is for GPT alone"),
    ({"eod_mask_loss": True}, 1, "--eod-mask-loss is for GPT alone; the model is BERT"),
    (GPT | {"mask_prob": 0.2}, 1, "--mask-prob is for BERT and T5 alone; the model is GPT"),
    (GPT | {"short_seq_prob": 0.2}, 1, "--short-seq-prob is for BERT and T5 alone"),
    (
        {"norm_position": "post", "bf16": True, "fp32_residual_connection": True},
        1,
        "--fp32-residual-connection and --norm-position post exclude each other",
    ),
    (T5 | {"norm_position": "post"}, 1, "--norm-position post is for BERT and GPT alone"),
    (GPT | {"head_activation": "relu"}, 1, "--head-activation is for BERT alone"),
    (GPT | {"num_tokentypes": 3}, 1, "--num-tokentypes is for BERT alone; the model is GPT"),
    ({"logit_scale": 0.5}, 1, "--logit-scale is for GPT and T5 alone; the model is BERT"),
    (
        T5 | {"position_embedding_type": "relative_key"},
        1,
        "--position-embedding-type relative_key is for BERT alone; the model is T5",
    ),
    (
        {"norm_position": "post", "apply_residual_connection_post_layernorm": True},
        1,
        "--norm-position post and --apply-residual-connection-post-layernorm exclude each other",
    ),
    (T5 | {"bert_no_binary_head": True}, 1, "--bert-no-binary-head is for BERT alone"),
    # Layers
    (
        {"num_query_groups": 3},
        1,
        "--num-attention-heads 4 is not divisible by --num-query-groups 3",
    ),
    (
        {"num_query_groups": 2, "tensor_model_parallel_size": 4},
        4,
        "--num-query-groups 2 is not divisible by --tensor-model-parallel-size 4",
    ),
    (
        T5 | {"decoder_seq_length": 65},
        1,
        "--decoder-seq-length 65 is larger than --max-position-embeddings 64",
    ),
    (ROPE | {"rotary_percent": 0.4}, 1, "--rotary-percent 0.4 of a head's 8 channels is 3"),
    (ROPE | {"rotary_percent": 0.1}, 1, "--rotary-percent 0.1 of a head's 8 channels is 0"),
    (ROPE | {"kv_channels": 7}, 1, "--rotary-percent 1 of a head's 7 channels is 7"),
    ({"rotary_base": 5e5}, 1, "--rotary-base needs --position-embedding-type rope"),
    (
        T5 | {"relative_attention_num_buckets": 16},
        1,
        "--relative-attention-num-buckets needs --position-embedding-type relative",
    ),
    (
        T5 | {"position_embedding_type": "relative", "relative_attention_max_distance": 16},
        1,
        "--relative-attention-max-distance 16 is not larger than half of "
        "--relative-attention-num-buckets 32",
    ),
    ({"swiglu": True, "geglu": True}, 1, "--swiglu and --geglu exclude each other"),
    (
        {"swiglu": True, "activation": "relu"},
        1,
        "--swiglu and --activation relu exclude each other",
    ),
    ({"fp32_residual_connection": True}, 1, "--fp32-residual-connection needs --fp16 or --bf16"),
    ({"profile_steps": "3"}, 1, "--profile-steps 3: expected A:B with iterations 1 <= A <= B"),
    ({"profile_steps": "3:2"}, 1, "--profile-steps 3:2: expected A:B"),
    ({"profile_steps": "0:2"}, 1, "--profile-steps 0:2: expected A:B"),
    ({"profile_steps": "11:12"}, 1, "--profile-steps 11:12 begins behind the last iteration"),
    # Layouts
    (
        {
            "swiglu": True,
            "num_attention_heads": 3,
            "hidden_size": 33,
            "tensor_model_parallel_size": 3,
        },
        3,
        "the MLP's width for --hidden-size 33, 64 is not divisible by "
        "--tensor-model-parallel-size 3",
    ),
    (
        {"seq_length": 63, "sequence_parallel": True, "tensor_model_parallel_size": 2},
        2,
        "--sequence-parallel: --seq-length 63 is not divisible by --tensor-model-parallel-size 2",
    ),
    (
        T5 | {"decoder_seq_length": 9, "sequence_parallel": True, "tensor_model_parallel_size": 2},
        2,
        "--sequence-parallel: --decoder-seq-length 9 is not divisible by",
    ),
    (
        {"num_layers_per_virtual_pipeline_stage": 2, "pipeline_model_parallel_size": 2},
        2,
        "interleaving needs at least two stages on each rank: --num-layers 4 gives one to each of "
        "--pipeline-model-parallel-size 2",
    ),
    (
        {"num_layers": 6, "num_layers_per_virtual_pipeline_stage": 2} | TWO_STAGES,
        2,
        "--num-layers 6 is not divisible by --pipeline-model-parallel-size 2 x "
        "--num-layers-per-virtual-pipeline-stage 2",
    ),
    (
        {"pipeline_schedule": "interleaved"} | TWO_STAGES,
        2,
        "--pipeline-schedule interleaved needs "
        "--num-layers-per-virtual-pipeline-stage or --pipeline-layers",
    ),
    (
        {"pipeline_schedule": "interleaved", "pipeline_layers": (1, 1, 2)} | TWO_STAGES,
        2,
        "--pipeline-layers 1,1,2 states 3 stages, not a multiple of "
        "--pipeline-model-parallel-size 2",
    ),
    (
        {"num_layers_per_virtual_pipeline_stage": 2},
        1,
        "--num-layers-per-virtual-pipeline-stage 2 needs --pipeline-model-parallel-size above 1",
    ),
    (
        {"num_layers_per_virtual_pipeline_stage": 1, "pipeline_schedule": "zb-h1"} | TWO_STAGES,
        2,
        "--num-layers-per-virtual-pipeline-stage 1 is interleaved 1F1B, "
        "--pipeline-schedule is zb-h1",
    ),
    (
        {"num_layers_per_virtual_pipeline_stage": 1, "pipeline_layers": (1, 1, 1, 1)} | TWO_STAGES,
        2,
        "--pipeline-layers and --num-layers-per-virtual-pipeline-stage exclude each other",
    ),
    (
        T5 | {"num_layers_per_virtual_pipeline_stage": 1} | TWO_STAGES,
        2,
        "--num-layers-per-virtual-pipeline-stage 1: the pipeline of an encoder-decoder is not "
        "interleaved",
    ),
    (
        T5 | {"pipeline_model_parallel_split_rank": 2} | TWO_STAGES,
        2,
        "--pipeline-model-parallel-split-rank 2 leaves no rank to the decoder: "
        "--pipeline-model-parallel-size is 2",
    ),
    (
        T5 | {"pipeline_model_parallel_split_rank": 1},
        1,
        "--pipeline-model-parallel-split-rank 1 leaves no rank to the decoder: "
        "--pipeline-model-parallel-size is 1",
    ),
    (
        T5 | {"pipeline_layers": (4, 2)} | TWO_STAGES,
        2,
        "--pipeline-layers 4,2 sums to 2 in the decoder, --decoder-num-layers is 4",
    ),
    (
        T5 | {"pipeline_layers": (4, 2, 2)} | TWO_STAGES,
        2,
        "--pipeline-layers 4,2,2 states 3 stages, expected 2 by --pipeline-model-parallel-size 2",
    ),
    (
        T5 | {"decoder_num_layers": 2, "pipeline_layers": (5,)},
        1,
        "--pipeline-layers 5 sums to 5, --num-layers + --decoder-num-layers is 6",
    ),
    ({"pipeline_costs": (1.0,), "pipeline_schedule": "zb-2p"}, 1, "expects four numbers, found 1"),
    (
        {"pipeline_costs": (1.0, 1.0, 1.0, 0.1)},
        1,
        "--pipeline-costs needs --pipeline-schedule zb-2p, found 1f1b",
    ),
    ({"shard_gradients": True}, 1, "--shard-gradients needs --use-distributed-optimizer"),
    (
        {"shard_gradients": True, "use_distributed_optimizer": True} | TWO_STAGES,
        2,
        "--shard-gradients needs --pipeline-model-parallel-size 1, found 2",
    ),
    (
        {"recompute_granularity": "selective", "recompute_method": "block"},
        1,
        "--recompute-method block needs --recompute-granularity full",
    ),
    (
        {"recompute_num_layers": 2},
        1,
        "--recompute-num-layers 2 needs --recompute-granularity full",
    ),
    (
        {"distribute_saved_activations": True, "tensor_model_parallel_size": 2},
        2,
        "--distribute-saved-activations needs --recompute-granularity full",
    ),
    (
        {"distribute_saved_activations": True, "recompute_granularity": "full"},
        1,
        "--distribute-saved-activations needs --tensor-model-parallel-size above 1",
    ),
    (
        {
            "distribute_saved_activations": True,
            "recompute_granularity": "full",
            "sequence_parallel": True,
            "tensor_model_parallel_size": 2,
        },
        2,
        "--distribute-saved-activations and --sequence-parallel exclude each other",
    ),
    # Growing batches
    (RAMP | {"rampup_batch_size": (4, 2)}, 1, "expects START INCREMENT SAMPLES, found 4 2"),
    (
        {"rampup_batch_size": (4, 2, 30), "global_batch_size": 8},
        1,
        "--rampup-batch-size needs --train-samples in place of --train-iters",
    ),
    (
        RAMP | {"rampup_batch_size": (4, 6, 30), "global_batch_size": 16},
        2,
        "--rampup-batch-size: INCREMENT 6 is not divisible by --micro-batch-size 2 x "
        "data-parallel size 2 = 4",
    ),
    (RAMP | {"rampup_batch_size": (8, 2, 30)}, 1, "START 8 is not below the global batch, 8"),
    (
        RAMP | {"rampup_batch_size": (2, 4, 30)},
        1,
        "--rampup-batch-size: steps of 4 do not lead from 2 to the global batch, 8",
    ),
    ({"pack_sequences": True, "model_type": "gpt"}, 1, "--pack-sequences is for BERT alone"),
    (
        {"pack_sequences": True, "pipeline_model_parallel_size": 2},
        2,
        "--pack-sequences needs --pipeline-model-parallel-size 1, found 2",
    ),
    (
        {"pack_sequences": True, "cuda_graphs": True},
        1,
        "--pack-sequences and --cuda-graphs exclude each other",
    ),
    (
        {"pack_sequences": True, "position_embedding_type": "relative_key"},
        1,
        "--pack-sequences and --position-embedding-type relative_key exclude each other",
    ),
    (
        {"cuda_graphs": True, "pipeline_model_parallel_size": 2},
        2,
        "--cuda-graphs needs --pipeline-model-parallel-size 1, found 2",
    ),
    (
        {"cuda_graphs": True, "tensor_model_parallel_size": 2},
        2,
        "--cuda-graphs needs --tensor-model-parallel-size 1, found 2",
    ),
    (
        {"cuda_graphs": True, "recompute_granularity": "full"},
        1,
        "--cuda-graphs and --recompute-granularity full exclude each other",
    ),
    (
        {"cuda_graphs": True, "use_distributed_optimizer": True, "shard_gradients": True},
        1,
        "--cuda-graphs and --shard-gradients exclude each other",
    ),
    (
        {"cuda_graphs": True, "use_cpu": True},
        1,
        "--cuda-graphs and --use-cpu exclude each other",
    ),
    (
        {"cuda_graphs": True, "model_type": "gpt", "reset_attention_mask": True},
        1,
        "--cuda-graphs and --reset-attention-mask exclude each other",
    ),
    ({"fp8_format": "hybrid"}, 1, "--fp8-format hybrid needs --bf16"),
    (
        {"fp8_format": "e4m3", "bf16": True, "ffn_hidden_size": 24},
        1,
        "needs sizes divisible by 16: the width of the MLP on a tensor rank is 24",
    ),
    (
        {"fp8_format": "e4m3", "bf16": True, "hidden_size": 40, "kv_channels": 8},
        1,
        "--fp8-format e4m3 needs sizes divisible by 16: --hidden-size is 40",
    ),
    (
        {"pack_sequences": True, "compile": True},
        1,
        "--pack-sequences and --compile exclude each other",
    ),
    ({"fp8_recipe": "delayed"}, 1, "--fp8-recipe delayed needs --fp8-format"),
    (
        {"fp8_format": "e4m3", "bf16": True, "fp8_amax_history_len": 4},
        1,
        "--fp8-amax-history-len needs --fp8-recipe delayed",
    ),
    (
        {"attention_backend": "cudnn"},
        1,
        "--attention-backend cudnn needs --fp16 or --bf16",
    ),
    (
        {"attention_backend": "flash", "bf16": True},
        1,
        "--attention-backend flash cannot mask padding: add --pack-sequences",
    ),
    (
        {"attention_backend": "flash", "bf16": True, "position_embedding_type": "relative_key"},
        1,
        "cannot add the scores of --position-embedding-type relative_key",
    ),
    (
        {"attention_backend": "flash", "bf16": True, "model_type": "t5", "vocab_extra_ids": 100},
        1,
        "--attention-backend flash cannot mask T5's padding",
    ),
]


@pytest.mark.parametrize(("changes", "world_size", "problem"), MISTAKES)
def test_a_mistake_is_one_problem(changes: dict[str, Any], world_size: int, problem: str) -> None:
    (found,) = validate(small(**changes), world_size)
    assert problem in found


def test_all_mistakes_are_found_together() -> None:
    config = small(num_layers=5, pipeline_model_parallel_size=2, seq_length=99, min_lr=1.0)
    assert len(validate(config, 2)) == 3


def test_every_check_is_tried_by_a_mistake() -> None:
    untried = [
        check.__name__
        for check in CHECKS
        if not any(_objects(check, small(**changes), world) for changes, world, _ in MISTAKES)
    ]
    assert untried == []


def _objects(check: Callable[..., None], config: Config, world_size: int) -> bool:
    values = config.to_flags() | {"world_size": world_size}
    try:
        check(**{name: values[name] for name in inspect.signature(check).parameters})
    except (ConfigError, ZeroDivisionError):
        return True
    return False


def test_checks_name_their_flags_and_types() -> None:
    types = {"world_size": int}
    for section in SECTIONS.values():
        types |= get_type_hints(section)
    for check in CHECKS:
        hints = get_type_hints(check)
        hints.pop("return")
        assert hints == {name: types[name] for name in hints}, check.__name__


def test_the_files_of_a_dataset_are_looked_for(tmp_path: Path) -> None:
    prefix = str(tmp_path / "text")
    Path(prefix + ".bin").touch()
    assert validate(small(data_path=(prefix,)), 1) == [
        f"--data-path {prefix}: {prefix}.idx does not exist"
    ]
    Path(prefix + ".idx").touch()
    assert validate(small(data_path=(prefix,)), 1) == []


def test_a_run_may_load_from_where_it_will_save(tmp_path: Path) -> None:
    place = str(tmp_path / "new")
    assert validate(small(save=place, load=place, save_interval=5), 1) == []


def test_a_width_that_heads_do_not_share_may_state_the_head() -> None:
    assert validate(small(hidden_size=34, kv_channels=8), 1) == []

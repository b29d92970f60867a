"""What only some of the three models have."""

from collections.abc import Mapping

from megatron.config import all_flags
from megatron.errors import ConfigError
from megatron.validation.checks import Checks

checks = Checks()

_NAMES = {"bert": "BERT", "gpt": "GPT", "t5": "T5"}


def _only_for(models: tuple[str, ...], model_type: str, asked: Mapping[str, object]) -> None:
    """Raises ConfigError for each option that is asked for of another model than these."""
    if model_type not in models:
        owners = " and ".join(_NAMES[model] for model in models)
        raise ConfigError(
            f"{option} is for {owners} alone; the model is {_NAMES[model_type]}"
            for option, value in asked.items()
            if value
        )


def _changed(name: str, value: object) -> bool:
    """Whether the value of a flag is not its default."""
    return value != all_flags()[name].default


@checks.add
def a_decoder_belongs_to_t5(
    model_type: str,
    decoder_num_layers: int | None,
    decoder_seq_length: int | None,
    pipeline_model_parallel_split_rank: int | None,
) -> None:
    asked = {
        "--decoder-num-layers": decoder_num_layers,
        "--decoder-seq-length": decoder_seq_length,
        "--pipeline-model-parallel-split-rank": pipeline_model_parallel_split_rank,
    }
    _only_for(("t5",), model_type, asked)


@checks.add
def spans_belong_to_t5(model_type: str, vocab_extra_ids: int, mean_span_length: float) -> None:
    asked = {
        "--vocab-extra-ids": vocab_extra_ids,
        "--mean-span-length": _changed("mean_span_length", mean_span_length),
    }
    _only_for(("t5",), model_type, asked)


@checks.add
def spans_have_sentinels(model_type: str, vocab_extra_ids: int) -> None:
    if model_type == "t5" and vocab_extra_ids == 0:
        raise ConfigError(
            "--vocab-extra-ids 0 leaves T5 no sentinel tokens to mark spans with: 100 are usual"
        )


@checks.add
def relative_positions_belong_to_t5(model_type: str, position_embedding_type: str) -> None:
    asked = {"--position-embedding-type relative": position_embedding_type == "relative"}
    _only_for(("t5",), model_type, asked)


@checks.add
def compared_distances_belong_to_bert(model_type: str, position_embedding_type: str) -> None:
    option = f"--position-embedding-type {position_embedding_type}"
    _only_for(("bert",), model_type, {option: position_embedding_type.startswith("relative_key")})


@checks.add
def document_boundaries_belong_to_gpt(
    model_type: str, reset_position_ids: bool, reset_attention_mask: bool, eod_mask_loss: bool
) -> None:
    asked = {
        "--reset-position-ids": reset_position_ids,
        "--reset-attention-mask": reset_attention_mask,
        "--eod-mask-loss": eod_mask_loss,
    }
    _only_for(("gpt",), model_type, asked)


@checks.add
def masking_belongs_to_bert_and_t5(
    model_type: str, mask_prob: float, short_seq_prob: float
) -> None:
    asked = {
        "--mask-prob": _changed("mask_prob", mask_prob),
        "--short-seq-prob": _changed("short_seq_prob", short_seq_prob),
    }
    _only_for(("bert", "t5"), model_type, asked)


@checks.add
def norms_behind_belong_to_one_stack(model_type: str, norm_position: str) -> None:
    _only_for(("bert", "gpt"), model_type, {"--norm-position post": norm_position == "post"})


@checks.add
def a_masked_lm_head_belongs_to_bert(model_type: str, head_activation: str | None) -> None:
    _only_for(("bert",), model_type, {"--head-activation": head_activation})


@checks.add
def token_types_belong_to_bert(model_type: str, num_tokentypes: int) -> None:
    asked = {"--num-tokentypes": _changed("num_tokentypes", num_tokentypes)}
    _only_for(("bert",), model_type, asked)


@checks.add
def scaled_logits_belong_to_gpt_and_t5(model_type: str, logit_scale: float) -> None:
    asked = {"--logit-scale": _changed("logit_scale", logit_scale)}
    _only_for(("gpt", "t5"), model_type, asked)


@checks.add
def a_binary_head_belongs_to_bert(model_type: str, bert_no_binary_head: bool) -> None:
    _only_for(("bert",), model_type, {"--bert-no-binary-head": bert_no_binary_head})

"""The command line: what it gives, and what it answers to mistakes and old names."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from megatron.arguments import parse_config, read_command, read_config
from megatron.config import Config, all_flags
from megatron.errors import ConfigError
from megatron.flag_reference import help_text, reference_page
from megatron.old_flags import OLD_FLAGS, Obsolete, Renamed, StandsFor, Unavailable
from tests.configs import SMALL, SMALL_ARGV, argv_of, small, valid_values

ROOT = Path(__file__).parents[1]


def read(*words: str, **options: Any) -> Config:
    """The configuration of the small command line with more words after it."""
    return read_config([*SMALL_ARGV, *words], **options)[0]


def problems(*words: str, **options: Any) -> tuple[str, ...]:
    """What is wrong with the small command line with more words after it."""
    with pytest.raises(ConfigError) as caught:
        read(*words, **options)
    return caught.value.problems


def yaml_file(directory: Path, text: str) -> str:
    path = directory / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@settings(deadline=None, derandomize=True)
@given(valid_values())
def test_a_command_line_states_any_configuration(drawn: tuple[dict[str, Any], int]) -> None:
    values, world_size = drawn
    config, notes = read_config(argv_of(values), world_size=world_size)
    assert config == Config.from_flags(values)
    assert notes == []


@settings(deadline=None, derandomize=True)
@given(valid_values())
def test_a_saved_configuration_is_a_configuration_file(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[dict[str, Any], int]
) -> None:
    values, world_size = drawn
    config = Config.from_flags(values)
    path = yaml_file(tmp_path_factory.getbasetemp(), config.to_yaml())
    assert read_config(["--config-file", path], world_size=world_size)[0] == config


def test_flags_have_their_types() -> None:
    config = read("--lr=1e-3", "--pipeline-layers", "1,3", "--pipeline-model-parallel-size", "2",
                  "--fp16", "--split", "9,1", world_size=2)  # fmt: skip
    assert config.optimizer.lr == 0.001
    assert config.parallel.pipeline_layers == (1, 3)
    assert config.model.fp16 is True
    assert config.data.split == "9,1"
    assert config == small(lr=1e-3, pipeline_layers=(1, 3), pipeline_model_parallel_size=2,
                           fp16=True, split="9,1")  # fmt: skip


def test_the_last_of_a_repeated_flag_counts() -> None:
    assert read("--seed", "1", "--seed", "2").train.seed == 2


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--lr", "fast"], "--lr expects a number, found 'fast'"),
        (["--lr", "nan"], "--lr expects a number, found 'nan'"),
        (["--seed", "1.5"], "--seed expects an integer, found '1.5'"),
        (["--seed"], "--seed expects one value, found none"),
        (["--seed", "1", "2"], "--seed expects one value, found 2: 1 2"),
        (["--fp16", "maybe"], "--fp16 expects no value, or true or false, found 'maybe'"),
        (["--pipeline-layers", "2,x"], "--pipeline-layers expects an integer, found 'x'"),
        (["--pipeline-layers"], "--pipeline-layers expects an integer, found nothing"),
        (["--optimizer", "lamb"], "--optimizer lamb is none of adam, sgd"),
        (["--micro-batch", "3"], "unknown flag --micro-batch: did you mean --micro-batch-size?"),
        (["--num_layers", "3"], "unknown flag --num_layers: did you mean --num-layers?"),
        (["--zzz"], "unknown flag --zzz"),
        (["--config-file"], "--config-file expects one file"),
        (["--config-file", "/nowhere.yaml"],
         "--config-file /nowhere.yaml: No such file or directory"),
        (["--config-file", "/"], "--config-file /: Is a directory"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_in_one_line(words: list[str], problem: str) -> None:
    assert problems(*words) == (problem,)


def test_a_word_before_the_first_flag_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(["train", *SMALL_ARGV])
    assert caught.value.problems == ("expected a flag, found 'train'",)


def test_no_flag_is_abbreviated() -> None:
    for name in all_flags():
        if len(name) > 4 and name[:-1] not in all_flags():
            (problem,) = problems("--" + name[:-1].replace("_", "-"))
            assert problem.startswith("unknown flag ")


def test_all_kinds_of_mistakes_are_reported_together() -> None:
    found = problems("--sed", "4", "--lr", "fast", "--hidden-dropout", "2", "--seq-length", "99",
                     "--fp16-lm-cross-entropy", required=("vocab_file",))  # fmt: skip
    assert set(found) == {
        "unknown flag --sed: did you mean --seed?",
        "--lr expects a number, found 'fast'",
        "--hidden-dropout 2.0 is outside [0, 1)",
        "--seq-length 99 is larger than --max-position-embeddings 64",
        "--fp16-lm-cross-entropy is not available: the cross entropy is computed in float32",
        "--vocab-file is required",
    }


def test_each_required_flag_is_asked_for() -> None:
    with pytest.raises(ConfigError) as caught:
        read_config([], required=("data_path",))
    required = [name for name, flag in all_flags().items() if flag.required] + ["data_path"]
    lines = {f"--{name.replace('_', '-')} is required" for name in required}
    assert set(caught.value.problems) == lines | {"--train-iters or --train-samples is required"}


def test_a_program_has_its_own_defaults() -> None:
    assert read(defaults={"clip_grad": 0.5}).optimizer.clip_grad == 0.5
    assert read("--clip-grad", "2", defaults={"clip_grad": 0.5}).optimizer.clip_grad == 2.0


def test_a_program_of_one_model_trains_no_other(tmp_path: Path) -> None:
    gpt = {"model_type": "gpt"}
    assert read(defaults=gpt) == small(model_type="gpt")
    assert read("--model-type", "gpt", defaults=gpt) == small(model_type="gpt")
    assert read("--model-type", "gpt") == small(model_type="gpt")
    path = yaml_file(tmp_path, small().to_yaml())
    with pytest.raises(ConfigError) as caught:
        read_config(["--config-file", path], defaults=gpt)
    assert caught.value.problems == ("--model-type bert: this program trains gpt",)


# The configuration file


def test_the_command_line_wins_over_the_file_wherever_it_stands(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "seed: 5\nlog-interval: 7\nfp16: true\n")
    for words in (["--seed", "6", "--config-file", path], ["--config-file", path, "--seed", "6"]):
        config = read(*words, "--fp16", "false")
        assert (config.train.seed, config.train.log_interval, config.model.fp16) == (6, 7, False)


def test_a_file_takes_sections_underscores_lists_and_old_names(tmp_path: Path) -> None:
    path = yaml_file(
        tmp_path,
        """
        parallel:
          pipeline_layers: [1, 3]
          model-parallel-size: 2
        pipeline-model-parallel-size: 2
        optimizer: sgd
        min-lr: 1e-5   # YAML takes this for text
        bf16: true
        fp16-lm-cross-entropy: false
        checkpoint-activations: false
        save:
        """,
    )
    config, notes = read_config([*SMALL_ARGV, "--config-file", path], world_size=4)
    assert config == small(
        pipeline_layers=(1, 3), tensor_model_parallel_size=2, pipeline_model_parallel_size=2,
        optimizer="sgd", min_lr=1e-5, bf16=True,
    )  # fmt: skip
    assert notes == ["--model-parallel-size is an old name of --tensor-model-parallel-size"]


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert read("--config-file", yaml_file(tmp_path, "# nothing\n")) == small()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: 1\nhiden-size: 4\n",
         "2: unknown flag --hiden-size: did you mean --hidden-size?"),
        ("seed: 1\nlr: fast\n", "2: --lr expects a number, found 'fast'"),
        ("seed: true\n", "1: --seed expects an integer, found True"),
        ("fp16: 1\n", "1: --fp16 expects no value, or true or false, found 1"),
        ("seed:\n", "1: --seed has no value, expected an integer"),
        ("seed: {a: 1}\n", "1: --seed expects an integer, found {'a': 1}"),
        ("seed: 1\nlog-interval: 2\nseed: 3\n", "3: seed stands in line 1 already"),
        ("seed: 1\nsave: [a\n", "3: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("- seed\n", "1: expected lines such as num-layers: 24"),
        ("save: !!python/object:os.system x\n",
         "1: not YAML: could not determine a constructor for the tag "
         "'tag:yaml.org,2002:python/object:os.system'"),
        ("model:\n  fp16-lm-cross-entropy: true\n",
         "2: --fp16-lm-cross-entropy is not available: "
         "the cross entropy is computed in float32"),
        ("checkpoint-activations: 3\n",
         "1: --checkpoint-activations expects no value, or true or false, found 3"),
        ("config-file: other.yaml\n", "1: unknown flag --config-file"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_named_with_its_line(
    tmp_path: Path, text: str, problem: str
) -> None:
    path = yaml_file(tmp_path, text)
    assert problems("--config-file", path) == (f"{path}:{problem}",)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert problems("--config-file", str(path)) == (f"--config-file {path}: is not text in UTF-8",)


# Old names


def test_an_old_name_sets_the_new_flag() -> None:
    config, notes = read_config(
        [*argv_of({k: v for k, v in SMALL.items() if k not in ("micro_batch_size", "seq_length")}),
         "--batch-size", "3", "--encoder-seq-length", "48", "--warmup", "0.1",
         "--model-parallel-size", "2"],
        world_size=2,
    )  # fmt: skip
    assert config == small(
        micro_batch_size=3, seq_length=48, lr_warmup_fraction=0.1, tensor_model_parallel_size=2
    )
    assert len(notes) == 4


@pytest.mark.parametrize("name", sorted(OLD_FLAGS))
def test_each_old_name_is_answered(name: str) -> None:
    old = OLD_FLAGS[name]
    match old:
        case Renamed(to, also):
            assert {each.replace("-", "_") for each in (to, *also)} <= set(all_flags())
        case StandsFor(flags):
            needed = ["--bf16"] if name.startswith("fp8-") else []
            for words in ([f"--{name}"], [f"--{name}", "true"]):
                config, notes = read_config([*SMALL_ARGV, *needed, *words])
                stated = (word for each in flags.items() for word in (f"--{each[0]}", each[1]))
                assert config == read(*needed, *stated) != read(*needed)
                assert notes == [f"--{name} {old.note}"]
            assert read(f"--{name}", "false") == small()
            (problem,) = problems(f"--{name}", "often")
            assert problem == f"--{name} expects no value, or true or false, found 'often'"
        case Obsolete(reason):
            config, notes = read_config([*SMALL_ARGV, f"--{name}", "1", f"--{name}"])
            assert config == small()
            assert notes == [f"--{name} has no effect: {reason}"]
        case Unavailable(what, harmless):
            assert problems(f"--{name}") == (f"--{name} is not available: {what}",)
            assert problems(f"--{name}", "2")
            assert read(f"--{name}", harmless) == small()


def test_what_is_said_outright_goes_before_what_is_implied() -> None:
    for words in (
        ["--num-query-groups", "2", "--group-query-attention"],
        ["--group-query-attention", "--num-query-groups", "2"],
    ):
        assert read(*words) == small(num_query_groups=2)


def test_old_flags_of_recomputation_keep_their_meaning() -> None:
    assert read("--checkpoint-activations") == small(recompute_granularity="full")
    assert read("--activations-checkpoint-method", "block",
                "--activations-checkpoint-num-layers", "2") == small(
        recompute_granularity="full", recompute_method="block", recompute_num_layers=2
    )  # fmt: skip
    assert read("--recompute-activations") == small(recompute_granularity="selective")
    split = read("--activations-checkpoint-method", "uniform", "--tensor-model-parallel-size", "2",
                 "--distribute-checkpointed-activations", world_size=2)  # fmt: skip
    assert split == small(
        recompute_granularity="full",
        distribute_saved_activations=True,
        tensor_model_parallel_size=2,
    )


def test_a_method_that_a_file_leaves_empty_asks_for_nothing(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "activations-checkpoint-method:\n")
    assert read("--config-file", path) == small()


def test_no_old_name_hides_a_flag() -> None:
    assert not {name.replace("-", "_") for name in OLD_FLAGS} & set(all_flags())


def test_underscores_of_old_names_are_accepted() -> None:
    assert read("--local_rank=0", "--use-checkpoint-opt_param-scheduler") == small(
        use_checkpoint_lr_scheduler=True
    )


def test_every_flag_of_the_old_scripts_is_known() -> None:
    names = """
    num-layers hidden-size num-attention-heads max-position-embeddings ffn-hidden-size kv-channels
    make-vocab-size-divisible-by layernorm-epsilon apply-residual-connection-post-layernorm
    openai-gelu bert-no-binary-head attention-dropout hidden-dropout weight-decay clip-grad
    adam-beta1 adam-beta2 adam-eps sgd-momentum micro-batch-size global-batch-size
    rampup-batch-size train-iters train-samples log-interval exit-interval exit-duration-in-mins
    tensorboard-dir checkpoint-activations activations-checkpoint-method
    activations-checkpoint-num-layers distribute-checkpointed-activations recompute-granularity
    recompute-method recompute-num-layers sequence-parallel no-masked-softmax-fusion
    no-bias-gelu-fusion no-bias-dropout-fusion optimizer dataloader-type seed init-method-std
    init-method-xavier-uniform lr lr-decay-style lr-decay-iters lr-decay-samples
    lr-warmup-fraction lr-warmup-iters lr-warmup-samples min-lr override-lr-scheduler
    use-checkpoint-lr-scheduler save save-interval load no-save-optim no-save-rng no-load-optim
    no-load-rng finetune fp16 bf16 loss-scale initial-loss-scale min-loss-scale
    loss-scale-window hysteresis fp32-residual-connection no-query-key-layer-scaling
    attention-softmax-in-fp32 accumulate-allreduce-grads-in-fp32 fp16-lm-cross-entropy
    tensor-model-parallel-size pipeline-model-parallel-size pipeline-model-parallel-split-rank
    num-layers-per-virtual-pipeline-stage distributed-backend DDP-impl use-distributed-optimizer
    no-contiguous-buffers-in-local-ddp no-scatter-gather-tensors-in-pipeline local_rank
    lazy-mpu-init use-cpu-initialization empty-unused-memory-level eval-iters eval-interval
    data-path split vocab-file merge-file vocab-extra-ids seq-length encoder-seq-length
    decoder-seq-length mask-prob short-seq-prob mmap-warmup num-workers tokenizer-type
    tokenizer-model data-impl reset-position-ids reset-attention-mask eod-mask-loss
    log-params-norm log-num-zeros-in-grad tensorboard-log-interval tensorboard-queue-size
    log-timers-to-tensorboard log-batch-size-to-tensorboard log-validation-ppl-to-tensorboard
    log-memory-to-tensorboard no-log-learnig-rate-to-tensorboard
    no-log-loss-scale-to-tensorboard batch-size warmup model-parallel-size
    """.split()  # noqa: SIM905
    known = {flag.option[2:] for flag in all_flags().values()} | set(OLD_FLAGS)
    assert {name.replace("_", "-") for name in names} <= known


# Flags as launch scripts of Megatron-LM state them, by model and number of ranks.
SCRIPTS = {
    ("gpt", 8): """
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-layers 24
        --hidden-size 1024 --num-attention-heads 16 --micro-batch-size 4 --global-batch-size 16
        --seq-length 1024 --max-position-embeddings 1024 --train-iters 500000
        --lr-decay-iters 320000 --data-path text --vocab-file vocab --merge-file vocab
        --tokenizer-type GPT2BPETokenizer --data-impl mmap --split 949,50,1
        --distributed-backend nccl --lr 0.00015 --lr-decay-style cosine --min-lr 1.0e-5
        --weight-decay 1e-2 --clip-grad 1.0 --lr-warmup-fraction .01
        --activations-checkpoint-method uniform --log-interval 100 --eval-interval 1000
        --eval-iters 10 --fp16 --DDP-impl local --local_rank 0""",
    ("gpt", 1024): """
        --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --num-layers 96
        --hidden-size 12288 --num-attention-heads 96 --micro-batch-size 1 --global-batch-size 1536
        --num-layers-per-virtual-pipeline-stage 1 --rampup-batch-size 16 16 5859375
        --seq-length 2048 --max-position-embeddings 2048 --train-samples 146484375
        --lr-decay-samples 126953125 --lr-warmup-samples 183105 --lr 6.0e-5 --min-lr 6.0e-6
        --data-path 0.3 text 0.7 other --vocab-file vocab --merge-file vocab --split 98,2,0
        --sequence-parallel --recompute-activations --adam-beta2 0.95 --init-method-std 0.006
        --reset-position-ids --reset-attention-mask --eod-mask-loss --bf16""",
    ("gpt", 16): """
        --use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
        --num-attention-heads 32 --group-query-attention --num-query-groups 8 --swiglu
        --normalization RMSNorm --position-embedding-type rope --no-position-embedding
        --rotary-base 500000 --disable-bias-linear --untie-embeddings-and-output-weights
        --attention-dropout 0 --hidden-dropout 0 --seq-length 8192 --max-position-embeddings 8192
        --tokenizer-type SentencePieceTokenizer --tokenizer-model vocab --micro-batch-size 1
        --global-batch-size 128 --train-iters 1000 --lr 3e-4 --lr-warmup-iters 100 --bf16
        --tensor-model-parallel-size 8 --sequence-parallel --use-distributed-optimizer
        --overlap-grad-reduce --overlap-param-gather --use-flash-attn --no-masked-softmax-fusion
        --attention-softmax-in-fp32 --accumulate-allreduce-grads-in-fp32 --data-path text""",
    ("t5", 8): """
        --num-layers 12 --hidden-size 768 --num-attention-heads 12 --kv-channels 64
        --ffn-hidden-size 3072 --encoder-seq-length 512 --decoder-seq-length 128
        --micro-batch-size 16 --max-position-embeddings 512 --global-batch-size 2048
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4
        --pipeline-model-parallel-split-rank 2 --vocab-extra-ids 100 --train-iters 1000000
        --lr-decay-iters 1000000 --lr 0.0001 --min-lr 0.00001 --lr-decay-style linear
        --lr-warmup-fraction .01 --vocab-file vocab --tokenizer-type BertWordPieceCase
        --data-path text --split 949,50,1 --checkpoint-activations --fp16""",
    ("bert", 8): """
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-layers 24
        --hidden-size 1024 --num-attention-heads 16 --micro-batch-size 2 --global-batch-size 16
        --seq-length 512 --max-position-embeddings 512 --train-iters 1000000 --data-path text
        --vocab-file vocab --data-impl mmap --split 949,50,1 --lr 0.0001 --min-lr 1.0e-5
        --lr-decay-style linear --lr-decay-iters 990000 --weight-decay 1e-2 --clip-grad 1.0
        --lr-warmup-fraction .01 --activations-checkpoint-method uniform
        --distribute-checkpointed-activations --fp16""",
}


@pytest.mark.parametrize(("model", "ranks"), SCRIPTS)
def test_a_script_of_the_lineage_is_understood(
    model: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("text.idx", "text.bin", "other.idx", "other.bin", "vocab"):
        (tmp_path / name).touch()
    argv = SCRIPTS[model, ranks].split()
    config, _ = read_config(argv, defaults={"model_type": model}, world_size=ranks)
    assert config.model.model_type == model
    if "--num-query-groups" in argv:
        assert config.model.num_query_groups == 8


# What is shown


def test_help_names_every_flag_within_its_width() -> None:
    text = help_text("train.py", "Trains.", {"clip_grad": 0.5}, ("vocab_file",), width=100)
    for flag in all_flags().values():
        assert flag.option in text
        assert flag.topic in text
    assert max(map(len, text.splitlines())) <= 100
    text = " ".join(text.split())
    assert "0 does not clip (default 0.5)" in text
    assert "vocab.txt or vocab.json (required)" in text
    assert "learning rate at the end of decay (default 0)" in text


def test_the_reference_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert page == reference_page(), "write it: python -m megatron.flag_reference > docs/flags.md"


# The process

PROGRAM = """
from megatron.arguments import parse_config
from megatron.errors import run_command
run_command(lambda: print(parse_config(prog="train.py").train.seed))
"""


def start(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_right_command_line_runs() -> None:
    done = start(*SMALL_ARGV, "--seed", "5", "--DDP-impl", "local", "--DDP-impl", "torch")
    assert (done.returncode, done.stdout) == (0, "5\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith("train.py: --DDP-impl has no effect: ")


def test_a_wrong_command_line_ends_with_2_and_no_traceback() -> None:
    done = start(*SMALL_ARGV, "--sed", "5", "--lr", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: unknown flag --sed: did you mean --seed?",
        "error: --lr expects a number, found 'x'",
    ]


def test_only_rank_zero_notes_old_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        parse_config([*SMALL_ARGV, "--DDP-impl", "local"], prog="train.py")
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_the_number_of_ranks_is_torchruns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit) as caught:
        parse_config([*SMALL_ARGV, "--tensor-model-parallel-size", "2"], prog="train.py")
    assert caught.value.code == 2
    assert "the number of ranks, 3, is not a multiple of" in capsys.readouterr().err


def test_help_is_shown_whatever_else_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(["--zzz", "--help"], prog="train.py")
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: train.py ")


# The dry run.

DRY = [*SMALL_ARGV, "--dry-run"]


def dry_problems(*words: str) -> tuple[str, ...]:
    """What is wrong with the small command line and other words, one of which may be --dry-run."""
    with pytest.raises(ConfigError) as caught:
        read_command([*SMALL_ARGV, *words])
    return caught.value.problems


def test_what_is_asked_of_a_dry_run_is_no_part_of_the_configuration() -> None:
    flags = ["--world-size", "4", "--hardware", "a100-80gb", "--dry-run-json", "plan.json"]
    command = read_command([*DRY, *flags], required=("data_path",))
    wanted = command.dry_run
    assert (wanted.dry_run, wanted.world_size, wanted.hardware) == (True, 4, "a100-80gb")
    assert (wanted.dry_run_json, wanted.dry_run_picture) == ("plan.json", None)
    assert command.config == small()
    assert not read_command(SMALL_ARGV).dry_run.dry_run


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--dry-run", "--world-size", "0"], ["--world-size 0 is outside [1, 262144]"]),
        (["--dry-run", "--world-size", "-3"], ["--world-size -3 is outside [1, 262144]"]),
        (["--dry-run", "--world-size", "1e3"], ["--world-size expects an integer, found '1e3'"]),
        (["--dry-run", "--hardware"], ["--hardware expects one value, found none"]),
        (["--dry-run", "--hardware", "a", "b"], ["--hardware expects one value, found 2: a b"]),
        (["--dry-run", "--dry-run-json"], ["--dry-run-json expects one value, found none"]),
        (["--dry-run", "yes"], ["--dry-run expects no value, or true or false, found 'yes'"]),
        (["--dry_run"], ["unknown flag --dry_run: did you mean --dry-run?"]),
        (["--hardware", "x", "--world-size", "2"],
         ["--hardware is for --dry-run", "--world-size is for --dry-run"]),
        (["--dry-run", "yes", "--world-size", "2"],
         ["--dry-run expects no value, or true or false, found 'yes'"]),
    ],
)  # fmt: skip
def test_a_mistake_in_a_dry_runs_flags_is_one_line(words: list[str], expected: list[str]) -> None:
    assert [*dry_problems(*words)] == expected


def test_a_file_may_ask_for_a_dry_run(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "dry-run: true\nworld_size: 8\nhardware: a100-80gb\nseed: 5\n")
    words = [*SMALL_ARGV, "--config-file", path]
    command = read_command([*words, "--world-size", "2"])
    assert (command.dry_run.dry_run, command.dry_run.world_size) == (True, 2)
    assert command.dry_run.hardware == "a100-80gb"
    # The same file starts the run that it describes.
    called_off = read_command([*words, "--dry-run", "false"])
    assert not called_off.dry_run.dry_run
    assert called_off.config.train.seed == command.config.train.seed == 5


def test_mistakes_in_a_files_dry_run_have_their_lines(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "dry-run: true\nworld-size: many\nhardware:\n")
    assert dry_problems("--config-file", path) == (
        f"{path}:2: --world-size expects an integer, found 'many'",
        f"{path}:3: --hardware has no value, expected text",
    )
    path = yaml_file(tmp_path, "seed: 1\nhardware: a100-80gb\n")
    assert dry_problems("--config-file", path) == (f"{path}:2: --hardware is for --dry-run",)


def test_a_dry_run_goes_on_with_what_flags_say_against_each_other(tmp_path: Path) -> None:
    missing, save = tmp_path / "vocab.txt", tmp_path / "file"
    save.write_text("no directory")
    words = ["--vocab-file", str(missing), "--tensor-model-parallel-size", "3", "--save", str(save)]
    command = read_command([*DRY, *words, "--world-size", "4"])
    assert command.config.parallel.tensor_model_parallel_size == 3
    assert "the number of ranks, 4, is not a multiple" in command.conflicts[0]
    assert command.problems == (
        f"--vocab-file {missing} does not exist",
        f"--save {save} is a file, not a directory",
    )
    found = dry_problems(*words)  # one rank of a run
    assert set(command.problems) < set(found)
    assert len(found) == len(command.conflicts) + len(command.problems)


def test_a_dry_run_tells_everything_beside_a_value_without_sense(tmp_path: Path) -> None:
    assert dry_problems(
        "--dry-run", "--micro-batch-size", "0", "--seq-length", "99", "--sed", "1",
        "--vocab-file", str(tmp_path / "vocab"),
    ) == (
        "unknown flag --sed: did you mean --seed?",
        "--micro-batch-size 0 is outside [1, inf)",
        "--seq-length 99 is larger than --max-position-embeddings 64",
        f"--vocab-file {tmp_path}/vocab does not exist",
    )  # fmt: skip


def test_a_program_that_trains_nothing_has_no_dry_run() -> None:
    assert problems("--dry-run") == ("--dry-run is for a program that trains",)


@pytest.mark.parametrize(
    ("flag", "value", "none"),
    [
        ("recompute_granularity", "full", None),
        ("num_layers_per_virtual_pipeline_stage", "1", None),
        ("pipeline_layers", "1,3", None),
        ("loss_scale", "8", None),
        ("metrics_file", "some.jsonl", "none"),  # a file may be called so
    ],
)
def test_none_takes_back_what_was_stated(flag: str, value: str, none: str | None) -> None:
    option = "--" + flag.replace("_", "-")
    layout = ["--pipeline-model-parallel-size", "2"] if "pipeline" in flag else []
    argv = [*SMALL_ARGV, *layout, option, value]
    stated, _ = read_config([*argv, option, "none"], world_size=2)
    assert stated.to_flags()[flag] == none


def test_none_is_no_value_of_a_flag_with_a_default() -> None:
    with pytest.raises(ConfigError, match="--seed expects an integer, found 'none'"):
        read_config([*SMALL_ARGV, "--seed", "none"])

"""The one configuration of a run: five frozen sections whose fields are the command line's flags.

A field declares everything that is known about its flag: type, default, help text, bounds and
choices. The command line (`megatron.arguments`), `--config-file`, the configuration saved with a
run and the page docs/flags.md are all made from these fields. Nothing changes a configuration;
`dataclasses.replace` makes another.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from megatron.errors import ConfigError
from megatron.flags import Flag, flag, flags_of


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: its size, its regularisation, its initial values and its number format."""

    num_layers: int = flag("number of transformer layers", bounds="[1, inf)", topic="Network size")
    hidden_size: int = flag("width of the residual stream", bounds="[1, inf)")
    num_attention_heads: int = flag("attention heads of each layer", bounds="[1, inf)")
    max_position_embeddings: int = flag(
        "positions that the model can tell apart; the longest possible sequence", bounds="[1, inf)"
    )
    ffn_hidden_size: int | None = flag(
        "width of the MLP; 4 x hidden-size where not given", default=None, bounds="[1, inf)"
    )
    kv_channels: int | None = flag(
        "width of one attention head; hidden-size / heads where not given",
        default=None,
        bounds="[1, inf)",
    )
    vocab_size: int | None = flag(
        "number of tokens before padding; the tokenizer's where not given",
        default=None,
        bounds="[1, inf)",
    )
    make_vocab_size_divisible_by: int = flag(
        "pad the vocabulary to a multiple of this times the tensor-parallel size",
        default=128,
        bounds="[1, inf)",
    )
    layernorm_epsilon: float = flag(
        "constant under the square root of LayerNorm", default=1e-5, bounds="(0, inf)"
    )
    openai_gelu: bool = flag("use the tanh form of GELU everywhere, not erf", default=False)
    bert_no_binary_head: bool = flag(
        "BERT without next-sentence prediction: no pooler, no binary head", default=False
    )

    attention_dropout: float = flag(
        "dropout probability of attention weights",
        default=0.1,
        bounds="[0, 1)",
        topic="Regularisation",
    )
    hidden_dropout: float = flag(
        "dropout probability of hidden states", default=0.1, bounds="[0, 1)"
    )

    init_method_std: float = flag(
        "standard deviation of the initial weights",
        default=0.02,
        bounds="(0, inf)",
        topic="Initialisation",
    )
    init_method_xavier_uniform: bool = flag(
        "draw initial weights by Xavier's uniform rule", default=False
    )

    fp16: bool = flag(
        "train in float16 with float32 master weights and loss scaling",
        default=False,
        topic="Precision",
    )
    bf16: bool = flag("train in bfloat16 with float32 master weights", default=False)
    fp64: bool = flag("train in float64, to compare layouts without rounding", default=False)

    @property
    def ffn_size(self) -> int:
        """Width of the MLP."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def dtype(self) -> str:
        """Name of the parameters' number format, as in `torch`."""
        if self.fp16:
            return "float16"
        if self.bf16:
            return "bfloat16"
        return "float64" if self.fp64 else "float32"

    def padded_vocab_size(self, tensor_size: int) -> int:
        """Rows of the word embeddings over all `tensor_size` ranks; needs `vocab_size`."""
        if self.vocab_size is None:
            raise ConfigError("--vocab-size is not known: state it or give a tokenizer")
        multiple = self.make_vocab_size_divisible_by * tensor_size
        return math.ceil(self.vocab_size / multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model and the batch are spread over the ranks, and how the ranks communicate."""

    tensor_model_parallel_size: int = flag(
        "ranks over which each layer is split", default=1, bounds="[1, inf)", topic="Parallelism"
    )
    pipeline_model_parallel_size: int = flag(
        "stages over which the layers are spread", default=1, bounds="[1, inf)"
    )
    pipeline_layers: tuple[int, ...] | None = flag(
        "layers of each stage, such as 2,3; equal shares where not given",
        default=None,
        bounds="[0, inf)",
        metavar="N,N,...",
    )
    pipeline_schedule: str = flag(
        "order of forward and backward passes", default="1f1b", choices=("gpipe", "1f1b")
    )
    distributed_backend: str | None = flag(
        "communication library; nccl where there is a GPU, else gloo",
        default=None,
        choices=("nccl", "gloo"),
    )
    distributed_timeout_minutes: float = flag(
        "minutes after which a collective that does not complete ends the run",
        default=10.0,
        bounds="(0, inf)",
    )
    gradient_bucket_size: int = flag(
        "elements of one piece of the gradient's all-reduce; smaller pieces overlap more of it "
        "with the backward pass, larger ones cost less latency",
        default=40_000_000,
        bounds="[1, inf)",
    )
    use_cpu: bool = flag("train on the CPU even where there is a GPU", default=False)

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each pipeline stage; raises ConfigError where they do not add up."""
        stages = self.pipeline_model_parallel_size
        if self.pipeline_layers is None:
            if num_layers % stages:
                raise ConfigError(
                    f"--num-layers {num_layers} is not divisible by "
                    f"--pipeline-model-parallel-size {stages}: "
                    "state the layers of each stage with --pipeline-layers"
                )
            return (num_layers // stages,) * stages
        stated = "--pipeline-layers " + ",".join(map(str, self.pipeline_layers))
        if len(self.pipeline_layers) != stages:
            raise ConfigError(
                f"{stated} states {len(self.pipeline_layers)} stages, "
                f"--pipeline-model-parallel-size is {stages}"
            )
        if sum(self.pipeline_layers) != num_layers:
            raise ConfigError(
                f"{stated} sums to {sum(self.pipeline_layers)}, --num-layers is {num_layers}"
            )
        return self.pipeline_layers

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model among `world_size` ranks; raises ConfigError for a remainder."""
        tensor, pipeline = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        if world_size < tensor * pipeline or world_size % (tensor * pipeline):
            raise ConfigError(
                f"the number of ranks, {world_size}, is not a multiple of "
                f"--tensor-model-parallel-size {tensor} x "
                f"--pipeline-model-parallel-size {pipeline} = {tensor * pipeline}"
            )
        return world_size // (tensor * pipeline)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, the course of its learning rate, and the scale of the loss."""

    optimizer: str = flag(
        "update rule; adam decays weights as AdamW does",
        default="adam",
        choices=("adam", "sgd"),
        topic="Optimizer",
    )
    weight_decay: float = flag(
        "weight decay; biases and LayerNorms have none", default=0.01, bounds="[0, inf)"
    )
    clip_grad: float = flag(
        "largest norm of the whole gradient; 0 does not clip", default=1.0, bounds="[0, inf)"
    )
    adam_beta1: float = flag("decay of Adam's mean gradient", default=0.9, bounds="[0, 1)")
    adam_beta2: float = flag("decay of Adam's mean square", default=0.999, bounds="[0, 1)")
    adam_eps: float = flag("constant in Adam's denominator", default=1e-8, bounds="[0, inf)")
    sgd_momentum: float = flag("momentum of SGD", default=0.9, bounds="[0, 1)")

    lr: float = flag(
        "largest learning rate, reached after warm-up", bounds="[0, inf)", topic="Learning rate"
    )
    min_lr: float = flag("learning rate at the end of decay", default=0.0, bounds="[0, inf)")
    lr_decay_style: str = flag(
        "shape of the decay", default="linear", choices=("constant", "linear", "cosine")
    )
    lr_decay_iters: int | None = flag(
        "iteration at which decay ends; train-iters where not given",
        default=None,
        bounds="[1, inf)",
    )
    lr_decay_samples: int | None = flag(
        "sample at which decay ends; train-samples where not given",
        default=None,
        bounds="[1, inf)",
    )
    lr_warmup_fraction: float | None = flag(
        "warm-up as a fraction of the decay's length", default=None, bounds="[0, 1]"
    )
    lr_warmup_iters: int = flag("iterations of linear warm-up", default=0, bounds="[0, inf)")
    lr_warmup_samples: int = flag("samples of linear warm-up", default=0, bounds="[0, inf)")
    override_lr_scheduler: bool = flag(
        "on resuming, follow these flags where the checkpoint's schedule differs", default=False
    )
    use_checkpoint_lr_scheduler: bool = flag(
        "on resuming, follow the checkpoint's schedule where these flags differ", default=False
    )

    loss_scale: float | None = flag(
        "constant scale of the fp16 loss; adjusted by itself where not given",
        default=None,
        bounds="(0, inf)",
        topic="Loss scale",
    )
    initial_loss_scale: float = flag(
        "first scale where it is adjusted", default=2.0**32, bounds="(0, inf)"
    )
    min_loss_scale: float = flag(
        "smallest scale where it is adjusted", default=1.0, bounds="(0, inf)"
    )
    loss_scale_window: int = flag(
        "iterations without overflow after which the scale doubles", default=1000, bounds="[1, inf)"
    )
    hysteresis: int = flag(
        "overflows tolerated before the scale is halved", default=2, bounds="[1, inf)"
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text that is trained on and how samples are made from it."""

    data_path: tuple[str, ...] = flag(
        "prefix of the indexed dataset, the path without .idx and .bin",
        default=(),
        topic="Data",
        metavar="PREFIX",
    )
    split: str = flag(
        "weights by which documents go to training, validation and test",
        default="969, 30, 1",
        metavar="A,B,C",
    )
    seq_length: int = flag("tokens of one sample", bounds="[1, inf)")
    mask_prob: float = flag("fraction of the tokens that are masked", default=0.15, bounds="(0, 1)")
    short_seq_prob: float = flag(
        "probability of a sample shorter than seq-length", default=0.1, bounds="[0, 1]"
    )
    dataloader_type: str = flag(
        "single: the samples once, in order; cyclic: over and over, shuffled",
        default="single",
        choices=("single", "cyclic"),
    )
    num_workers: int = flag(
        "processes that prepare batches, for each rank; 0: the rank itself",
        default=2,
        bounds="[0, inf)",
    )
    data_cache_dir: str | None = flag(
        "directory of the samples' index files; beside the data where not given",
        default=None,
        metavar="DIR",
    )
    mmap_warmup: bool = flag("read the dataset once at the start to warm the cache", default=False)

    tokenizer_type: str | None = flag(
        "tokenizer that made the dataset",
        default=None,
        choices=("BertWordPieceLowerCase", "BertWordPieceCase", "GPT2BPETokenizer"),
        topic="Tokenizer",
    )
    vocab_file: str | None = flag(
        "vocabulary: vocab.txt or vocab.json", default=None, metavar="FILE"
    )
    merge_file: str | None = flag("merge rules of byte-pair encoding", default=None, metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length of the run, its batches, its checkpoints and its records."""

    micro_batch_size: int = flag(
        "samples of one forward pass on one rank", bounds="[1, inf)", topic="Training"
    )
    global_batch_size: int | None = flag(
        "samples of one step over all ranks; micro-batch x data-parallel size where not given",
        default=None,
        bounds="[1, inf)",
    )
    train_iters: int | None = flag("steps to train", default=None, bounds="[0, inf)")
    train_samples: int | None = flag(
        "samples to train on, in place of train-iters", default=None, bounds="[0, inf)"
    )
    seed: int = flag("seed of all randomness", default=1234, bounds="[0, inf)")
    exit_interval: int | None = flag(
        "end the run at iterations divisible by this, saving first",
        default=None,
        bounds="[1, inf)",
    )
    exit_duration_in_mins: float | None = flag(
        "end the run, saving first, at the first report after this many minutes",
        default=None,
        bounds="(0, inf)",
    )

    eval_iters: int = flag(
        "steps of one evaluation", default=100, bounds="[0, inf)", topic="Evaluation"
    )
    eval_interval: int = flag(
        "iterations between evaluations on the validation set", default=1000, bounds="[1, inf)"
    )

    save: str | None = flag(
        "directory to write checkpoints to", default=None, topic="Checkpoints", metavar="DIR"
    )
    save_interval: int | None = flag(
        "iterations between checkpoints", default=None, bounds="[1, inf)"
    )
    load: str | None = flag(
        "directory to continue from its latest checkpoint", default=None, metavar="DIR"
    )
    finetune: bool = flag(
        "load the weights alone and start at iteration 0 with a new optimizer", default=False
    )
    no_save_optim: bool = flag("save no optimizer state", default=False)
    no_save_rng: bool = flag("save no random-number state", default=False)
    no_load_optim: bool = flag("load no optimizer state", default=False)
    no_load_rng: bool = flag("load no random-number state", default=False)

    log_interval: int = flag(
        "iterations between lines on the console", default=100, bounds="[1, inf)", topic="Logging"
    )
    log_params_norm: bool = flag("log the norm of the parameters", default=False)
    metrics_file: str | None = flag(
        "file to append a JSON object to for each report and each evaluation; lines of iterations "
        "that are done again go to FILE.old",
        default=None,
        metavar="FILE",
    )
    tensorboard_dir: str | None = flag(
        "directory of TensorBoard's event files", default=None, metavar="DIR"
    )
    tensorboard_log_interval: int = flag(
        "iterations between TensorBoard records", default=1, bounds="[1, inf)"
    )
    tensorboard_queue_size: int = flag(
        "TensorBoard records held back before writing", default=1000, bounds="[1, inf)"
    )

    def global_batch(self, data_parallel_size: int) -> int:
        """Samples of one step over all ranks."""
        return self.global_batch_size or self.micro_batch_size * data_parallel_size

    def num_micro_batches(self, data_parallel_size: int) -> int:
        """Forward passes that one rank makes in a step; raises ConfigError for a remainder."""
        global_batch = self.global_batch(data_parallel_size)
        samples = self.micro_batch_size * data_parallel_size
        if global_batch % samples:
            raise ConfigError(
                f"--global-batch-size {global_batch} is not divisible by "
                f"--micro-batch-size {self.micro_batch_size} x "
                f"data-parallel size {data_parallel_size} = {samples}"
            )
        return global_batch // samples


@dataclass(frozen=True, kw_only=True)
class Config:
    """All that describes a run."""

    model: ModelConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    data: DataConfig
    train: TrainConfig

    def with_vocab_size(self, vocab_size: int) -> "Config":
        """This configuration with the tokenizer's number of tokens."""
        return dataclasses.replace(
            self, model=dataclasses.replace(self.model, vocab_size=vocab_size)
        )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by section and field: numbers, texts, booleans, lists and None."""
        return {
            section: {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(getattr(self, section)).items()
            }
            for section in SECTIONS
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """The configuration that `to_dict` described; raises ConfigError naming all it lacks."""
        problems = [f"unknown section {name}" for name in values if name not in SECTIONS]
        flat: dict[str, Any] = {}
        for section, kind in SECTIONS.items():
            given = values.get(section, {})
            if not isinstance(given, Mapping):
                problems.append(f"section {section} is no mapping")
                continue
            flags = {each.name: each for each in flags_of(kind)}
            problems += [
                f"unknown {name} in section {section}" for name in given if name not in flags
            ]
            for name, each in flags.items():
                try:
                    if name in given:
                        flat[name] = each.read(given[name])
                    elif each.required:
                        problems.append(f"{each.option} is required")
                except ConfigError as error:
                    problems += error.problems
        if problems:
            raise ConfigError(problems)
        return cls.from_flags(flat)

    @classmethod
    def from_flags(cls, values: Mapping[str, Any]) -> "Config":
        """The configuration with these values by field name, whatever section they belong to."""
        return cls(
            **{
                section: kind(
                    **{f.name: values[f.name] for f in flags_of(kind) if f.name in values}
                )
                for section, kind in SECTIONS.items()
            }
        )

    def to_flags(self) -> dict[str, Any]:
        """The value of every field by its name, which is unique over all sections."""
        return {
            each.name: getattr(getattr(self, section), each.name)
            for section, kind in SECTIONS.items()
            for each in flags_of(kind)
        }

    def to_yaml(self) -> str:
        """Text that `from_yaml` and `--config-file` read."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> "Config":
        """The configuration that `to_yaml` wrote; raises ConfigError."""
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"not YAML: {error}".replace("\n", " ")) from error
        if not isinstance(values, dict):
            raise ConfigError(f"expected the sections {', '.join(SECTIONS)}")
        return cls.from_dict(values)


SECTIONS: dict[str, type] = {
    field.name: typing.cast(type, field.type) for field in dataclasses.fields(Config)
}


def all_flags() -> dict[str, Flag]:
    """Every flag by its field name, in the order of the sections."""
    return {each.name: each for kind in SECTIONS.values() for each in flags_of(kind)}

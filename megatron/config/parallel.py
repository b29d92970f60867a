"""How the model and the batch are spread over the ranks."""

from dataclasses import dataclass

from megatron.config.flags import flag
from megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model and the batch are spread over the ranks, and how the ranks communicate."""

    tensor_model_parallel_size: int = flag(
        "ranks over which each layer is split", default=1, bounds="[1, inf)", topic="Parallelism"
    )
    pipeline_model_parallel_size: int = flag(
        "stages over which the layers are spread", default=1, bounds="[1, inf)"
    )
    sequence_parallel: bool = flag(
        "between the split layers, split activations along the sequence over the tensor ranks",
        default=False,
    )
    pipeline_layers: tuple[int, ...] | None = flag(
        "layers of each stage, virtual ones included, such as 2,3; equal shares where not given",
        default=None,
        bounds="[0, inf)",
        metavar="N,N,...",
    )
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        "layers of a virtual stage, of which each rank then holds several, interleaved",
        default=None,
        bounds="[1, inf)",
    )
    pipeline_model_parallel_split_rank: int | None = flag(
        "first pipeline rank of an encoder-decoder's decoder; half of the ranks where not given",
        default=None,
        bounds="[1, inf)",
    )
    pipeline_schedule: str = flag(
        "order of forward and backward passes; zb: zero bubble, with weight gradients computed "
        "apart",
        default="1f1b",
        choices=("gpipe", "1f1b", "interleaved", "zb-h1", "zb-2p"),
    )
    pipeline_costs: tuple[float, ...] | None = flag(
        "times of a forward pass, of the input's and the weights' gradients, and of a message, "
        "to plan zb-2p by; where not given, measured in the first steps, messages taken as free",
        default=None,
        bounds="[0, inf)",
        metavar="F,B,W,C",
    )
    distributed_backend: str | None = flag(
        "communication library; nccl where there is a GPU, else gloo",
        default=None,
        choices=("nccl", "gloo"),
    )
    distributed_timeout_minutes: float = flag(
        "minutes that a rank waits for others before all say what they wait for and the run ends",
        default=10.0,
        bounds="(0, inf)",
    )
    gradient_bucket_size: int = flag(
        "elements of one piece of the gradient's all-reduce; smaller pieces overlap more of it "
        "with the backward pass, larger ones cost less latency",
        default=40_000_000,
        bounds="[1, inf)",
    )
    use_distributed_optimizer: bool = flag(
        "spread the optimizer's state over the data-parallel ranks", default=False
    )
    shard_gradients: bool = flag(
        "spread the sums of the gradients over the data-parallel ranks, too", default=False
    )
    use_cpu: bool = flag("train on the CPU even where there is a GPU", default=False)

    recompute_granularity: str | None = flag(
        "activations to compute again in the backward pass instead of holding them: those of "
        "whole layers, or of the attention core alone",
        default=None,
        choices=("full", "selective"),
        topic="Recomputation",
    )
    recompute_method: str = flag(
        "uniform: recompute all layers, recompute-num-layers at a time; block: recompute that many "
        "layers of each stage one by one, and hold the others' activations",
        default="uniform",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int = flag(
        "layers that are recomputed together, or of each stage", default=1, bounds="[1, inf)"
    )
    distribute_saved_activations: bool = flag(
        "store the inputs of recomputed layers split over the tensor ranks", default=False
    )

    @property
    def schedule(self) -> str:
        """The pipeline's schedule; virtual stages are interleaved."""
        virtual = self.num_layers_per_virtual_pipeline_stage is not None
        return "interleaved" if virtual else self.pipeline_schedule

    def virtual_stages(self, num_layers: int) -> int:
        """Stages that each rank holds; raises ConfigError where they are not stated."""
        ranks, each = self.pipeline_model_parallel_size, self.num_layers_per_virtual_pipeline_stage
        if self.schedule != "interleaved":
            return 1
        if self.pipeline_layers is not None:
            count, rest = divmod(len(self.pipeline_layers), ranks)
            if rest:
                raise ConfigError(
                    f"{self._stated_layers} states {len(self.pipeline_layers)} stages, not a "
                    f"multiple of --pipeline-model-parallel-size {ranks}"
                )
            return count
        if each is None:
            raise ConfigError(
                "--pipeline-schedule interleaved needs "
                "--num-layers-per-virtual-pipeline-stage or --pipeline-layers"
            )
        if num_layers % (ranks * each):
            raise ConfigError(
                f"--num-layers {num_layers} is not divisible by --pipeline-model-parallel-size "
                f"{ranks} x --num-layers-per-virtual-pipeline-stage {each}: "
                "state the layers of each stage with --pipeline-layers"
            )
        return num_layers // (ranks * each)

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each stage along the model; raises ConfigError where they do not add up."""
        stages = self.pipeline_model_parallel_size * self.virtual_stages(num_layers)
        if self.pipeline_layers is None:
            return self._equal_shares("--num-layers", num_layers, stages)
        self._check_count(stages)
        self._check_sum(self.pipeline_layers, "", "--num-layers", num_layers)
        return self.pipeline_layers

    def split_rank(self) -> int:
        """The first pipeline rank of a decoder; 0 where one rank holds encoder and decoder.

        Raises ConfigError where it leaves the encoder or the decoder without a rank.
        """
        ranks, split = self.pipeline_model_parallel_size, self.pipeline_model_parallel_split_rank
        if split is not None and split >= ranks:
            raise ConfigError(
                f"--pipeline-model-parallel-split-rank {split} leaves no rank to the decoder: "
                f"--pipeline-model-parallel-size is {ranks}"
            )
        return split or ranks // 2  # of one rank 0

    def encoder_decoder_layers(
        self, encoder: int, decoder: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Layers of each encoder and of each decoder stage; raises ConfigError.

        One rank holds both in one stage.
        """
        ranks, split = self.pipeline_model_parallel_size, self.split_rank()
        names = "--num-layers", "--decoder-num-layers"
        stated = self.pipeline_layers
        if stated is not None:
            self._check_count(ranks)
        if ranks == 1:
            if stated is not None:
                self._check_sum(stated, "", " + ".join(names), encoder + decoder)
            return (encoder,), (decoder,)
        if stated is None:
            return (
                self._equal_shares(names[0], encoder, split),
                self._equal_shares(names[1], decoder, ranks - split),
            )
        first, second = stated[:split], stated[split:]
        self._check_sum(first, " in the encoder", names[0], encoder)
        self._check_sum(second, " in the decoder", names[1], decoder)
        return first, second

    @property
    def _stated_layers(self) -> str:
        return "--pipeline-layers " + ",".join(map(str, self.pipeline_layers or ()))

    def _equal_shares(self, option: str, layers: int, stages: int) -> tuple[int, ...]:
        if layers % stages:
            raise ConfigError(
                f"{option} {layers} is not divisible by the {stages} stages of "
                f"--pipeline-model-parallel-size {self.pipeline_model_parallel_size}: "
                "state the layers of each stage with --pipeline-layers"
            )
        return (layers // stages,) * stages

    def _check_count(self, stages: int) -> None:
        found = len(self.pipeline_layers or ())
        if found != stages:
            raise ConfigError(
                f"{self._stated_layers} states {found} stages, expected {stages} by "
                f"--pipeline-model-parallel-size {self.pipeline_model_parallel_size}"
            )

    def _check_sum(self, stated: tuple[int, ...], where: str, option: str, layers: int) -> None:
        if sum(stated) != layers:
            raise ConfigError(
                f"{self._stated_layers} sums to {sum(stated)}{where}, {option} is {layers}"
            )

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

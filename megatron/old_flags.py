"""Flags of Megatron-LM's launch scripts that are not flags here, and what becomes of each.

Names stand without the dashes in front, and with dashes for underscores. A `Renamed` flag sets
another one. One that `StandsFor` others sets them, where they are not given under their own names.
An `Obsolete` one asks for what always happens here, or means nothing any more. An `Unavailable` one
asks for what is not offered: an error, since to ignore it would train another model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Renamed:
    """The flag sets another one, `to`, in its place; `also` are others that it asks for."""

    to: str
    also: Mapping[str, str] = field(default_factory=dict)

    @property
    def note(self) -> str:
        also = f", with {_options(self.also)}" if self.also else ""
        return f"is an old name of --{self.to}{also}"


@dataclass(frozen=True)
class StandsFor:
    """The flag, a switch, asks for these flags with these values."""

    flags: Mapping[str, str]

    @property
    def note(self) -> str:
        return f"stands for {_options(self.flags)}"


@dataclass(frozen=True)
class Obsolete:
    """The flag changes nothing, for this `reason`."""

    reason: str

    @property
    def note(self) -> str:
        return f"has no effect: {self.reason}"


@dataclass(frozen=True)
class Unavailable:
    """The flag asks for `what`, which is not offered; the value `harmless` does not ask for it."""

    what: str
    harmless: str = "false"

    @property
    def note(self) -> str:
        return f"is not available: {self.what}"


def _options(flags: Mapping[str, str]) -> str:
    return " ".join(f"--{name} {value}" for name, value in flags.items())


OldFlag = Renamed | StandsFor | Obsolete | Unavailable

_FULL = {"recompute-granularity": "full"}
_FUSED = "a fused kernel and its plain form compute the same"
_OVERLAPPED = "it always overlaps with computation"
_ROPE = {"position-embedding-type": "rope"}
_SHOWN = "TensorBoard shows every quantity that is measured"

OLD_FLAGS: dict[str, OldFlag] = {
    # Names that have changed
    "activations-checkpoint-method": Renamed("recompute-method", also=_FULL),
    "activations-checkpoint-num-layers": Renamed("recompute-num-layers"),
    "batch-size": Renamed("micro-batch-size"),
    "distribute-checkpointed-activations": Renamed("distribute-saved-activations"),
    "encoder-num-layers": Renamed("num-layers"),
    "encoder-seq-length": Renamed("seq-length"),
    "intra-layer-model-parallel-size": Renamed("tensor-model-parallel-size"),
    "model-parallel-size": Renamed("tensor-model-parallel-size"),
    "norm-epsilon": Renamed("layernorm-epsilon"),
    "override-opt-param-scheduler": Renamed("override-lr-scheduler"),
    "use-checkpoint-opt-param-scheduler": Renamed("use-checkpoint-lr-scheduler"),
    "warmup": Renamed("lr-warmup-fraction"),
    # Switches that are a value of another flag
    "checkpoint-activations": StandsFor(_FULL | {"recompute-method": "uniform"}),
    "enable-cuda-graph": StandsFor({"cuda-graphs": "true"}),
    "fp8-e4m3": StandsFor({"fp8-format": "e4m3"}),
    "fp8-hybrid": StandsFor({"fp8-format": "hybrid"}),
    "group-query-attention": StandsFor({"num-query-groups": "1"}),
    "no-position-embedding": StandsFor(_ROPE),
    "openai-gelu": StandsFor({"activation": "gelu_tanh"}),
    "recompute-activations": StandsFor({"recompute-granularity": "selective"}),
    "use-rotary-position-embeddings": StandsFor(_ROPE),
    # Processes and their groups
    "DDP-impl": Obsolete("gradients always lie in contiguous buffers reduced during backward"),
    "empty-unused-memory-level": Obsolete("PYTORCH_CUDA_ALLOC_CONF governs the memory cache"),
    "lazy-mpu-init": Obsolete("process groups are made once, when training starts"),
    "local-rank": Obsolete("torchrun tells each process its rank through LOCAL_RANK"),
    "no-contiguous-buffers-in-local-ddp": Obsolete("gradients always lie in contiguous buffers"),
    "no-scatter-gather-tensors-in-pipeline": Obsolete(
        "stages always exchange whole activations, or each rank's part of --sequence-parallel"
    ),
    "overlap-grad-reduce": Obsolete(_OVERLAPPED),
    "overlap-param-gather": Obsolete(_OVERLAPPED),
    "use-cpu-initialization": Obsolete("initial weights are the same on every device and layout"),
    # Numbers
    "accumulate-allreduce-grads-in-fp32": Obsolete("gradients always add up in float32"),
    "cross-entropy-loss-fusion": Obsolete(_FUSED),
    "no-bias-dropout-fusion": Obsolete(_FUSED),
    "no-bias-gelu-fusion": Obsolete(_FUSED),
    "no-bias-swiglu-fusion": Obsolete(_FUSED),
    "no-gradient-accumulation-fusion": Obsolete(_FUSED),
    "no-masked-softmax-fusion": Obsolete(_FUSED),
    "no-persist-layer-norm": Obsolete(_FUSED),
    "no-rope-fusion": Obsolete(_FUSED),
    "no-async-tensor-model-parallel-allreduce": Obsolete(
        "when a collective runs changes no result"
    ),
    "no-query-key-layer-scaling": Obsolete(
        "scores are never scaled by the layer's number, which only float16 softmax needs"
    ),
    "use-flash-attn": Obsolete("--attention-backend auto takes a fused kernel where there is one"),
    # Data, models and logs
    "data-impl": Obsolete("datasets are always memory-mapped"),
    "log-batch-size-to-tensorboard": Obsolete(
        "the batch is --global-batch-size, or what --rampup-batch-size makes of the samples seen"
    ),
    "log-timers-to-tensorboard": Obsolete(_SHOWN),
    "log-validation-ppl-to-tensorboard": Obsolete("TensorBoard shows the validation loss"),
    "no-log-learnig-rate-to-tensorboard": Obsolete(_SHOWN),  # the old typing error is real
    "no-log-loss-scale-to-tensorboard": Obsolete(_SHOWN),
    "use-mcore-models": Obsolete("each model is built in one way"),
    # What is not offered
    "apply-query-key-layer-scaling": Unavailable("scores are not scaled by the layer's number"),
    "fp16-lm-cross-entropy": Unavailable("the cross entropy is computed in float32"),
    "log-memory-to-tensorboard": Unavailable("memory is not measured"),
    "log-num-zeros-in-grad": Unavailable("zeros in the gradient are not counted"),
}

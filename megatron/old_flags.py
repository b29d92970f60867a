"""Flags of Megatron-LM's launch scripts that are not flags here, and what becomes of each.

Names stand without the dashes in front, and with dashes for underscores. A `Renamed` flag sets
another one. An `Obsolete` one asks for what always happens here, or means nothing any more. An
`Unavailable` one asks for what is not offered: an error, since to ignore it would train another
model.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Renamed:
    """The flag sets another one, `to`, in its place."""

    to: str

    @property
    def note(self) -> str:
        return f"is an old name of --{self.to}"


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


OldFlag = Renamed | Obsolete | Unavailable

_RECOMPUTATION = "activations are kept, not recomputed"
_FUSED = "a fused kernel and its plain form compute the same"
_SHOWN = "TensorBoard shows every quantity that is measured"

OLD_FLAGS: dict[str, OldFlag] = {
    # Names that have changed
    "batch-size": Renamed("micro-batch-size"),
    "encoder-seq-length": Renamed("seq-length"),
    "intra-layer-model-parallel-size": Renamed("tensor-model-parallel-size"),
    "model-parallel-size": Renamed("tensor-model-parallel-size"),
    "override-opt-param-scheduler": Renamed("override-lr-scheduler"),
    "use-checkpoint-opt-param-scheduler": Renamed("use-checkpoint-lr-scheduler"),
    "warmup": Renamed("lr-warmup-fraction"),
    # Processes and their groups
    "DDP-impl": Obsolete("gradients always lie in contiguous buffers reduced during backward"),
    "empty-unused-memory-level": Obsolete("PYTORCH_CUDA_ALLOC_CONF governs the memory cache"),
    "lazy-mpu-init": Obsolete("process groups are made once, when training starts"),
    "local-rank": Obsolete("torchrun tells each process its rank through LOCAL_RANK"),
    "no-contiguous-buffers-in-local-ddp": Obsolete("gradients always lie in contiguous buffers"),
    "no-scatter-gather-tensors-in-pipeline": Obsolete("stages always exchange whole tensors"),
    "use-cpu-initialization": Obsolete("initial weights are the same on every device and layout"),
    # Numbers
    "accumulate-allreduce-grads-in-fp32": Obsolete("gradients always add up in float32"),
    "attention-softmax-in-fp32": Obsolete("the attention kernels keep the softmax in float32"),
    "no-bias-dropout-fusion": Obsolete(_FUSED),
    "no-bias-gelu-fusion": Obsolete(_FUSED),
    "no-gradient-accumulation-fusion": Obsolete(_FUSED),
    "no-masked-softmax-fusion": Obsolete(_FUSED),
    "no-persist-layer-norm": Obsolete(_FUSED),
    "no-async-tensor-model-parallel-allreduce": Obsolete("the order of communication is fixed"),
    "no-query-key-layer-scaling": Obsolete(
        "scores are never scaled by the layer's number, which only float16 softmax needs"
    ),
    # Data and logs
    "data-impl": Obsolete("datasets are always memory-mapped"),
    "log-batch-size-to-tensorboard": Obsolete("the batch size is constant"),
    "log-timers-to-tensorboard": Obsolete(_SHOWN),
    "log-validation-ppl-to-tensorboard": Obsolete("TensorBoard shows the validation loss"),
    "no-log-learnig-rate-to-tensorboard": Obsolete(_SHOWN),  # the old typing error is real
    "no-log-loss-scale-to-tensorboard": Obsolete(_SHOWN),
    # What is not offered
    "activations-checkpoint-method": Unavailable(_RECOMPUTATION),
    "activations-checkpoint-num-layers": Unavailable(_RECOMPUTATION),
    "apply-query-key-layer-scaling": Unavailable("scores are not scaled by the layer's number"),
    "apply-residual-connection-post-layernorm": Unavailable("residuals are taken before LayerNorm"),
    "checkpoint-activations": Unavailable(_RECOMPUTATION),
    "decoder-seq-length": Unavailable("only BERT is trained, which has no decoder"),
    "distribute-checkpointed-activations": Unavailable(_RECOMPUTATION),
    "eod-mask-loss": Unavailable("only BERT is trained"),
    "fp16-lm-cross-entropy": Unavailable("the cross entropy is computed in float32"),
    "fp32-residual-connection": Unavailable("residuals have the parameters' number format"),
    "log-memory-to-tensorboard": Unavailable("memory is not measured"),
    "log-num-zeros-in-grad": Unavailable("zeros in the gradient are not counted"),
    "num-layers-per-virtual-pipeline-stage": Unavailable("each rank holds one pipeline stage"),
    "pipeline-model-parallel-split-rank": Unavailable("only BERT is trained, which has no decoder"),
    "rampup-batch-size": Unavailable("the batch size is constant"),
    "recompute-activations": Unavailable(_RECOMPUTATION),
    "recompute-granularity": Unavailable(_RECOMPUTATION),
    "recompute-method": Unavailable(_RECOMPUTATION),
    "recompute-num-layers": Unavailable(_RECOMPUTATION),
    "reset-attention-mask": Unavailable("only BERT is trained"),
    "reset-position-ids": Unavailable("only BERT is trained"),
    "sequence-parallel": Unavailable("activations are not split along the sequence"),
    "tokenizer-model": Unavailable("SentencePiece models are not read"),
    "use-distributed-optimizer": Unavailable("each replica holds the whole optimizer state"),
    "vocab-extra-ids": Unavailable("only T5 has sentinel tokens", harmless="0"),
}

"""The optimizer, the course of its learning rate, and the scale of the loss."""

from dataclasses import dataclass

from megatron.config.flags import flag


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

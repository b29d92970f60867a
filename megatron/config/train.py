"""The length of the run, its batches, its checkpoints and its records."""

from dataclasses import dataclass

from megatron.config.flags import flag
from megatron.errors import ConfigError


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
    rampup_batch_size: tuple[int, ...] | None = flag(
        "let the global batch grow from START by INCREMENT until it is whole after SAMPLES samples",
        default=None,
        bounds="[1, inf)",
        metavar="START INCREMENT SAMPLES",
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
        "end the run, saving first, at the first report after this many minutes, counted from the "
        "start of the program; with exit-signal-handler within three steps after them",
        default=None,
        bounds="(0, inf)",
    )
    exit_signal_handler: bool = flag(
        "on SIGTERM or SIGUSR1 end the run within three steps, saving first, with exit code 0; "
        "without it on SIGUSR1 alone, at the next report",
        default=False,
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
    profile_steps: str | None = flag(
        "profile the iterations A to B: of each rank a trace and a table of its operators",
        default=None,
        metavar="A:B",
    )
    profile_dir: str = flag("directory of the profile", default="profile", metavar="DIR")
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

    kernels: str = flag(
        "auto: the CUDA kernels on a GPU where they are built or can be, else PyTorch's "
        "operators; cuda: the kernels, or an error; torch: PyTorch's; emulated: the kernels on "
        "the CPU, thread by thread, slow, to try them; apex: PyTorch's with apex' norms and "
        "Adam, to compare",
        default="auto",
        choices=("auto", "cuda", "torch", "emulated", "apex"),
        topic="Speed",
    )
    cuda_graphs: bool = flag(
        "record a micro-batch's forward and backward pass once and replay it", default=False
    )
    compile: bool = flag(
        "compile what lies between the matrix products with torch.compile where no kernel of this "
        "project runs",
        default=False,
    )
    cross_entropy_chunk: int | None = flag(
        "tokens that the vocabulary is scored for at a time, in the backward pass once more: the "
        "scores of a whole micro-batch are never held",
        default=None,
        bounds="[1, inf)",
    )

    @property
    def profiled_iterations(self) -> range:
        """The iterations to profile, none by default."""
        return range(0) if self.profile_steps is None else iterations_between(self.profile_steps)

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


def iterations_between(ends: str) -> range:
    """What A:B names, both ends included; raises ConfigError where it names nothing."""
    words = ends.split(":")
    if len(words) == 2 and all(word.isascii() and word.isdigit() for word in words):
        first, last = map(int, words)
        if 1 <= first <= last:
            return range(first, last + 1)
    raise ConfigError(f"--profile-steps {ends}: expected A:B with iterations 1 <= A <= B")

"""What a dry run is asked for: flags of a command, not of the run that it plans."""

from dataclasses import dataclass

from megatron.config.flags import flag


@dataclass(frozen=True, kw_only=True)
class DryRunConfig:
    """What a dry run is asked for."""

    dry_run: bool = flag(
        "train nothing: say what this run would cost on a cluster, which need not be there, and "
        "what is wrong with it on this machine",
        default=False,
        topic="Dry run",
    )
    world_size: int | None = flag(
        "ranks of the planned cluster; torchrun's where not given",
        default=None,
        bounds="[1, 262144]",
    )
    hardware: str = flag(
        "what the cluster is made of: h100-sxm, a100-80gb, v100-32gb, or a YAML file like those in "
        "megatron/planner/hardware",
        default="h100-sxm",
        metavar="NAME|FILE",
    )
    dry_run_json: str | None = flag(
        "file to write the plan to as JSON", default=None, metavar="FILE"
    )
    dry_run_picture: str | None = flag(
        "file to draw the schedule and the memory of the ranks in: .png, .svg or .pdf",
        default=None,
        metavar="FILE",
    )

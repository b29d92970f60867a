"""The stages of the pipeline and the order of its passes."""

from megatron.config import ParallelConfig
from megatron.errors import ConfigError
from megatron.validation.checks import Checks, exclude_each_other

checks = Checks()


@checks.add
def layers_fill_the_stages(
    model_type: str,
    num_layers: int,
    pipeline_model_parallel_size: int,
    pipeline_layers: tuple[int, ...] | None,
    pipeline_schedule: str,
    num_layers_per_virtual_pipeline_stage: int | None,
) -> None:
    if model_type == "t5":
        return
    parallel = ParallelConfig(
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        pipeline_layers=pipeline_layers,
        pipeline_schedule=pipeline_schedule,
        num_layers_per_virtual_pipeline_stage=num_layers_per_virtual_pipeline_stage,
    )
    parallel.stage_layers(num_layers)
    if parallel.schedule == "interleaved" and parallel.virtual_stages(num_layers) == 1:
        raise ConfigError(
            "interleaving needs at least two stages on each rank: --num-layers "
            f"{num_layers} gives one to each of --pipeline-model-parallel-size "
            f"{pipeline_model_parallel_size}"
        )


@checks.add
def layers_fill_the_stages_of_encoder_and_decoder(
    model_type: str,
    num_layers: int,
    decoder_num_layers: int | None,
    pipeline_model_parallel_size: int,
    pipeline_model_parallel_split_rank: int | None,
    pipeline_layers: tuple[int, ...] | None,
) -> None:
    if model_type == "t5":
        ParallelConfig(
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            pipeline_model_parallel_split_rank=pipeline_model_parallel_split_rank,
            pipeline_layers=pipeline_layers,
        ).encoder_decoder_layers(num_layers, decoder_num_layers or num_layers)


@checks.add
def stages_are_stated_once(
    pipeline_layers: tuple[int, ...] | None, num_layers_per_virtual_pipeline_stage: int | None
) -> None:
    exclude_each_other(
        ("--pipeline-layers", pipeline_layers),
        ("--num-layers-per-virtual-pipeline-stage", num_layers_per_virtual_pipeline_stage),
    )


@checks.add
def virtual_stages_are_interleaved(
    model_type: str,
    pipeline_schedule: str,
    num_layers_per_virtual_pipeline_stage: int | None,
    pipeline_model_parallel_size: int,
) -> None:
    virtual = num_layers_per_virtual_pipeline_stage is not None
    if not virtual and pipeline_schedule != "interleaved":
        return
    asked = (
        f"--num-layers-per-virtual-pipeline-stage {num_layers_per_virtual_pipeline_stage}"
        if virtual
        else "--pipeline-schedule interleaved"
    )
    if model_type == "t5":
        raise ConfigError(f"{asked}: the pipeline of an encoder-decoder is not interleaved")
    if virtual and pipeline_schedule not in ("1f1b", "interleaved"):
        raise ConfigError(
            f"{asked} is interleaved 1F1B, --pipeline-schedule is {pipeline_schedule}"
        )
    if pipeline_model_parallel_size == 1:
        raise ConfigError(f"{asked} needs --pipeline-model-parallel-size above 1")


@checks.add
def costs_are_of_zero_bubble(
    pipeline_costs: tuple[float, ...] | None, pipeline_schedule: str
) -> None:
    if pipeline_costs is None:
        return
    if len(pipeline_costs) != 4:
        raise ConfigError(f"--pipeline-costs expects four numbers, found {len(pipeline_costs)}")
    if pipeline_schedule != "zb-2p":
        raise ConfigError(
            f"--pipeline-costs needs --pipeline-schedule zb-2p, found {pipeline_schedule}"
        )

"""Model parallel units: the rank grid, its groups, and the layers that are split over it.

Read in this order: ``topology`` (which rank is where), ``parallel_state`` (its groups),
``shard_spec`` (how a parameter is split), ``layers`` (the products that are split).
"""

from megatron.mpu.collectives import (
    copy_to_tensor_region,
    gather_from_sequence_region,
    gather_from_tensor_region,
    reduce_from_tensor_region,
    reduce_scatter_to_sequence_region,
    scatter_to_tensor_region,
)
from megatron.mpu.cross_entropy import vocab_parallel_cross_entropy
from megatron.mpu.deferral import defer_weight_gradients
from megatron.mpu.getters import (
    destroy_model_parallel,
    get_data_parallel_group,
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_embedding_group,
    get_parallel_state,
    get_pipeline_model_parallel_group,
    get_pipeline_model_parallel_rank,
    get_pipeline_model_parallel_world_size,
    get_position_embedding_group,
    get_tensor_model_parallel_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    initialize_model_parallel,
    install,
    is_pipeline_first_stage,
    is_pipeline_last_stage,
    is_rank_in_embedding_group,
    is_rank_in_position_embedding_group,
    model_parallel_is_initialized,
)
from megatron.mpu.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    parallel_lm_logits,
)
from megatron.mpu.linear_cross_entropy import linear_cross_entropy
from megatron.mpu.parallel_state import Axis, ParallelState
from megatron.mpu.recompute import recompute
from megatron.mpu.shard_spec import Rectangle, ShardSpec
from megatron.mpu.stage import Stage, encoder_decoder_stages, stages
from megatron.mpu.topology import Coordinates, Topology

__all__ = [
    "Axis",
    "ColumnParallelLinear",
    "Coordinates",
    "ParallelState",
    "Rectangle",
    "RowParallelLinear",
    "ShardSpec",
    "Stage",
    "Topology",
    "VocabParallelEmbedding",
    "copy_to_tensor_region",
    "defer_weight_gradients",
    "destroy_model_parallel",
    "encoder_decoder_stages",
    "gather_from_sequence_region",
    "gather_from_tensor_region",
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_embedding_group",
    "get_parallel_state",
    "get_pipeline_model_parallel_group",
    "get_pipeline_model_parallel_rank",
    "get_pipeline_model_parallel_world_size",
    "get_position_embedding_group",
    "get_tensor_model_parallel_group",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "initialize_model_parallel",
    "install",
    "is_pipeline_first_stage",
    "is_pipeline_last_stage",
    "is_rank_in_embedding_group",
    "is_rank_in_position_embedding_group",
    "linear_cross_entropy",
    "model_parallel_is_initialized",
    "parallel_lm_logits",
    "recompute",
    "reduce_from_tensor_region",
    "reduce_scatter_to_sequence_region",
    "scatter_to_tensor_region",
    "stages",
    "vocab_parallel_cross_entropy",
]

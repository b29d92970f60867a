import torch

from megatron.mpu.parallel_state import ParallelState
from megatron.mpu.shard_spec import ShardSpec
from megatron.optimizer.flat_buffer import build_flat_buffers
from tests.optimizer.support import Net

SINGLE = ParallelState.single()


def test_parameters_keep_their_values_in_flat_memory() -> None:
    net, untouched = Net(SINGLE), Net(SINGLE)
    buffers = build_flat_buffers(list(net.parameters()), 0, bucket_size=300)
    for parameter, before in zip(net.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(parameter, before)
    for buffer in buffers:
        buffer.values.fill_(5.0)
    assert all((parameter == 5.0).all() for parameter in net.parameters())


def test_biases_and_norms_lie_apart_from_decayed_weights() -> None:
    buffers = build_flat_buffers(list(Net(SINGLE).parameters()), 0, bucket_size=300)
    assert {buffer.traits.decayed for buffer in buffers} == {True, False}
    for buffer in buffers:
        assert all((p.dim() > 1) == buffer.traits.decayed for p in buffer.parameters)


def test_only_tensor_rank_zero_counts_whole_tensors() -> None:
    split = {"embedding.weight", "wide.weight", "wide.bias", "narrow.weight"}
    for rank, expected in ((0, split | {"narrow.bias", "norm.weight", "norm.bias"}), (1, split)):
        buffers = build_flat_buffers(list(Net(SINGLE).parameters()), rank, bucket_size=300)
        counted = {p.shard_spec.name for b in buffers if b.counted for p in b.parameters}
        assert counted == expected


def test_tied_copies_are_not_counted() -> None:
    net = Net(SINGLE)
    net.embedding.weight.shard_spec = ShardSpec("head.weight", (30, 8), dim=0, tied_to="owner")
    buffers = build_flat_buffers(list(net.parameters()), 0, bucket_size=300)
    (copies,) = [b for b in buffers if b.traits.decayed and not b.counted]
    assert copies.parameters == (net.embedding.weight,)


def test_gradients_of_half_precision_are_float32() -> None:
    for dtype, gradient_dtype in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        net = Net(SINGLE, dtype)
        buffers = build_flat_buffers(list(net.parameters()), 0, bucket_size=300)
        assert all(b.values.dtype == dtype for b in buffers)
        assert all(b.gradients.dtype == gradient_dtype for b in buffers)
        assert all(p.main_grad.dtype == gradient_dtype for p in net.parameters())


def test_views_lie_where_the_parameters_lie() -> None:
    net = Net(SINGLE)
    for buffer in build_flat_buffers(list(net.parameters()), 0, bucket_size=300):
        for view, parameter in zip(buffer.views(buffer.values), buffer.parameters, strict=True):
            assert view.shape == parameter.shape
            assert view.data_ptr() == parameter.data_ptr()

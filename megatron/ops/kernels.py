"""Which implementation of an operator runs: the kernel of `csrc/cuda/` or its twin in PyTorch.

    auto      kernels for tensors on a GPU where they are built or can be, else PyTorch
    cuda      kernels for tensors on a GPU, or an error
    emulated  kernels for tensors on the CPU, thread by thread (`csrc/emulation/`), to try them
    torch     PyTorch everywhere
    apex      PyTorch, with apex' norms and Adam, to compare

The choice is made once for a process, by `choose`. A kernel computes in float32 and takes tensors
in float32, float16 and bfloat16; others, and tensors elsewhere, go to PyTorch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from megatron.errors import ConfigError
from megatron.ops.build import BuildError, build_cuda, build_emulated
from megatron.ops.planned import device_type

# As `csrc/cuda/dispatch.cuh` counts them.
FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_OLDEST = (7, 0)  # compute capability


@dataclass
class _Selection:
    """What was chosen, and what has become of it on each kind of device."""

    choice: str = "auto"
    libraries: dict[str, ctypes.CDLL | None] | None = None

    def library(self, device_type: str) -> ctypes.CDLL | None:
        """The kernels for tensors on such a device; loaded, and if need be compiled, once."""
        if self.libraries is None:
            self.libraries = {}
        if device_type not in self.libraries:
            self.libraries[device_type] = _open(self.choice, device_type)
        return self.libraries[device_type]


_selected = _Selection()


def choose(choice: str, device: torch.device) -> str:
    """Take kernels or PyTorch from now on, as `choice` says; returns in words what will run.

    Raises:
        ConfigError: what was asked for by name cannot be had.
    """
    global _selected
    if choice == "cuda" and device.type != "cuda":
        raise ConfigError(f"--kernels cuda needs a GPU, the run is on {device.type}")
    if choice == "emulated" and device.type != "cpu":
        raise ConfigError(f"--kernels emulated runs on the CPU, not on {device.type}")
    if choice == "apex" and importlib.util.find_spec("apex") is None:
        raise ConfigError("--kernels apex: apex is not installed")
    _selected = _Selection(choice)
    return description(device)


def description(device: torch.device) -> str:
    """In words, what runs for tensors on a device."""
    if _selected.library(device.type) is not None:
        return "CUDA kernels" if device.type == "cuda" else "CUDA kernels, emulated"
    return "PyTorch's operators" + (" and apex'" if _selected.choice == "apex" else "")


def choice() -> str:
    """What was chosen last."""
    return _selected.choice


@contextmanager
def using(choice: str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Another choice within the `with` block."""
    global _selected
    before = _selected
    try:
        choose(choice, torch.device(device))
        yield
    finally:
        _selected = before


def active(tensor: Tensor) -> bool:
    """Whether a kernel takes this tensor, or will in the run that is planned with it."""
    device = tensor.device.type
    if device == "meta":
        on_gpu = device_type(tensor) == "cuda" and _selected.choice in ("auto", "cuda")
        return on_gpu and tensor.dtype in FORMATS
    if device == "cpu" and _selected.choice != "emulated":
        return False
    return (
        device in ("cpu", "cuda")
        and tensor.dtype in FORMATS
        and _selected.library(device) is not None
    )


def launch(name: str, *arguments: Tensor | int | float | torch.dtype | None) -> None:
    """Run the launcher `name` on the current stream of the tensors' device.

    Each argument becomes what the launcher takes: a tensor its address and None the address 0, an
    int an int64_t, a bool an int64_t, a float a float, a dtype the number of its format.

    Raises:
        RuntimeError: the launch failed.
    """
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    library = _selected.library(device.type)
    assert library is not None, "the kernels are not active"
    if device.type == "cpu":
        error = getattr(library, name)(*map(_passed, arguments), None)
    else:
        with torch.cuda.device(device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            error = getattr(library, name)(*map(_passed, arguments), stream)
    if error:
        raise RuntimeError(f"the kernel {name} was not launched: CUDA error {error}")


def number(name: str, *arguments: int) -> int:
    """What a function of the library says that takes and returns int64_t; of any device's."""
    libraries = (_selected.libraries or {}).values()
    library = next(each for each in libraries if each is not None)
    function = getattr(library, name)
    function.restype = ctypes.c_int64
    return int(function(*map(ctypes.c_int64, arguments)))


def _passed(argument: Tensor | int | float | torch.dtype | None) -> object:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return None
    if isinstance(argument, torch.dtype):
        return ctypes.c_int64(FORMATS[argument])
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


def _open(choice: str, device_type: str) -> ctypes.CDLL | None:
    if choice == "emulated" and device_type == "cpu":
        try:
            return _load(build_emulated())
        except BuildError as error:
            raise ConfigError(f"--kernels emulated: {error}") from error
    if choice not in ("auto", "cuda") or device_type != "cuda":
        return None
    capability = torch.cuda.get_device_capability()
    try:
        if torch.version.cuda is None or capability < _OLDEST:
            raise BuildError("the kernels need an Nvidia GPU of compute capability 7.0 or newer")
        return _load(build_cuda(capability))
    except BuildError as error:
        if choice == "cuda":
            raise ConfigError(f"--kernels cuda: {error}") from error
        warnings.warn(f"PyTorch's operators run in place of the kernels: {error}", stacklevel=2)
        return None


@cache
def _load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))

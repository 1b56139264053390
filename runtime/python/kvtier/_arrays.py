"""Pointers into NumPy arrays and torch tensors, without a copy.

Torch is not imported here: a tensor is recognised by its methods, so that the package runs where
there is no torch. Anything else that speaks DLPack goes through NumPy's view of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _abi
from .errors import InvalidArgument, Unsupported

_NUMPY = {"float16": _abi.F16, "float32": _abi.F32, "bfloat16": _abi.BF16}
_TORCH = {"torch.float16": _abi.F16, "torch.float32": _abi.F32, "torch.bfloat16": _abi.BF16}


@dataclass(frozen=True)
class View:
    """Where an array's elements are. Valid while ``owner`` lives."""

    owner: Any
    pointer: int
    dtype: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # Bytes.

    @property
    def contiguous(self) -> bool:
        expected = _abi.DTYPE_BYTES[self.dtype]
        for length, stride in zip(reversed(self.shape), reversed(self.strides)):
            if length != 1 and stride != expected:
                return False
            expected *= length
        return True


def is_torch(array: Any) -> bool:
    return hasattr(array, "data_ptr") and hasattr(array, "stride")


def view(name: str, array: Any, dims: str) -> View:
    """A view of ``array``, whose dimensions are named by ``dims``: "tokens, heads, dim"."""
    if is_torch(array):
        found = _torch_view(name, array)
    else:
        if not isinstance(array, np.ndarray):
            array = _as_numpy(name, array)
        number = _NUMPY.get(array.dtype.name)
        if number is None:
            raise InvalidArgument(_wrong_dtype(name, array.dtype.name))
        found = View(array, array.ctypes.data, number, array.shape, array.strides)
    wanted = dims.count(",") + 1
    if len(found.shape) != wanted:
        raise InvalidArgument(f"{name} has shape {list(found.shape)}, expected [{dims}]")
    if found.shape[-1] != 1 and found.strides[-1] != _abi.DTYPE_BYTES[found.dtype]:
        raise InvalidArgument(
            f"the last dimension of {name} is not contiguous (its stride is {found.strides[-1]} "
            "bytes): pass a contiguous copy"
        )
    if any(stride < 0 for stride in found.strides):
        raise InvalidArgument(f"{name} has a negative stride: pass a contiguous copy")
    return found


def _wrong_dtype(name: str, dtype: str) -> str:
    return f"{name} is {dtype}, expected float16, bfloat16 or float32"


def _torch_view(name: str, tensor: Any) -> View:
    if tensor.device.type != "cpu":
        raise Unsupported(
            f"{name} is on {tensor.device}: the runtime of this version attends on the CPU, move "
            "the model there"
        )
    number = _TORCH.get(str(tensor.dtype))
    if number is None:
        raise InvalidArgument(_wrong_dtype(name, str(tensor.dtype)))
    size = _abi.DTYPE_BYTES[number]
    strides = tuple(stride * size for stride in tensor.stride())
    return View(tensor, tensor.data_ptr(), number, tuple(tensor.shape), strides)


def _as_numpy(name: str, array: Any) -> np.ndarray:
    if hasattr(array, "__array_interface__"):
        return np.asarray(array)
    if hasattr(array, "__dlpack__"):
        try:
            return np.from_dlpack(array)
        except (BufferError, RuntimeError, TypeError) as error:
            raise Unsupported(f"{name} cannot be read through DLPack: {error}") from error
    raise InvalidArgument(
        f"{name} is a {type(array).__name__}, expected a NumPy array, a torch tensor or something "
        "that speaks DLPack"
    )


def empty_like(array: Any, shape: tuple[int, ...]) -> Any:
    """A new array of the same kind and dtype."""
    if is_torch(array):
        return array.new_empty(shape)
    return np.empty(shape, dtype=array.dtype)


def token_ids(token_ids: Any) -> np.ndarray:
    """Ids of tokens as 32-bit numbers, contiguous."""
    ids = np.asarray(token_ids)
    if ids.ndim != 1:
        raise InvalidArgument(f"token_ids has shape {list(ids.shape)}, expected [tokens]")
    if len(ids) > 0:
        if ids.dtype.kind not in "iu":
            raise InvalidArgument(f"token_ids is {ids.dtype}, expected integers")
        if ids.min() < 0 or ids.max() > 0xFFFFFFFF:
            raise InvalidArgument("token_ids: an id is below 0 or beyond 32 bits")
    return np.ascontiguousarray(ids, dtype=np.uint32)

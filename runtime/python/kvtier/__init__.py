"""kvtier: a tiered (device, host, disk) KV cache with selection.

    options = kvtier.Options(query_heads=9, kv_heads=3, head_dim=64, tokens_max=8192)
    options = kvtier.with_capacities(options, device="10%", host="100%")
    with kvtier.Runtime(options) as runtime, runtime.create_sequence() as sequence:
        sequence.append(0, keys, values)
        out = sequence.step(0, queries, budget_tokens=400)

``kvtier.transformers`` puts it under ``model.generate()``.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from . import _abi
from .errors import (
    Busy,
    Cancelled,
    Corrupt,
    Error,
    Internal,
    InvalidArgument,
    IoError,
    NoSpace,
    NotFound,
    StockAttentionWarning,
    Unsupported,
)
from .options import Capacity, Needs, Options, needs, with_capacities
from .runtime import Runtime, Sequence

__version__ = "0.1.0"

__all__ = [
    "Busy",
    "Cancelled",
    "Capacity",
    "Corrupt",
    "Error",
    "Internal",
    "InvalidArgument",
    "IoError",
    "Needs",
    "NoSpace",
    "NotFound",
    "Options",
    "Runtime",
    "Sequence",
    "StockAttentionWarning",
    "Unsupported",
    "has_feature",
    "library",
    "library_version",
    "needs",
    "selectors",
    "with_capacities",
]


@functools.lru_cache(maxsize=1)
def library() -> _abi.Library:
    """The C library, loaded at first use. ImportError says where it was looked for."""
    return _abi.load()


def library_version() -> str:
    """The version of the loaded library, "0.1.0"."""
    return library().version_string().decode()


def has_feature(name: str) -> bool:
    """Whether the library has "cuda", "disk", "exact-attention", "fork", "resolve",
    "prefix-store"."""
    return bool(library().has_feature(name.encode()))


@functools.lru_cache(maxsize=1)
def selectors() -> list[dict[str, Any]]:
    """What there is to select by: name, summary, source, needs, parameters, decorates."""
    found = library()
    return json.loads(found.text(found.list_selectors))

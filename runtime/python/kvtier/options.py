"""What a runtime is opened with, and what its tiers must hold."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Union

from . import _abi
from .errors import InvalidArgument

Capacity = Union[int, str]

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


@dataclass(frozen=True)
class Options:
    """One group of layers with one layout; the fields are those of ``kvtier_options``.

    Bytes are integers here; :func:`with_capacities` reads "25%" and "2GiB".
    """

    # The model.
    query_heads: int
    kv_heads: int
    head_dim: int
    tokens_max: int
    """Longest sequence."""
    layers: int = 1
    value_dim: int = 0
    """0: as ``head_dim``."""
    dtype: str = "float16"
    """Of keys and values: float16, bfloat16 or float32."""
    softmax_scale: float = 0.0
    """0: 1 / sqrt(head_dim)."""
    logit_cap: float = 0.0
    """Soft-capping: cap * tanh(logit / cap). 0: off."""
    sink_logits: Sequence[Sequence[float]] | None = None
    """[layers][query_heads], for models with attention sinks as logits."""
    rope_theta: float = 0.0
    """For selectors that un-rotate keys. 0: unknown."""
    rope_dims: int = 0

    # Blocks.
    tokens_per_block: int = 8
    kv_heads_per_block: int = 1
    extent_bytes: int = 128 << 10

    # What is attended.
    selector: str | None = None
    """As ``kvtier selectors`` lists them. None: the default."""
    reduction: str = "sum"
    sinks: int = 4
    window: int = 64
    rest: str = "measured"
    """What becomes of the tokens left out: "measured", "always" or "never" estimated."""

    # How it moves.
    eviction: str | None = None
    look_ahead_bytes: int = 0
    verify: str = "arrivals"
    deterministic: bool = False
    seed: int = 0
    threads: int = 0
    """0: all that the process may use."""

    # How much.
    sequences_max: int = 1
    device_capacity_bytes: int = 0
    host_capacity_bytes: int = 0
    disk_capacity_bytes: int = 0
    disk_path: str | None = None

    logger: Callable[[str], None] | None = field(default=None, compare=False)
    """Hears of what is no failure but worth knowing: pages that could not be locked, say."""
    timeline_events: int = 0
    measure_interval: int = 0
    """Most steps of a layer from one measurement of ``rest`` to the next. 0: the default."""


@dataclass(frozen=True)
class Needs:
    """The least that a runtime needs, in bytes; see ``kvtier_needs``."""

    device_bytes: int
    host_bytes: int
    host_reserve_bytes: int
    extent_bytes_total: int
    device_bytes_all: int


_PLAIN = (
    "layers query_heads kv_heads head_dim value_dim softmax_scale logit_cap rope_theta rope_dims "
    "tokens_per_block kv_heads_per_block extent_bytes sinks window look_ahead_bytes seed threads "
    "tokens_max sequences_max device_capacity_bytes host_capacity_bytes disk_capacity_bytes "
    "timeline_events measure_interval"
).split()


def to_struct(library: _abi.Library, options: Options) -> tuple[_abi.Options, list[Any]]:
    """The C struct, and what must live as long as it is used (the logger: as the runtime)."""
    struct = _abi.Options()
    library.options_init(ctypes.byref(struct), ctypes.sizeof(struct))
    keep: list[Any] = []
    for name in _PLAIN:
        value = getattr(options, name)
        if value < 0:
            raise InvalidArgument(f"{name} is {value}, expected 0 or more")
        setattr(struct, name, value)
    struct.dtype = _abi.choice("dtype", options.dtype, _abi.DTYPES)
    struct.reduction = _abi.choice("reduction", options.reduction, _abi.REDUCTIONS)
    struct.rest = _abi.choice("rest", options.rest, _abi.RESTS)
    struct.verify = _abi.choice("verify", options.verify, _abi.VERIFIES)
    struct.deterministic = int(options.deterministic)
    for name in ("selector", "eviction", "disk_path"):
        text = getattr(options, name)
        setattr(struct, name, None if text is None else str(text).encode())
    if options.sink_logits is not None:
        flat = [float(value) for row in options.sink_logits for value in row]
        if len(flat) != options.layers * options.query_heads:
            raise InvalidArgument(
                f"sink_logits has {len(flat)} values, expected layers * query_heads = "
                f"{options.layers * options.query_heads}"
            )
        struct.sink_logits = (ctypes.c_float * len(flat))(*flat)
    if options.logger is not None:
        tell = options.logger
        callback = _abi.Logger(lambda context, message: tell(message.decode("utf-8", "replace")))
        struct.logger = callback
        keep.append(callback)
    return struct, keep


def needs(options: Options) -> Needs:
    """What :class:`Runtime` would insist on; the capacities in ``options`` are ignored."""
    from . import library

    struct, keep = to_struct(library(), options)
    found = _abi.Needs()
    library().runtime_needs(ctypes.byref(struct), ctypes.byref(found))
    del keep
    return Needs(**{name: getattr(found, name) for name in Needs.__dataclass_fields__})


def parse_capacity(name: str, capacity: Capacity, whole: int) -> tuple[int, bool]:
    """Bytes, and whether they were given as a share of ``whole``."""
    if isinstance(capacity, int):
        return capacity, False
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%|[KMGT]iB|B|)\s*", str(capacity))
    if match is None:
        raise InvalidArgument(f"{name} is {capacity!r}, expected bytes, \"2GiB\" or \"10%\"")
    number, unit = float(match.group(1)), match.group(2)
    if unit == "%":
        return int(whole * number / 100), True
    return int(number * _UNITS[unit]), False


def with_capacities(
    options: Options,
    device: Capacity,
    host: Capacity,
    disk: Capacity | None = None,
) -> Options:
    """``options`` with capacities from bytes, "512MiB" or "10%".

    A share is of what all sequences take at full length on that tier, and never less than one step
    needs. ``disk`` None, with a ``disk_path``: what the host tier does not hold.
    """
    least = needs(options)
    device_bytes, share = parse_capacity("device_capacity", device, least.device_bytes_all)
    if share:
        device_bytes = max(device_bytes, least.device_bytes)
    host_bytes, share = parse_capacity("host_capacity", host, least.extent_bytes_total)
    if share:
        host_bytes = max(host_bytes, least.host_bytes)
    disk_bytes = 0
    if disk is not None:
        disk_bytes, _ = parse_capacity("disk_capacity", disk, least.extent_bytes_total)
    elif options.disk_path is not None:
        missing = least.extent_bytes_total + least.host_reserve_bytes - host_bytes
        disk_bytes = max(missing, 0)
        disk_bytes += -disk_bytes % options.extent_bytes
    if disk_bytes > 0 and options.disk_path is None:
        raise InvalidArgument("disk_capacity without disk_path: name a folder for the scratch file")
    return replace(
        options,
        device_capacity_bytes=device_bytes,
        host_capacity_bytes=host_bytes,
        disk_capacity_bytes=disk_bytes,
        disk_path=options.disk_path if disk_bytes > 0 else None,
    )

"""The declarations of ``kvtier.h`` for ctypes: the only module that knows struct layouts.

Every struct here repeats one of the header field by field; ``tests/python/test_abi.py`` compares
sizes and offsets with what a C compiler makes of the header.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from ctypes import (
    CFUNCTYPE,
    POINTER,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_size_t,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any

from .errors import BY_STATUS, Internal, InvalidArgument

# Of the header that these declarations follow; the first two parts must agree with the library's.
VERSION = (0, 1)

F16, BF16, F32 = 0, 1, 2
REDUCTIONS = {"max": 0, "sum": 1, "mean": 2}
RESTS = {"measured": 0, "always": 1, "never": 2}
VERIFIES = {"arrivals": 0, "all": 1}
DURABILITIES = {"none": 0, "clean": 1, "crash": 2, "power": 3}
DTYPES = {"float16": F16, "bfloat16": BF16, "float32": F32}
DTYPE_NAMES = {number: name for name, number in DTYPES.items()}
DTYPE_BYTES = {F16: 2, BF16: 2, F32: 4}
EVERY_QUERY = 0xFFFFFFFF

Logger = CFUNCTYPE(None, c_void_p, c_char_p)


class Struct(ctypes.Structure):
    """A struct whose first field is its own size."""

    def __init__(self) -> None:
        super().__init__()
        self.struct_size = ctypes.sizeof(self)


class Options(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("dtype", c_int),
        ("layers", c_uint32),
        ("query_heads", c_uint32),
        ("kv_heads", c_uint32),
        ("head_dim", c_uint32),
        ("value_dim", c_uint32),
        ("softmax_scale", c_float),
        ("logit_cap", c_float),
        ("sink_logits", POINTER(c_float)),
        ("rope_theta", c_double),
        ("rope_dims", c_uint32),
        ("tokens_per_block", c_uint32),
        ("kv_heads_per_block", c_uint32),
        ("extent_bytes", c_size_t),
        ("selector", c_char_p),
        ("reduction", c_int),
        ("sinks", c_uint32),
        ("window", c_uint32),
        ("rest", c_int),
        ("eviction", c_char_p),
        ("look_ahead_bytes", c_uint64),
        ("verify", c_int),
        ("deterministic", c_int),
        ("seed", c_uint64),
        ("threads", c_uint32),
        ("tokens_max", c_uint32),
        ("sequences_max", c_uint32),
        ("device_capacity_bytes", c_uint64),
        ("host_capacity_bytes", c_uint64),
        ("disk_capacity_bytes", c_uint64),
        ("disk_path", c_char_p),
        ("device_allocator", c_void_p),
        ("host_allocator", c_void_p),
        ("logger", Logger),
        ("logger_context", c_void_p),
        ("timeline_events", c_uint32),
        ("measure_interval", c_uint32),
    ]


class Needs(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("device_bytes", c_uint64),
        ("host_bytes", c_uint64),
        ("host_reserve_bytes", c_uint64),
        ("extent_bytes_total", c_uint64),
        ("device_bytes_all", c_uint64),
    ]


class Rows(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_token_stride", c_size_t),
        ("key_head_stride", c_size_t),
        ("value_token_stride", c_size_t),
        ("value_head_stride", c_size_t),
        ("tokens", c_uint32),
        ("marks", c_void_p),
        ("memory", c_int),
        ("reserved", c_uint32),
        ("stream", c_void_p),
    ]


class Query(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("layer", c_uint32),
        ("query_count", c_uint32),
        ("queries", c_void_p),
        ("out", c_void_p),
        ("lse", c_void_p),
        ("dtype", c_int),
        ("budget_tokens", c_uint32),
        ("own_selection", c_int),
        ("external_scores", c_void_p),
        ("external_stride", c_size_t),
        ("external_tokens", c_uint32),
        ("memory", c_int),
        ("stream", c_void_p),
    ]


class Report(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("attended_tokens_max", c_uint32),
        ("attended_tokens_total", c_uint64),
        ("metadata_bytes", c_uint64),
        ("rows_estimated", c_uint32),
        ("failures", c_uint32),
        ("waits", c_uint32),
        ("select_s", c_double),
        ("resolve_s", c_double),
        ("fetch_s", c_double),
        ("attend_s", c_double),
        ("merge_s", c_double),
        ("rest_s", c_double),
        ("look_ahead_s", c_double),
        ("total_s", c_double),
    ]


class Range(ctypes.Structure):
    _fields_ = [
        ("head_group", c_uint32),
        ("block", c_uint32),
        ("first_token", c_uint32),
        ("tokens", c_uint32),
        ("slot", c_uint32),
        ("query", c_uint32),
    ]


class TierStats(ctypes.Structure):
    _fields_ = [
        ("capacity_bytes", c_uint64),
        ("used_bytes", c_uint64),
        ("peak_bytes", c_uint64),
        ("hits", c_uint64),
        ("held_hits", c_uint64),
        ("evictions", c_uint64),
    ]


class Stats(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("device", TierStats),
        ("host", TierStats),
        ("disk", TierStats),
        ("disk_to_host_bytes", c_uint64),
        ("host_to_device_bytes", c_uint64),
        ("device_to_host_bytes", c_uint64),
        ("host_to_disk_bytes", c_uint64),
        ("blocks_verified", c_uint64),
        ("blocks_mismatched", c_uint64),
        ("blocks_recovered", c_uint64),
        ("blocks_failed", c_uint64),
        ("prefetch_issued_bytes", c_uint64),
        ("prefetch_useful_bytes", c_uint64),
        ("prefetch_wasted_bytes", c_uint64),
        ("prefetch_late", c_uint64),
        ("metadata_bytes", c_uint64),
        ("steps", c_uint64),
        ("exact_steps", c_uint64),
        ("steps_measured", c_uint64),
    ]


class SequenceStats(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("blocks", c_uint64),
        ("blocks_resident", c_uint64),
        ("device_bytes", c_uint64),
        ("host_bytes", c_uint64),
        ("disk_bytes", c_uint64),
        ("shared_bytes", c_uint64),
        ("metadata_bytes", c_uint64),
    ]


class StoreOptions(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("path", c_char_p),
        ("capacity_bytes", c_uint64),
        ("free_bytes_min", c_uint64),
        ("durability", c_int),
        ("model", c_char_p),
        ("tenant_salt", c_char_p),
        ("key_file", c_char_p),
        ("read_only", c_int),
    ]


class StoreStats(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("tokens_per_run", c_uint32),
        ("items", c_uint64),
        ("capacity_bytes", c_uint64),
        ("data_bytes", c_uint64),
        ("free_bytes", c_uint64),
        ("written_bytes", c_uint64),
        ("read_bytes", c_uint64),
        ("evicted_items", c_uint64),
        ("blocks_verified", c_uint64),
        ("blocks_corrupt", c_uint64),
        ("read_failures", c_uint64),
        ("write_failures", c_uint64),
    ]


STRUCTS: dict[str, type[ctypes.Structure]] = {
    "kvtier_options": Options,
    "kvtier_needs": Needs,
    "kvtier_rows": Rows,
    "kvtier_query": Query,
    "kvtier_report": Report,
    "kvtier_range": Range,
    "kvtier_tier_stats": TierStats,
    "kvtier_stats": Stats,
    "kvtier_sequence_stats": SequenceStats,
    "kvtier_store_options": StoreOptions,
    "kvtier_store_stats": StoreStats,
}

_RUNTIME, _SEQUENCE = c_void_p, c_uint64
# name: (result, arguments); a result of None is a status that becomes an exception.
_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "kvtier_version": (c_uint32, []),
    "kvtier_version_string": (c_char_p, []),
    "kvtier_struct_size": (c_size_t, [c_char_p]),
    "kvtier_has_feature": (c_int, [c_char_p]),
    "kvtier_last_error": (c_char_p, []),
    "kvtier_failure_text": (c_char_p, [_RUNTIME, c_uint32]),
    "kvtier_list_selectors": (None, [c_char_p, c_size_t, POINTER(c_size_t)]),
    "kvtier_options_init": (None, [POINTER(Options), c_size_t]),
    "kvtier_runtime_needs": (None, [POINTER(Options), POINTER(Needs)]),
    "kvtier_runtime_open": (None, [POINTER(Options), POINTER(c_void_p)]),
    "kvtier_runtime_close": (None, [_RUNTIME]),
    "kvtier_sequence_create": (None, [_RUNTIME, POINTER(_SEQUENCE)]),
    "kvtier_sequence_fork": (None, [_RUNTIME, _SEQUENCE, c_uint32, POINTER(_SEQUENCE)]),
    "kvtier_sequence_free": (None, [_RUNTIME, _SEQUENCE]),
    "kvtier_sequence_tokens": (None, [_RUNTIME, _SEQUENCE, c_uint32, POINTER(c_uint32)]),
    "kvtier_append": (None, [_RUNTIME, _SEQUENCE, c_uint32, POINTER(Rows)]),
    "kvtier_truncate": (None, [_RUNTIME, _SEQUENCE, c_uint32]),
    "kvtier_observe_prompt": (
        None,
        [_RUNTIME, _SEQUENCE, c_uint32, c_void_p, c_void_p, c_uint32],
    ),
    "kvtier_query_init": (None, [POINTER(Query), c_size_t]),
    "kvtier_step": (None, [_RUNTIME, _SEQUENCE, POINTER(Query), POINTER(Report)]),
    "kvtier_attend_exact": (None, [_RUNTIME, _SEQUENCE, POINTER(Query), POINTER(Report)]),
    "kvtier_hint": (None, [_RUNTIME, _SEQUENCE, POINTER(Query)]),
    "kvtier_attended": (None, [_RUNTIME, POINTER(Range), c_uint32, POINTER(c_uint32)]),
    "kvtier_store_options_init": (None, [POINTER(StoreOptions), c_size_t]),
    "kvtier_store_open": (None, [_RUNTIME, POINTER(StoreOptions)]),
    "kvtier_store_close": (None, [_RUNTIME]),
    "kvtier_sequence_save": (
        None,
        [_RUNTIME, _SEQUENCE, c_void_p, c_uint32, c_double, POINTER(c_uint32)],
    ),
    "kvtier_sequence_restore": (
        None,
        [_RUNTIME, c_void_p, c_uint32, POINTER(_SEQUENCE), POINTER(c_uint32)],
    ),
    "kvtier_store_forget": (None, [_RUNTIME, c_void_p, c_uint32]),
    "kvtier_get_store_stats": (None, [_RUNTIME, POINTER(StoreStats)]),
    "kvtier_get_stats": (None, [_RUNTIME, POINTER(Stats)]),
    "kvtier_get_stats_json": (None, [_RUNTIME, c_char_p, c_size_t, POINTER(c_size_t)]),
    "kvtier_get_sequence_stats": (None, [_RUNTIME, _SEQUENCE, POINTER(SequenceStats)]),
    "kvtier_write_timeline": (None, [_RUNTIME, c_char_p]),
}


class Library:
    """The loaded library; a function that fails raises what ``kvtier_last_error`` says."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._loaded = ctypes.CDLL(path)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self._loaded, name)
            function.argtypes = arguments
            function.restype = c_int if result is None else result
            if result is None:
                function.errcheck = self._check
            # Without the prefix: library.append, library.step, ...
            setattr(self, name.removeprefix("kvtier_"), function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"kvtier_{name} is not among the declarations of this module")

    def _check(self, status: int, function: object, arguments: object) -> None:
        if status == 0:
            return
        message = self._loaded.kvtier_last_error().decode("utf-8", "replace")
        raise BY_STATUS.get(status, Internal)(message)

    def text(self, function: object, *arguments: object) -> str:
        """What a function writes that tells how much room it needs."""
        needed = c_size_t(4096)
        for _ in range(4):
            room = ctypes.create_string_buffer(max(needed.value, 1))
            size = len(room)
            try:
                function(*arguments, room, size, ctypes.byref(needed))  # type: ignore[operator]
            except BY_STATUS[2]:
                if needed.value <= size:
                    raise
                continue
            return room.value.decode()
        raise Internal("a text of the library grows faster than it can be read")


def _candidates() -> list[str]:
    chosen = os.environ.get("KVTIER_LIBRARY")
    if chosen:
        return [chosen]
    inside = Path(__file__).parent / "lib"
    found = [str(path) for path in sorted(inside.glob("libkvtier.so*"))]
    system = ctypes.util.find_library("kvtier")
    return found + ([system] if system else [])


def load() -> Library:
    """Loads the library: ``KVTIER_LIBRARY`` if set, else the one inside the package, else the
    system's."""
    candidates = _candidates()
    if not candidates:
        raise ImportError(
            "libkvtier.so was not found: install the wheel (pip install .), or set KVTIER_LIBRARY "
            "to the library"
        )
    library = Library(candidates[0])
    number = library.version()
    if (number // 10000, number // 100 % 100) != VERSION:
        raise ImportError(
            f"{library.path} is version {number // 10000}.{number // 100 % 100}, this package is "
            f"for {VERSION[0]}.{VERSION[1]}"
        )
    return library


def choice(name: str, value: str, among: dict[str, int]) -> int:
    """The number of a named choice, or an error that lists the names."""
    if value not in among:
        raise InvalidArgument(f"{name} is {value!r}, expected one of {', '.join(among)}")
    return among[value]


def as_dict(struct: ctypes.Structure) -> dict[str, Any]:
    """The fields of a struct, those of structs within it likewise, without sizes."""
    values = ((name, getattr(struct, name)) for name, *_ in struct._fields_)
    inner = {n: as_dict(v) if isinstance(v, ctypes.Structure) else v for n, v in values}
    return {name: value for name, value in inner.items() if name != "struct_size"}

"""A runtime and its sequences: thin over the C ABI.

Threads: as the C ABI has it. One call at a time on a runtime and its sequences, from any thread; a
call that meets another raises :class:`Busy` and changes nothing. The interpreter lock is released
during calls.
"""

from __future__ import annotations

import ctypes
import json
import os
import weakref
from types import TracebackType
from typing import Any

import numpy as np

from . import _abi, _arrays
from .errors import Busy, Error, InvalidArgument
from .options import Options, to_struct


def _close(library: _abi.Library, handle: int) -> None:
    # At collection there is nobody to tell of a disk write that failed.
    try:
        library.runtime_close(handle)
    except Exception:  # noqa: BLE001
        pass


class Runtime:
    """Takes all memory and disk space at once, and gives it back in :meth:`close`."""

    def __init__(self, options: Options) -> None:
        from . import library

        self.options = options
        self._library: Any = library()
        struct, self._keep = to_struct(self._library, options)
        handle = ctypes.c_void_p()
        self._library.runtime_open(ctypes.byref(struct), ctypes.byref(handle))
        assert handle.value is not None
        self._handle: int = handle.value
        self._finalizer = weakref.finalize(self, _close, self._library, self._handle)
        self.dtype = _abi.DTYPES[options.dtype]
        self.value_dim = options.value_dim or options.head_dim

    @property
    def handle(self) -> int:
        if not self._finalizer.alive:
            raise InvalidArgument("the runtime is closed")
        return self._handle

    def create_sequence(self) -> Sequence:
        """An empty sequence. :class:`NoSpace` when ``sequences_max`` are open."""
        sequence = ctypes.c_uint64()
        self._library.sequence_create(self.handle, ctypes.byref(sequence))
        return Sequence(self, sequence.value)

    def stats(self) -> dict[str, Any]:
        """Counters since open: tiers, bytes moved, verification, look-ahead."""
        found = _abi.Stats()
        self._library.get_stats(self.handle, ctypes.byref(found))
        return _abi.as_dict(found)

    def stats_json(self) -> dict[str, Any]:
        """The same and more, as the library words it."""
        return json.loads(self._library.text(self._library.get_stats_json, self.handle))

    def attended(self) -> list[dict[str, int]]:
        """What the last step attended: ranges of tokens within blocks, by head group."""
        count = ctypes.c_uint32()
        self._library.attended(self.handle, None, 0, ctypes.byref(count))
        ranges = (_abi.Range * max(count.value, 1))()
        self._library.attended(self.handle, ranges, count.value, ctypes.byref(count))
        return [_abi.as_dict(item) for item in ranges[: count.value]]

    def failures(self) -> list[str]:
        """One line per block that the last call could not have."""
        lines: list[str] = []
        while True:
            text = self._library.failure_text(self.handle, len(lines))
            if text is None:
                return lines
            lines.append(text.decode("utf-8", "replace"))

    # ---- Prefixes that outlive the process ----------------------------------------------------

    def open_store(
        self,
        path: str | os.PathLike[str],
        *,
        model: str,
        capacity_bytes: int = 0,
        tenant_salt: str | None = None,
        durability: str = "crash",
        key_file: str | os.PathLike[str] | None = None,
        free_bytes_min: int | None = None,
        read_only: bool = False,
    ) -> None:
        """Opens the prefix store in the folder ``path``, or makes one of ``capacity_bytes`` (0: as
        found). One store per runtime, one process per path: :class:`Busy` otherwise.

        ``model`` names the model, its weights and whatever else KV depends on; what was saved under
        another name, another ``tenant_salt`` (a secret of the tenant) or another layout is not
        found. ``durability`` is what a save promises: "none" (gone with the process), "clean"
        (there after a clean close), "crash" (after a kill) or "power" (after a power failure).
        ``key_file`` holds 64 bytes for AES-256-XTS. ``free_bytes_min`` must stay free on the file
        system besides; None: 1 GiB.
        """
        struct = _abi.StoreOptions()
        self._library.store_options_init(ctypes.byref(struct), ctypes.sizeof(struct))
        struct.path = os.fspath(path).encode()
        struct.model = model.encode()
        struct.durability = _abi.choice("durability", durability, _abi.DURABILITIES)
        struct.read_only = int(read_only)
        if tenant_salt is not None:
            struct.tenant_salt = tenant_salt.encode()
        if key_file is not None:
            struct.key_file = os.fspath(key_file).encode()
        for name, size in (("capacity_bytes", capacity_bytes), ("free_bytes_min", free_bytes_min)):
            if size is not None and size < 0:
                raise InvalidArgument(f"{name} is {size}, expected 0 or more")
            if size is not None:
                setattr(struct, name, size)
        self._library.store_open(self.handle, ctypes.byref(struct))

    def close_store(self) -> None:
        """Ends the store cleanly, so that another runtime may open it; :meth:`close` does so too.
        Nothing happens when none is open."""
        self._library.store_close(self.handle)

    def restore(self, token_ids: Any) -> tuple[Sequence, int]:
        """A sequence that begins with the longest stored prefix of ``token_ids``, and how many
        tokens that is; 0 and an empty sequence when nothing was found. Every block is verified;
        damage ends the prefix before it."""
        ids = _arrays.token_ids(token_ids)
        sequence, tokens = ctypes.c_uint64(), ctypes.c_uint32()
        self._library.sequence_restore(
            self.handle, ids.ctypes.data, len(ids), ctypes.byref(sequence), ctypes.byref(tokens)
        )
        return Sequence(self, sequence.value), tokens.value

    def forget(self, token_ids: Any) -> None:
        """Gives up one save of these tokens; what other saves share stays. :class:`NotFound` when
        they are not stored."""
        ids = _arrays.token_ids(token_ids)
        self._library.store_forget(self.handle, ids.ctypes.data, len(ids))

    def store_stats(self) -> dict[str, int]:
        """Of the open store: ``tokens_per_run`` (what is saved comes in whole runs), space, bytes
        moved, blocks verified."""
        found = _abi.StoreStats()
        self._library.get_store_stats(self.handle, ctypes.byref(found))
        return _abi.as_dict(found)

    def write_timeline(self, path: str) -> None:
        """Chrome trace events of what happened so far; needs ``timeline_events``."""
        self._library.write_timeline(self.handle, str(path).encode())

    def close(self) -> None:
        """Frees all sequences and everything else, even where it raises: a disk write that failed
        for good. :class:`Busy`, and nothing is freed, during another call. A second call does
        nothing."""
        if not self._finalizer.alive:
            return
        try:
            self._library.runtime_close(self._handle)
        except Busy:
            raise
        except Error:
            self._finalizer.detach()
            raise
        self._finalizer.detach()

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Sequence:
    """One request's tokens. Made by a runtime; freed with it at the latest."""

    def __init__(self, runtime: Runtime, handle: int) -> None:
        self.runtime = runtime
        self._library = runtime._library
        self._handle = handle
        self._report = _abi.Report()

    def append(self, layer: int, keys: Any, values: Any, marks: Any = None) -> None:
        """Appends to one layer: ``keys`` [tokens, kv_heads, head_dim] and ``values`` [tokens,
        kv_heads, value_dim] in the runtime's dtype, any strides but for the last dimension. Copied
        by the library, not here. ``marks`` [tokens] uint8, bits: 1 ends a sentence, 2 is a
        landmark."""
        options = self.runtime.options
        key = self._rows("keys", keys, options.head_dim)
        value = self._rows("values", values, self.runtime.value_dim)
        if key.shape[0] != value.shape[0]:
            raise InvalidArgument(f"{key.shape[0]} keys and {value.shape[0]} values")
        rows = _abi.Rows()
        rows.keys, rows.values = key.pointer, value.pointer
        rows.key_token_stride, rows.key_head_stride = key.strides[0], key.strides[1]
        rows.value_token_stride, rows.value_head_stride = value.strides[0], value.strides[1]
        rows.tokens = key.shape[0]
        if marks is not None:
            marks = np.ascontiguousarray(marks, dtype=np.uint8)
            if marks.shape != (key.shape[0],):
                raise InvalidArgument(f"marks has shape {list(marks.shape)}, expected [tokens]")
            rows.marks = marks.ctypes.data
        self._library.append(self.runtime.handle, self._handle, layer, ctypes.byref(rows))

    def _rows(self, name: str, array: Any, dim: int) -> _arrays.View:
        found = _arrays.view(name, array, "tokens, kv_heads, dim")
        heads = self.runtime.options.kv_heads
        if found.shape[1:] != (heads, dim):
            raise InvalidArgument(
                f"{name} has shape {list(found.shape)}, expected [tokens, {heads}, {dim}]"
            )
        if found.dtype != self.runtime.dtype:
            raise InvalidArgument(
                f"{name} is {_abi.DTYPE_NAMES[found.dtype]}, the runtime was opened for "
                f"{self.runtime.options.dtype}"
            )
        return found

    def step(
        self,
        layer: int,
        queries: Any,
        budget_tokens: int,
        *,
        out: Any = None,
        lse: np.ndarray | None = None,
        own_selection: bool = False,
        external_scores: np.ndarray | None = None,
    ) -> Any:
        """Attends what is selected within ``budget_tokens``: ``queries`` [count, query_heads,
        head_dim] of the newest tokens, in float32, float16 or bfloat16. Returns ``out`` [count,
        query_heads, value_dim], made if not given, of the same kind and dtype. ``external_scores``
        [head groups or 1, tokens] float32, for the selector ``external``."""
        query, out = self._query(layer, queries, out, lse)
        query.budget_tokens = budget_tokens
        query.own_selection = int(own_selection)
        keep = self._external(query, external_scores)
        self._library.step(
            self.runtime.handle, self._handle, ctypes.byref(query), ctypes.byref(self._report)
        )
        del keep
        return out

    def attend(
        self, layer: int, queries: Any, *, out: Any = None, lse: np.ndarray | None = None
    ) -> Any:
        """Exact causal attention of the newest ``count`` tokens over every token; see
        :meth:`step` for shapes."""
        query, out = self._query(layer, queries, out, lse)
        self._library.attend_exact(
            self.runtime.handle, self._handle, ctypes.byref(query), ctypes.byref(self._report)
        )
        return out

    def hint(self, layer: int, queries: Any, budget_tokens: int) -> None:
        """Promotes from disk to host what the layer would select for a guess at its queries."""
        query, _ = self._query(layer, queries, None, None)
        query.budget_tokens = budget_tokens
        self._library.hint(self.runtime.handle, self._handle, ctypes.byref(query))

    def _query(
        self, layer: int, queries: Any, out: Any, lse: np.ndarray | None
    ) -> tuple[_abi.Query, Any]:
        options = self.runtime.options
        asked = _arrays.view("queries", queries, "count, query_heads, head_dim")
        if asked.shape[1:] != (options.query_heads, options.head_dim):
            raise InvalidArgument(
                f"queries has shape {list(asked.shape)}, expected [count, {options.query_heads}, "
                f"{options.head_dim}]"
            )
        if not asked.contiguous:
            raise InvalidArgument("queries is not contiguous: pass a contiguous copy")
        shape = (asked.shape[0], options.query_heads, self.runtime.value_dim)
        if out is None:
            out = _arrays.empty_like(queries, shape)
        answer = _arrays.view("out", out, "count, query_heads, value_dim")
        if answer.shape != shape or answer.dtype != asked.dtype or not answer.contiguous:
            raise InvalidArgument(
                f"out must be contiguous, {_abi.DTYPE_NAMES[asked.dtype]} and of shape "
                f"{list(shape)}"
            )
        query = _abi.Query()
        query.layer, query.query_count = layer, asked.shape[0]
        query.queries, query.out, query.dtype = asked.pointer, answer.pointer, asked.dtype
        if lse is not None:
            if lse.dtype != np.float32 or lse.shape != shape[:2] or not lse.flags.c_contiguous:
                raise InvalidArgument(f"lse must be float32, contiguous, of shape {shape[:2]}")
            query.lse = lse.ctypes.data
        return query, out

    def _external(self, query: _abi.Query, scores: np.ndarray | None) -> Any:
        if scores is None:
            return None
        scores = np.ascontiguousarray(scores, dtype=np.float32)
        if scores.ndim != 2:
            raise InvalidArgument("external_scores must be [head groups or 1, tokens]")
        query.external_scores = scores.ctypes.data
        query.external_stride = 0 if scores.shape[0] == 1 else scores.shape[1]
        query.external_tokens = scores.shape[1]
        return scores

    def observe_prompt(self, layer: int, queries: Any, positions: Any) -> None:
        """Shows the selector what prompt tokens looked for: ``queries`` [count, query_heads,
        head_dim] float32 at ascending ``positions``."""
        asked = _arrays.view("queries", queries, "count, query_heads, head_dim")
        places = np.ascontiguousarray(positions, dtype=np.uint32)
        if asked.dtype != _abi.F32 or not asked.contiguous or places.shape != asked.shape[:1]:
            raise InvalidArgument("queries must be float32 and contiguous, with one position each")
        self._library.observe_prompt(
            self.runtime.handle, self._handle, layer, asked.pointer, places.ctypes.data, len(places)
        )

    def tokens(self, layer: int = 0) -> int:
        """Tokens appended to a layer so far."""
        count = ctypes.c_uint32()
        self._library.sequence_tokens(
            self.runtime.handle, self._handle, layer, ctypes.byref(count)
        )
        return count.value

    def truncate(self, tokens: int) -> None:
        """Forgets the tokens from ``tokens`` on in every layer."""
        self._library.truncate(self.runtime.handle, self._handle, tokens)

    def fork(self, tokens: int | None = None) -> Sequence:
        """A new sequence with the first ``tokens`` (all by default) tokens of this one."""
        child = ctypes.c_uint64()
        count = self.tokens() if tokens is None else tokens
        self._library.sequence_fork(
            self.runtime.handle, self._handle, count, ctypes.byref(child)
        )
        return Sequence(self.runtime, child.value)

    def save(self, token_ids: Any, *, value: float = 1.0) -> int:
        """Saves the first ``len(token_ids)`` tokens, whose ids these are, to the runtime's store,
        and returns how many of them: whole runs of ``store_stats()["tokens_per_run"]``. Runs that
        are stored already are shared. When the store is full, what has the least ``value`` goes
        first."""
        ids = _arrays.token_ids(token_ids)
        saved = ctypes.c_uint32()
        self._library.sequence_save(
            self.runtime.handle, self._handle, ids.ctypes.data, len(ids), value, ctypes.byref(saved)
        )
        return saved.value

    @property
    def report(self) -> dict[str, Any]:
        """What the last :meth:`step` or :meth:`attend` of this sequence did."""
        return _abi.as_dict(self._report)

    def stats(self) -> dict[str, int]:
        """What this sequence occupies, by tier."""
        found = _abi.SequenceStats()
        self._library.get_sequence_stats(
            self.runtime.handle, self._handle, ctypes.byref(found)
        )
        return _abi.as_dict(found)

    def free(self) -> None:
        """Gives back what no other sequence shares. A second call, or one after the runtime was
        closed, does nothing."""
        handle, self._handle = self._handle, 0
        if handle and not self.runtime.closed:
            self._library.sequence_free(self.runtime.handle, handle)

    def __enter__(self) -> Sequence:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.free()

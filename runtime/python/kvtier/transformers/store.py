"""The rows of a batch as sequences of one runtime, opened when the first keys show their shape.

A row's positions are the engine's affair; the runtime sees tokens. ``_kept`` maps one to the other:
padding is a position without a token, so it is neither stored nor attended.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .. import selectors
from ..errors import Error, InvalidArgument, Unsupported
from ..options import Capacity, Options, with_capacities
from ..runtime import Runtime, Sequence
from . import families

# Queries that one step of the library takes; kernels/partial_attention.h.
STEP_QUERIES_MAX = 8
# How many of a prompt's last queries are shown to selectors that observe the prompt.
_OBSERVED_QUERIES = 64

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class StoreOptions:
    """What the user chose; the rest of :class:`kvtier.Options` follows from the model."""

    tokens_max: int
    device_capacity: Capacity
    host_capacity: Capacity
    disk_path: str | None
    disk_capacity: Capacity | None
    selector: str | None
    budget: float | int
    exact_above: int
    own_selection: bool
    sequences_max: int | None
    dtype: str | None
    runtime: dict[str, Any]  # Further fields of `kvtier.Options`.


@dataclasses.dataclass
class Call:
    """One layer's keys, on their way from ``update`` to the attention that follows it."""

    store: Store
    layer: int    # Of the runtime.
    begin: int    # Position of the first of `keys`.
    keys: torch.Tensor
    values: torch.Tensor
    appended: bool = False

    @property
    def end(self) -> int:
        return self.begin + self.keys.shape[2]

    def take(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """What the model made of the keys in between: with latent attention the latents become
        keys and values of every head."""
        if keys.shape[2] != self.keys.shape[2]:
            raise Unsupported(
                f"the model attends {keys.shape[2]} tokens where it stored {self.keys.shape[2]}"
            )
        self.keys, self.values = keys, values


class Store:
    """One runtime for the tiered layers of one cache. One thread at a time."""

    def __init__(
        self,
        options: StoreOptions,
        layers: int,
        family: families.Family,
        sinks: list[torch.Tensor] | None,
    ) -> None:
        self.options = options
        self.layers = layers
        self.family = family
        self.runtime: Runtime | None = None
        self.sequences: list[Sequence] = []
        self.exact_calls = self.selected_calls = self.stock_calls = 0
        self.attended_tokens = self.visible_tokens = 0
        # Called after each step that selected, with the layer and its queries: for recall.
        self.probe: Callable[[Runtime, int, torch.Tensor], None] | None = None
        self._sinks = sinks
        self._kept: np.ndarray = np.zeros((0, 0), dtype=bool)  # [rows, positions]
        self._scale = 0.0
        self._cap = 0.0
        self._observes = False
        self._prefixes = False  # Whether the runtime's prefix store is open.

    # ---- Attention ---------------------------------------------------------------------------

    def attend(
        self,
        call: Call,
        query: torch.Tensor,
        padding: torch.Tensor | None,
        scaling: float | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Appends the call's keys, unless that was done, and attends them: ``query`` [rows,
        query_heads, count, head_dim] -> [rows, count, query_heads, value_dim]."""
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        if self.runtime is None:
            self._open(call, query, scale, softcap or 0.0)
        assert self.runtime is not None
        self._check(query, softcap or 0.0, sinks)
        if not call.appended:
            self._note_padding(call, padding)
            self._append(call)
        if scale != self._scale:
            query = query * (scale / self._scale)
        rows, heads, count, _ = query.shape
        out = query.new_empty((rows, count, heads, self.runtime.value_dim))
        for row, sequence in enumerate(self.sequences):
            kept = self._kept[row, call.end - count : call.end]
            asked = query[row].transpose(0, 1)
            if kept.all():
                self._attend_row(sequence, call.layer, asked.contiguous(), out[row])
                continue
            # Nobody reads what padding attends; it must only be finite.
            out[row].zero_()
            if kept.any():
                places = torch.from_numpy(np.flatnonzero(kept))
                answer = torch.empty_like(out[row][places])
                self._attend_row(sequence, call.layer, asked[places].contiguous(), answer)
                out[row][places] = answer
        return out

    def _attend_row(
        self, sequence: Sequence, layer: int, queries: torch.Tensor, out: torch.Tensor
    ) -> None:
        count, tokens = queries.shape[0], sequence.tokens(layer)
        if count > self.options.exact_above:
            if self._observes:
                last = min(count, _OBSERVED_QUERIES)
                positions = np.arange(tokens - last, tokens)
                sequence.observe_prompt(layer, queries[count - last :].float(), positions)
            sequence.attend(layer, queries, out=out)
            self.exact_calls += 1
            return
        sequence.step(
            layer,
            queries,
            self._budget(tokens),
            out=out,
            own_selection=self.options.own_selection and count > 1,
        )
        self.selected_calls += 1
        self.attended_tokens += sequence._report.attended_tokens_max
        self.visible_tokens += tokens
        if self.probe is not None:
            assert self.runtime is not None
            self.probe(self.runtime, layer, queries)

    def is_exact(self, count: int) -> bool:
        """Whether a forward of that many new tokens attends everything."""
        return count > self.options.exact_above or self.options.budget == 1.0

    def _budget(self, tokens: int) -> int:
        """In tokens. Never below what every step attends: sinks and window."""
        assert self.runtime is not None
        budget = self.options.budget
        wanted = math.ceil(budget * tokens) if isinstance(budget, float) else budget
        floor = self.runtime.options.sinks + self.runtime.options.window
        return max(min(wanted, tokens), floor)

    def _check(self, query: torch.Tensor, softcap: float, sinks: torch.Tensor | None) -> None:
        if softcap != self._cap:
            raise Unsupported(
                f"layers differ in their soft-capping ({softcap} and {self._cap}): exempt some"
            )
        if (sinks is not None) != (self._sinks is not None):
            raise Unsupported("sink logits reach the attention that the model's layers do not show")
        if query.shape[0] != len(self.sequences):
            raise InvalidArgument(
                f"a batch of {query.shape[0]} meets a cache of {len(self.sequences)} sequences"
            )

    def _open(self, call: Call, query: torch.Tensor, scale: float, softcap: float) -> None:
        rows, kv_heads, _, head_dim = call.keys.shape
        value_dim = call.values.shape[-1]
        families.check_shape(query.shape[1], kv_heads, head_dim, value_dim)
        chosen = self.options
        dtype = chosen.dtype or _DTYPES.get(call.keys.dtype)
        if dtype is None:
            raise Unsupported(f"keys are {call.keys.dtype}: pass dtype= to store them as another")
        further = {"rope_theta": self.family.rope_theta, **chosen.runtime}
        sinks = None
        if self._sinks is not None:
            sinks = [layer.detach().float().tolist() for layer in self._sinks]
        options = Options(
            query_heads=query.shape[1],
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            layers=self.layers,
            dtype=dtype,
            softmax_scale=scale,
            logit_cap=softcap,
            sink_logits=sinks,
            selector=chosen.selector,
            tokens_max=chosen.tokens_max,
            sequences_max=chosen.sequences_max or rows,
            disk_path=chosen.disk_path,
            **further,
        )
        options = with_capacities(
            options, chosen.device_capacity, chosen.host_capacity, chosen.disk_capacity
        )
        self.runtime = Runtime(options)
        self.sequences = [self.runtime.create_sequence() for _ in range(rows)]
        self._kept = np.zeros((rows, 0), dtype=bool)
        self._scale, self._cap = scale, softcap
        self._observes = _observes_prompt(chosen.selector)

    def _note_padding(self, call: Call, padding: torch.Tensor | None) -> None:
        """Learns from the first layer of a forward which new positions are padding, and checks that
        the others, and the past, agree."""
        rows = len(self.sequences)
        if padding is None:
            seen = np.ones((rows, call.end), dtype=bool)
        else:
            if padding.shape[0] != rows or padding.shape[1] < call.end:
                raise InvalidArgument(
                    f"attention_mask has shape {list(padding.shape)}, expected [{rows}, "
                    f"{call.end}]: the cache's tokens and the new ones"
                )
            seen = padding[:, : call.end].bool().cpu().numpy()
        known = self._kept.shape[1]
        if not np.array_equal(seen[:, :known], self._kept[:, : call.end]):
            raise InvalidArgument(
                "attention_mask differs from the one under which these tokens were stored: what "
                "was padding then is a token now, or the other way round"
            )
        if known < call.end:
            self._kept = np.concatenate([self._kept, seen[:, known:]], axis=1)

    def _append(self, call: Call) -> None:
        assert self.runtime is not None
        dtype = _TORCH_DTYPES[self.runtime.options.dtype]
        keys, values = call.keys, call.values
        if keys.shape[1] != self.runtime.options.kv_heads:
            raise Unsupported(
                f"layers differ in their KV heads ({keys.shape[1]} and "
                f"{self.runtime.options.kv_heads}): exempt some"
            )
        keys, values = keys.detach().to(dtype), values.detach().to(dtype)
        for row, sequence in enumerate(self.sequences):
            kept = self._kept[row, call.begin : call.end]
            key, value = keys[row].transpose(0, 1), values[row].transpose(0, 1)
            if not kept.all():
                if not kept.any():
                    continue
                places = torch.from_numpy(np.flatnonzero(kept))
                key, value = key[places], value[places]
            if key.stride(-1) != 1 or value.stride(-1) != 1:
                key, value = key.contiguous(), value.contiguous()
            sequence.append(call.layer, key, value)
        call.appended = True

    # ---- Rows and positions ------------------------------------------------------------------

    def truncate(self, positions: int) -> None:
        """Forgets every position from ``positions`` on, in every layer."""
        self._kept = self._kept[:, :positions]
        for row, sequence in enumerate(self.sequences):
            sequence.truncate(int(self._kept[row].sum()))

    def select_rows(self, parents: list[int]) -> None:
        """Row i continues what was row ``parents[i]``: beams. A parent is its own first successor,
        the others fork; rows without a successor are freed first."""
        if self.runtime is None or parents == list(range(len(self.sequences))):
            return
        wanted = set(parents)
        for row, sequence in enumerate(self.sequences):
            if row not in wanted:
                sequence.free()
        taken: set[int] = set()
        successors: list[Sequence] = []
        for parent in parents:
            source = self.sequences[parent]
            successors.append(source.fork() if parent in taken else source)
            taken.add(parent)
        self.sequences = successors
        self._kept = self._kept[parents]

    # ---- Prefixes that outlive the process ---------------------------------------------------

    def open_prefixes(self, path: str | os.PathLike[str], **options: Any) -> None:
        assert self.runtime is not None
        self._one_row()
        self.runtime.open_store(path, **options)
        self._prefixes = True

    def close_prefixes(self) -> None:
        if self.runtime is not None:
            self.runtime.close_store()
        self._prefixes = False

    def save(self, ids: np.ndarray, value: float) -> int:
        """``ids`` by position, padding included; behind what is stored they do not matter."""
        sequence = self._one_row()
        kept = self._kept[0, : len(ids)]
        return sequence.save(ids[: len(kept)][kept], value=value)

    def restore(self, ids: np.ndarray) -> int:
        """Replaces the only row, which is empty, by the longest stored prefix."""
        empty = self._one_row()
        assert self.runtime is not None
        empty.free()
        try:
            sequence, tokens = self.runtime.restore(ids)
        except Error:
            self.sequences = [self.runtime.create_sequence()]
            raise
        self.sequences = [sequence]
        self._kept = np.ones((1, tokens), dtype=bool)
        return tokens

    def _one_row(self) -> Sequence:
        if self.runtime is None:
            raise InvalidArgument("no store is open: call open_store first")
        if len(self.sequences) != 1:
            raise Unsupported(
                f"a cache of {len(self.sequences)} rows: prefixes are saved and restored one by one"
            )
        return self.sequences[0]

    def forget_calls(self) -> None:
        """Counts from here."""
        self.exact_calls = self.selected_calls = self.stock_calls = 0
        self.attended_tokens = self.visible_tokens = 0

    # ---- Its own -----------------------------------------------------------------------------

    def close(self) -> None:
        if self.runtime is not None:
            self.runtime.close()

    def stats(self) -> dict[str, Any]:
        """Of the runtime, and what this cache asked of it."""
        found: dict[str, Any] = {
            "layers": self.layers,
            "rows": len(self.sequences),
            "positions": self._kept.shape[1],
            "exact_calls": self.exact_calls,
            "selected_calls": self.selected_calls,
            "stock_calls": self.stock_calls,
            "attended_share": self.attended_tokens / max(self.visible_tokens, 1),
            "latent_attention": "expanded" if self.family.compressed else None,
        }
        if self.runtime is not None:
            options = self.runtime.options
            found["selector"] = options.selector or "default"
            found["dtype"] = options.dtype
            found["runtime"] = self.runtime.stats()
        if self.runtime is not None and self._prefixes:
            found["store"] = self.runtime.store_stats()
        return found


def _observes_prompt(selector: str | None) -> bool:
    if selector is None:
        return False
    return any(
        "prompt" in str(entry.get("needs", "")) and entry["name"] in selector
        for entry in selectors()
    )

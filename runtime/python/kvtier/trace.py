"""Writes attention traces: a folder of safetensors files and a manifest, as tools/README.md
describes them. NumPy alone; :func:`kvtier.transformers.record` feeds it.

While rows come in they lie in part files, one row per token, so memory does not grow with the
tokens and rows of rejected drafts can be taken back. :meth:`TraceWriter.prepare` streams the parts
into the files of the trace and works out the oracle on the way; :meth:`TraceWriter.publish` gives
the folder its name, last: there is no half trace under it, whatever ends the process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from .errors import InvalidArgument

SCHEMA, VERSION = "kvtier.attention-trace", 1
# The stored types, and the arrays that hold them: NumPy has no bfloat16.
DTYPES = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}
_TENSOR_TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
# Data of every file starts at a multiple of this.
_ALIGNMENT = 4096
# The oracle goes over so many keys and queries at a time.
_KEYS_AT_ONCE, _QUERIES_AT_ONCE = 2048, 32
_COPIED_AT_ONCE = 1 << 20
# Where the evenly spread half of a prompt's recorded queries begins.
_FIRST_PROMPT_QUERY = 64


@dataclass(frozen=True)
class Attention:
    """How a layer attends; equal in all layers but for the sinks."""

    scale: float
    logit_cap: float = 0.0


class LayerRows:
    """The part files of one layer: keys, values, queries and, to be compared with, the model's own
    outputs (float32). Shapes are those of the first rows."""

    NAMES = ("keys", "values", "queries", "model_out")

    def __init__(self, folder: Path, number: int, dtype: str) -> None:
        self.number = number
        self.dtype = dtype
        self.rows = 0
        self.shapes: dict[str, tuple[int, int]] = {}
        self.sinks: np.ndarray | None = None  # [query_heads] float32
        self._paths = {name: folder / f"layer-{number:03}.{name}" for name in self.NAMES}
        self._files: dict[str, IO[bytes]] = {
            name: path.open("w+b", buffering=1 << 20) for name, path in self._paths.items()
        }

    def append(self, begin: int, arrays: dict[str, np.ndarray]) -> None:
        """[rows, heads, dim] each, for the positions from ``begin`` on. Positions that are there
        already are replaced, with all behind them."""
        if begin > self.rows:
            raise InvalidArgument(
                f"layer {self.number}: tokens {self.rows} to {begin} were not recorded; start with "
                "an empty cache that grows (a static or quantised cache cannot be recorded)"
            )
        self.truncate(begin)
        for name, array in arrays.items():
            shape = (array.shape[1], array.shape[2])
            if self.shapes.setdefault(name, shape) != shape:
                raise InvalidArgument(
                    f"layer {self.number}: {name} changed from {self.shapes[name]} to {shape}"
                )
            self._files[name].write(np.ascontiguousarray(array).data)
        self.rows += next(iter(arrays.values())).shape[0]

    def truncate(self, rows: int) -> None:
        if rows >= self.rows:
            return
        for name, shape in self.shapes.items():
            at = rows * shape[0] * shape[1] * self._kind(name).itemsize
            self._files[name].flush()
            self._files[name].truncate(at)
            self._files[name].seek(at)
        self.rows = rows

    def _kind(self, name: str) -> np.dtype[Any]:
        return np.dtype(np.float32 if name == "model_out" else DTYPES[self.dtype])

    def read(self, name: str, rows: np.ndarray) -> np.ndarray:
        """The rows (ascending) as they are stored, [rows, heads, dim]. Nothing is appended after."""
        kind = self._kind(name)
        file, shape = self._files[name], self.shapes[name]
        file.flush()
        row_bytes = shape[0] * shape[1] * kind.itemsize
        out = np.empty((len(rows), *shape), dtype=kind)
        # Runs of neighbours are one read each.
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        for start, end in zip(starts, [*starts[1:], len(rows)]):
            file.seek(int(rows[start]) * row_bytes)
            taken = file.readinto(out[start:end].data.cast("B"))  # type: ignore[attr-defined]
            assert taken == (end - start) * row_bytes
        return out

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def remove(self) -> None:
        self.close()
        for path in self._paths.values():
            path.unlink(missing_ok=True)


class TraceWriter:
    """One trace. ``path`` must not exist; beside it a hidden folder holds the rows until
    :meth:`publish` or :meth:`abandon`. One thread at a time."""

    def __init__(self, path: str | os.PathLike[str], layers: list[int], dtype: str) -> None:
        self.path = Path(path)
        if self.path.exists():
            raise InvalidArgument(f"{self.path} exists: a recording does not overwrite")
        if dtype not in DTYPES:
            raise InvalidArgument(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        if not layers:
            raise InvalidArgument("no layers to record")
        self.dtype = dtype
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(
            tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".partial", dir=self.path.parent)
        )
        self.layers = {
            number: LayerRows(self._folder, number, dtype) for number in sorted(layers)
        }
        self._files: dict[str, dict[str, Any]] = {}

    def abandon(self) -> None:
        """Removes what was recorded. A second call does nothing."""
        for layer in self.layers.values():
            layer.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def prepare(
        self,
        manifest: dict[str, Any],
        attention: Attention,
        *,
        token_ids: np.ndarray,
        context_tokens: int,
        prompt_queries: int,
        sentence_ends: np.ndarray | None,
        comparable: np.ndarray,
        oracle: bool,
    ) -> float | None:
        """Writes the trace's files, under the hidden name, and returns by how much the model's outputs differ from the oracle, as a
        share of the largest output, over the steps that ``comparable`` [tokens] marks as attention
        over everything; None without such steps or without ``oracle``.

        ``manifest`` is what only the caller knows; shapes, counts and files are added.
        """
        tokens = len(token_ids)
        self._check(tokens, context_tokens)
        steps = np.arange(context_tokens, tokens)
        prompt = prompt_positions(context_tokens, prompt_queries)
        differences = [
            self._write_layer(layer, attention, steps, prompt, comparable[steps], oracle)
            for layer in self.layers.values()
        ]
        self._write_tokens(token_ids, sentence_ends)
        shapes = next(iter(self.layers.values())).shapes
        model = {
            **manifest.pop("model", {}),
            "query_heads": shapes["queries"][0], "kv_heads": shapes["keys"][0],
            "head_dim": shapes["keys"][1], "value_dim": shapes["values"][1],
        }
        found = [each for each in differences if each is not None]
        difference = max(found) if found else None
        whole = {
            "schema": SCHEMA, "version": VERSION, "name": self.path.name, **manifest,
            "model": model, "softmax_scale": attention.scale, "dtype": self.dtype, "tokens": tokens,
            "context_tokens": context_tokens, "steps": len(steps),
            "kept_layers": list(self.layers), "files": self._files,
        }
        if attention.logit_cap:
            whole["logit_cap"] = attention.logit_cap
        with (self._folder / "manifest.json").open("w") as file:
            json.dump(whole, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        return difference

    # ---- The files ---------------------------------------------------------------------------

    def _check(self, tokens: int, context: int) -> None:
        for layer in self.layers.values():
            if layer.rows == 0:
                raise InvalidArgument(
                    f"layer {layer.number} was never attended: is it a full-attention layer of the "
                    "model that ran?"
                )
            if layer.rows != tokens:
                raise InvalidArgument(
                    f"layer {layer.number} has {layer.rows} tokens, the model read {tokens}"
                )
        shapes = {tuple(sorted(layer.shapes.items())) for layer in self.layers.values()}
        if len(shapes) > 1:
            raise InvalidArgument("the layers differ in shape: record those of one shape together")
        if not 0 < context < tokens:
            raise InvalidArgument(
                f"a context of {context} of {tokens} tokens leaves no step: generate something, or "
                "pass context_tokens"
            )

    def _write_layer(
        self,
        layer: LayerRows,
        attention: Attention,
        steps: np.ndarray,
        prompt: np.ndarray,
        comparable: np.ndarray,
        oracle: bool,
    ) -> float | None:
        kind = _TENSOR_TYPES[self.dtype]
        everything = np.arange(layer.rows)
        heads, dim = layer.shapes["queries"]
        value_dim = layer.shapes["values"][1]
        tensors: list[tuple[str, str, list[int], Iterator[Any]]] = [
            (name, kind, [layer.rows, *layer.shapes[name]], _stored(layer, name, everything))
            for name in ("keys", "values")
        ]
        tensors += [
            ("queries", kind, [len(steps), heads, dim], _stored(layer, "queries", steps)),
            ("query_positions", "I64", [len(steps)], iter([steps.astype(np.int64)])),
        ]
        if len(prompt) > 0:
            tensors += [
                ("prompt_queries", kind, [len(prompt), heads, dim],
                 _stored(layer, "queries", prompt)),
                ("prompt_query_positions", "I64", [len(prompt)], iter([prompt.astype(np.int64)])),
            ]
        exact = Oracle(layer, attention, steps, comparable)
        if oracle:
            tensors += [
                ("out", "F32", [len(steps), heads, value_dim], exact.outputs()),
                # Written after `out`, which works it out.
                ("lse", "F32", [len(steps), heads], exact.sums()),
            ]
        if layer.sinks is not None:
            tensors.append(("sink_logits", "F32", [heads], iter([layer.sinks])))
        self._write(f"layer-{layer.number:03}.safetensors", tensors, {"layer": str(layer.number)})
        layer.remove()
        return exact.difference if oracle else None

    def _write_tokens(self, token_ids: np.ndarray, ends: np.ndarray | None) -> None:
        tensors: list[tuple[str, str, list[int], Iterator[Any]]] = [
            ("token_ids", "I32", [len(token_ids)], iter([token_ids.astype(np.int32)]))
        ]
        if ends is not None:
            tensors.append(("sentence_ends", "I32", [len(ends)], iter([ends.astype(np.int32)])))
        self._write("tokens.safetensors", tensors, {})

    def _write(
        self,
        name: str,
        tensors: list[tuple[str, str, list[int], Iterator[Any]]],
        metadata: dict[str, str],
    ) -> None:
        """Streams the tensors' arrays into a safetensors file, hashing what it writes."""
        sizes = {"F16": 2, "BF16": 2, "F32": 4, "I32": 4, "I64": 8}
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        at = 0
        for tensor, kind, shape, _ in tensors:
            size = sizes[kind] * int(np.prod(shape))
            header[tensor] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        digest = hashlib.sha256()
        with (self._folder / name).open("wb", buffering=_COPIED_AT_ONCE) as file:
            def put(piece: Any) -> None:
                digest.update(piece)
                file.write(piece)

            put(len(text).to_bytes(8, "little"))
            put(text)
            for *_, arrays in tensors:
                for array in arrays:
                    put(np.ascontiguousarray(array).data)
            written = file.tell()
            assert written == len(text) + 8 + at, f"{name}: {written} bytes"
            file.flush()
            os.fsync(file.fileno())
        self._files[name] = {"sha256": digest.hexdigest(), "bytes": written}

    def publish(self) -> None:
        """Gives the trace its name, which outlasts a power failure."""
        # mkdtemp makes folders that only their owner may enter.
        mask = os.umask(0)
        os.umask(mask)
        self._folder.chmod(0o777 & ~mask)
        _sync(self._folder)
        if self.path.exists():
            raise InvalidArgument(f"{self.path} appeared while it was recorded")
        self._folder.rename(self.path)
        _sync(self.path.parent)


class Oracle:
    """Attention over the stored values in float64: ``out`` and ``lse`` of the steps, without sink
    logits, in pieces of bounded size."""

    def __init__(
        self, layer: LayerRows, attention: Attention, steps: np.ndarray, comparable: np.ndarray
    ) -> None:
        self._layer, self._attention = layer, attention
        self._steps, self._comparable = steps, comparable
        self._lse: list[np.ndarray] = []
        # Of the model's own outputs from these, as a share of the largest one.
        self.difference: float | None = None

    def outputs(self) -> Iterator[np.ndarray]:
        for begin in range(0, len(self._steps), _QUERIES_AT_ONCE):
            part = slice(begin, begin + _QUERIES_AT_ONCE)
            out, lse = self._attend(self._steps[part])
            self._lse.append(lse)
            self._compare(out, lse, self._steps[part], self._comparable[part])
            yield out.astype(np.float32)

    def sums(self) -> Iterator[np.ndarray]:
        for lse in self._lse:
            yield lse.astype(np.float32)

    def _attend(self, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        layer, cap = self._layer, self._attention.logit_cap
        queries = decoded(layer.read("queries", steps), layer.dtype)
        count, heads, dim = queries.shape
        kv_heads, value_dim = layer.shapes["values"]
        grouped = queries.reshape(count, kv_heads, heads // kv_heads, dim)
        top = np.full((count, kv_heads, heads // kv_heads), -np.inf)
        total = np.zeros_like(top)
        out = np.zeros((*top.shape, value_dim))
        for begin in range(0, int(steps[-1]) + 1, _KEYS_AT_ONCE):
            places = np.arange(begin, min(begin + _KEYS_AT_ONCE, int(steps[-1]) + 1))
            keys = decoded(layer.read("keys", places), layer.dtype)
            values = decoded(layer.read("values", places), layer.dtype)
            logits = np.einsum("qhgd,khd->qhgk", grouped, keys, optimize=True)
            logits *= self._attention.scale
            if cap:
                logits = cap * np.tanh(logits / cap)
            logits[np.broadcast_to(
                (places[None] > steps[:, None])[:, None, None], logits.shape)] = -np.inf
            higher = np.maximum(top, logits.max(-1))
            weights = np.exp(logits - higher[..., None])
            kept = np.exp(top - higher)
            total = total * kept + weights.sum(-1)
            out = out * kept[..., None] + np.einsum("qhgk,khd->qhgd", weights, values,
                                                    optimize=True)
            top = higher
        out /= total[..., None]
        lse = top + np.log(total)
        return out.reshape(count, heads, value_dim), lse.reshape(count, heads)

    def _compare(
        self, out: np.ndarray, lse: np.ndarray, steps: np.ndarray, comparable: np.ndarray
    ) -> None:
        if not comparable.any():
            return
        if self._layer.sinks is not None:
            out = out / (1.0 + np.exp(self._layer.sinks - lse))[..., None]
        own = self._layer.read("model_out", steps[comparable]).astype(np.float64)
        difference = float(np.abs(own - out[comparable]).max() / max(np.abs(own).max(), 1e-30))
        self.difference = max(self.difference or 0.0, difference)


def prompt_positions(context: int, count: int) -> np.ndarray:
    """Which of a prompt's queries a trace keeps: half of them its last, the others evenly spread
    before those."""
    if count >= context:
        return np.arange(context if count else 0)
    last = count // 2
    spread = count - last
    end = context - last - 1
    first = min(_FIRST_PROMPT_QUERY, max(end - spread + 1, 0))
    steps = np.arange(spread) * (end - first)
    places = first + (steps // max(spread - 1, 1))
    return np.concatenate([places, np.arange(context - last, context)])


def decoded(array: np.ndarray, dtype: str) -> np.ndarray:
    """Stored values as float64."""
    if dtype == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def _stored(layer: LayerRows, name: str, rows: np.ndarray) -> Iterator[np.ndarray]:
    at_once = max(_COPIED_AT_ONCE // (8 * layer.shapes[name][0] * layer.shapes[name][1]), 1)
    for begin in range(0, len(rows), at_once):
        yield layer.read(name, rows[begin : begin + at_once])


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

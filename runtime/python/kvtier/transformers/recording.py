"""``record``: what a model attends, written as a trace that ``kvtier replay`` takes.

The recording listens where kvtier's attention function is called, so it sees keys, values and
queries as the model attends them, under stock caches and tiered ones.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import transformers
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .. import library_version
from ..errors import InvalidArgument, Unsupported
from ..trace import DTYPES, Attention, TraceWriter
from . import attention, families
from .store import STEP_QUERIES_MAX

# Rounding keys to float16 moves outputs by a few percent where logits are large. A scale, cap or
# mask that was misunderstood moves them by their own size.
_DIFFERENCE_MAX = 0.2
_TORCH_DTYPES = {
    "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32,
}
# The end of a sentence, with what may close it, before white space; or a paragraph's.
_SENTENCE_END = re.compile(r"[.!?][\"'\u201d\u2019)\]_]*(?=\s)|\n\s*\n")


class Recording:
    """What :func:`record` returns. Inside the block it counts; behind it, the trace is there."""

    def __init__(
        self,
        model: Any,
        path: str | os.PathLike[str],
        *,
        layers: list[int] | None = None,
        prompt_queries: int = 512,
        context_tokens: int | None = None,
        dtype: str | None = None,
        oracle: bool = True,
        tokenizer: Any = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        self._model = model
        self._config = families.text_config(model)
        full = [
            index for index, layer in enumerate(DynamicCache(config=self._config).layers)
            if type(layer) is DynamicLayer
        ]
        wrong = [index for index in layers or [] if index not in full]
        if wrong:
            raise InvalidArgument(
                f"layers {wrong} are no full-attention layers of this model: {full} are"
            )
        if prompt_queries < 0:
            raise InvalidArgument(f"prompt_queries is {prompt_queries}, expected 0 or more")
        self.layers = sorted(set(full if layers is None else layers))
        self.about = dict(about or {})
        self.tokens = 0
        self.difference: float | None = None
        self._prompt_queries = prompt_queries
        self._context = context_tokens
        self._dtype = dtype or _dtype_of(model)
        self._oracle = oracle
        self._tokenizer = tokenizer
        self._path = Path(path)
        self._writer: TraceWriter | None = None
        self._attention: Attention | None = None
        self._ids = np.zeros(0, dtype=np.int64)
        self._unplaced: np.ndarray | None = None  # Token ids of the forward that runs.
        self._forwards: list[tuple[int, int]] = []  # Begin and count, of what still counts.
        self._comparable = np.zeros(0, dtype=bool)  # [tokens]
        self._tiered = False
        self._hook: Any = None
        self._before = ""

    # ---- The block ---------------------------------------------------------------------------

    def __enter__(self) -> Recording:
        self._writer = TraceWriter(self._path, self.layers, self._dtype)
        try:
            self._before = self._config._attn_implementation
            attention.switch_on(self._model, self._config)
            attention.listen(self._model, self.layers, self._hear)
            self._hook = self._model.register_forward_pre_hook(self._read, with_kwargs=True)
        except BaseException:
            self._writer.abandon()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._writer is not None
        self._hook.remove()
        attention.forget_listener(self._model)
        # A tiered cache that lives on needs kvtier's attention.
        if not self._tiered:
            self._model.set_attn_implementation(self._before)
        try:
            if kind is None:
                self._finish()
        finally:
            self._writer.abandon()

    # ---- While the model runs ----------------------------------------------------------------

    def _read(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        if ids is None and args:
            ids = args[0]
        if ids is None:
            raise Unsupported("a forward without input_ids: the tokens of a trace have ids")
        if ids.shape[0] != 1:
            raise Unsupported(
                f"a batch of {ids.shape[0]} rows: a trace holds one sequence (num_beams=1, one "
                "prompt)"
            )
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask.all()):
            raise Unsupported("padding: pass the prompt without it, a trace holds one sequence")
        self._unplaced = ids[0].cpu().numpy().astype(np.int64)

    def _hear(self, heard: attention.Heard) -> None:
        assert self._writer is not None
        if heard.sliding_window is not None:
            raise Unsupported(f"layer {heard.layer} attends a sliding window: record others")
        if heard.query.shape[0] != 1:
            raise Unsupported(f"a batch of {heard.query.shape[0]} rows: a trace holds one sequence")
        if self._unplaced is not None:
            self._place(heard)
        seen = Attention(heard.scale, heard.softcap)
        if self._attention is None:
            self._attention = seen
        if seen != self._attention:
            raise Unsupported(
                f"layer {heard.layer} attends with {seen}, another with {self._attention}: record "
                "layers of one kind"
            )
        rows = {
            "keys": self._stored(heard.keys), "values": self._stored(heard.values),
            "queries": self._stored(heard.query),
        }
        if self._oracle:
            rows["model_out"] = heard.out[0].detach().float().cpu().numpy()
        layer = self._writer.layers[heard.layer]
        if heard.sinks is not None:
            layer.sinks = heard.sinks.detach().float().cpu().numpy()
        layer.append(heard.begin, rows)

    def _place(self, heard: attention.Heard) -> None:
        """The first layer of a forward says where its tokens stand."""
        assert self._unplaced is not None
        ids, self._unplaced = self._unplaced, None
        begin, count = heard.begin, heard.query.shape[2]
        if begin == 0 and self._forwards:
            raise Unsupported(
                "a second sequence began: a recording holds one; go on with its cache, or record "
                "again under another name"
            )
        if len(ids) != count:
            raise Unsupported(f"{len(ids)} token ids, but {count} queries in layer {heard.layer}")
        # Drafts that were rejected are overwritten.
        self._forwards = [each for each in self._forwards if each[0] < begin] + [(begin, count)]
        self._ids = np.concatenate([self._ids[:begin], ids])
        known = np.full(count, heard.exact)
        self._comparable = np.concatenate([self._comparable[:begin], known])
        self._tiered = self._tiered or heard.tiered
        self.tokens = len(self._ids)

    def _stored(self, rows: torch.Tensor) -> np.ndarray:
        """[1, heads, count, dim] -> [count, heads, dim] as it is stored."""
        kept = rows[0].detach().transpose(0, 1).to(_TORCH_DTYPES[self._dtype])
        if not bool(torch.isfinite(kept).all()):
            raise Unsupported(f"a value that {self._dtype} cannot hold: pass dtype=")
        kept = kept.cpu().contiguous()
        if self._dtype == "bfloat16":
            return kept.view(torch.int16).numpy().view(np.uint16)
        return np.asarray(kept.numpy(), dtype=DTYPES[self._dtype])

    # ---- Afterwards --------------------------------------------------------------------------

    def _finish(self) -> None:
        assert self._writer is not None
        if self._attention is None:
            raise InvalidArgument("nothing ran inside the block: there is no trace")
        self.difference = self._writer.prepare(
            self._manifest(),
            self._attention,
            token_ids=self._ids,
            context_tokens=self._context_tokens(),
            prompt_queries=self._prompt_queries,
            sentence_ends=self._sentence_ends(),
            comparable=self._comparable,
            oracle=self._oracle,
        )
        if self.difference is not None and self.difference > _DIFFERENCE_MAX:
            raise Unsupported(
                f"attention over what was recorded differs from the model's own by "
                f"{self.difference:.2f} of its largest value: this model attends in a way that a "
                "trace cannot say. oracle=False records it without this check"
            )
        self._writer.publish()

    def _context_tokens(self) -> int:
        """Up to the first forward that decodes: one short enough for a step."""
        if self._context is not None:
            return self._context
        for begin, count in self._forwards:
            if begin > 0 and count <= STEP_QUERIES_MAX:
                return begin
        return self.tokens

    def _manifest(self) -> dict[str, Any]:
        config = self._config
        model = {
            "name": Path(str(config._name_or_path or type(self._model).__name__)).name,
            "architecture": config.model_type,
            "layers": config.num_hidden_layers,
            "vocab_size": config.vocab_size,
        }
        about = dict(self.about)
        model.update(about.pop("model", {}))
        caches = "a tiered cache of kvtier" if self._tiered else "a stock cache"
        known: dict[str, Any] = {
            "model": model,
            "recorded_with": f"kvtier {library_version()}, transformers {transformers.__version__}, "
                             f"torch {torch.__version__}, {_dtype_of(self._model)} weights on "
                             f"{next(self._model.parameters()).device.type}, {caches}",
        }
        if self._oracle:
            known["recorded_with"] += "; out and lse are float64 attention over the stored values"
        theta = families.family(config, allow_untested=True).rope_theta
        if theta:
            known["rope"] = {"theta": theta, "applied_to_keys": True}
        return {**known, **about}

    def _sentence_ends(self) -> np.ndarray | None:
        if self._tokenizer is None:
            return None
        return sentence_ends([self._tokenizer.decode([int(each)]) for each in self._ids])


def record(model: Any, path: str | os.PathLike[str], **choices: Any) -> Recording:
    """Records what happens inside a ``with`` block as an attention trace in the folder ``path``.

    layers           Model layers to keep; None: every layer of full attention.
    prompt_queries   Of the prompt's queries, how many are kept, the last and some between.
    context_tokens   Where the steps begin. None: at the first forward, not the first of all, of at
                     most 8 tokens: the first that decodes.
    dtype            Of what is stored: float16, bfloat16 or float32; None: as the model computes.
    oracle           Also exact attention (out, lse) in float64 over the stored values; the model's
                     own outputs are compared with it, and where they do not agree the recording
                     ends in an error.
    tokenizer        For sentence ends; None: the trace has none.
    about            Further fields of the manifest: ``name``, ``description``, ``text``, ``turns``,
                     ``model`` (``name``, ``license``, ``weights``), ...

    One sequence: one row, no padding, no beams, a cache that grows. Rejected drafts are taken back.
    Rows go to files in a hidden folder beside ``path``, so memory does not grow with the tokens; on
    the way out they become the trace, which takes the same space once more for a layer at a time.
    An exception inside leaves nothing behind.
    """
    return Recording(model, path, **choices)


class Reader:
    """Reads a model prompts and lets it answer, with one stock cache; for recordings that are made
    without ``generate``. Logits are computed for the last token of a forward only."""

    def __init__(self, model: Any, chunk_tokens: int) -> None:
        self._model, self._chunk_tokens = model, chunk_tokens
        self._cache = DynamicCache(config=families.text_config(model))
        self._name = attention.cache_name(model)
        self._next = -1

    def read(self, ids: list[int]) -> None:
        for begin in range(0, len(ids), self._chunk_tokens):
            part = torch.tensor([ids[begin : begin + self._chunk_tokens]])
            part = part.to(next(self._model.parameters()).device)
            logits = self._model(part, logits_to_keep=1, **{self._name: self._cache}).logits
        self._next = int(logits[0, -1].argmax())

    def answer(self, tokens: int, stops: set[int]) -> list[int]:
        """Greedily, up to a token of ``stops``, which is not read."""
        told: list[int] = []
        while len(told) < tokens and self._next not in stops:
            told.append(self._next)
            self.read(told[-1:])
        return told


def sentence_ends(pieces: list[str]) -> np.ndarray:
    """Ends (exclusive) of sentences in tokens, from the tokens' texts; the last token ends one."""
    ends = np.cumsum([len(piece) for piece in pieces])
    found: list[int] = []
    for match in _SENTENCE_END.finditer("".join(pieces)):
        at = int(np.searchsorted(ends, match.end(), side="left")) + 1
        if not found or at > found[-1]:
            found.append(at)
    if pieces and (not found or found[-1] < len(pieces)):
        found.append(len(pieces))
    return np.array(found, dtype=np.int64)


def _dtype_of(model: Any) -> str:
    for name, dtype in _TORCH_DTYPES.items():
        if next(model.parameters()).dtype == dtype:
            return name
    raise Unsupported(f"the model computes in {next(model.parameters()).dtype}: pass dtype=")

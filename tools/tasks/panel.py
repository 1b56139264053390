"""Many selections over one context at once: each row of a batch has its own selector and budget.

Full attention computes a context once. Each selector's runtime is given its keys and values once;
every budget forks the sequence, and one forward then decodes all rows. A row sees exactly what it
would see alone: what rows share is stored keys and values, and the weights that a forward reads.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from kvtier import Options, Runtime, selectors
from kvtier.options import needs
from kvtier.transformers import attention, families
from kvtier.transformers.store import STEP_QUERIES_MAX, Call

# As TieredCache shows them to selectors that observe the prompt.
OBSERVED_QUERIES = 64


@dataclasses.dataclass(frozen=True)
class Choice:
    selector: str
    budget: float  # Share of the tokens, sinks and window included.

    @property
    def name(self) -> str:
        return f"{self.selector} {self.budget:g}"


# Short extents: what a fork copies is what lies behind its last complete one.
EXTENT_BYTES = 32 << 10


class Stem:
    """One selector over what full attention computed of the current context."""

    def __init__(self, options: Options, budgets: int) -> None:
        # A fork shares all but its end with the stem: room for two whole sequences is plenty. What
        # is measured is selection, so no disk takes part.
        whole = needs(dataclasses.replace(options, sequences_max=2))
        options = dataclasses.replace(options, sequences_max=1 + budgets)
        step = needs(options)
        self.runtime = Runtime(dataclasses.replace(
            options,
            device_capacity_bytes=step.device_bytes + whole.device_bytes_all // 8,
            host_capacity_bytes=max(whole.extent_bytes_total, step.host_bytes),
        ))
        self.sequence = self.runtime.create_sequence()
        self.tokens = 0
        self.observes = any(
            "prompt" in str(entry.get("needs", "")) and entry["name"] in str(options.selector)
            for entry in selectors()
        )

    def restart(self) -> None:
        self.sequence.free()
        self.sequence = self.runtime.create_sequence()
        self.tokens = 0

    def cut(self, tokens: int) -> None:
        if tokens < self.tokens:
            self.sequence.truncate(tokens)
            self.tokens = tokens


class Row:
    """One selector and budget; its sequence lives for one question."""

    def __init__(self, choice: Choice, stem: Stem) -> None:
        self.choice, self.stem = choice, stem
        self.sequence: Any = None
        self.tokens = 0

    def fork(self) -> None:
        self.sequence = self.stem.sequence.fork()
        self.tokens = self.stem.tokens

    def free(self) -> None:
        if self.sequence is not None:
            self.sequence.free()
        self.sequence = None

    def cut(self, tokens: int) -> None:
        self.sequence.truncate(tokens)
        self.tokens = tokens

    def budget_tokens(self, tokens: int) -> int:
        options = self.stem.runtime.options
        return max(math.ceil(self.choice.budget * tokens), options.sinks + options.window)


class _Layer(CacheLayerMixin):
    is_sliding = False
    is_compileable = False

    def __init__(self, panel: Panel, index: int) -> None:
        super().__init__()
        self.keys = self.values = None
        self.panel, self.index = panel, index

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        self.is_initialized = True

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        call = Call(self.panel, self.index, self.panel.longest, keys, values)  # type: ignore
        return attention.marked(keys, call), values

    def get_seq_length(self, *args: Any) -> int:
        return self.panel.longest

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        count = query if isinstance(query, int) else query.shape[0]
        return attention.TieredLength(self.panel.longest + count), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


class Panel:
    """``choices`` as rows; ``tokens_max`` is the longest context with its question and answer."""

    def __init__(self, model: Any, choices: list[Choice], tokens_max: int) -> None:
        config = families.text_config(model)
        self.model = model
        self.family = families.family(config, allow_untested=True)
        stock = DynamicCache(config=config)
        if any(type(layer) is not DynamicLayer for layer in stock.layers):
            raise SystemExit("tools/tasks runs models whose layers all have full attention")
        attention.switch_on(model, config)
        self._layers = len(stock.layers)
        self._cache = stock
        for index in range(self._layers):
            self._cache.layers[index] = _Layer(self, index)
        self._name = attention.cache_name(model)
        heads = config.num_attention_heads
        options = Options(
            query_heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            layers=self._layers,
            rope_theta=self.family.rope_theta,
            tokens_max=tokens_max,
            extent_bytes=EXTENT_BYTES,
            threads=1,
        )
        names = list(dict.fromkeys(choice.selector for choice in choices))
        budgets = max(sum(choice.selector == name for choice in choices) for name in names)
        self.stems = {
            name: Stem(dataclasses.replace(options, selector=name), budgets) for name in names
        }
        self.rows = [Row(choice, self.stems[choice.selector]) for choice in choices]
        self._active: list[Row] = []

    @property
    def longest(self) -> int:
        return max((row.tokens for row in self._active), default=0)

    # ---- From full attention -----------------------------------------------------------------

    def load(
        self,
        stock: DynamicCache,
        tokens: int,
        marks: np.ndarray,
        queries: dict[int, torch.Tensor],
    ) -> None:
        """Makes every row one over the first ``tokens`` of what full attention stored. ``marks``
        are the ends of sentences, ``queries`` [count, query_heads, head_dim] by layer those of the
        last tokens of all, for selectors that observe the prompt."""
        for layer in range(self._layers):
            keys = stock.layers[layer].keys[0, :, :tokens].half().transpose(0, 1)
            values = stock.layers[layer].values[0, :, :tokens].half().transpose(0, 1)
            for stem in self.stems.values():
                begin = stem.tokens
                stem.sequence.append(layer, keys[begin:], values[begin:], marks[begin:tokens])
                if stem.observes:
                    count = queries[layer].shape[0]
                    places = np.arange(tokens - count, tokens)
                    stem.sequence.observe_prompt(layer, queries[layer].contiguous(), places)
        for stem in self.stems.values():
            stem.tokens = tokens
        for row in self.rows:
            row.fork()

    def free_rows(self) -> None:
        """Ends a question; the stems stay."""
        for row in self.rows:
            row.free()

    def cut(self, tokens: int) -> None:
        for stem in self.stems.values():
            stem.cut(tokens)

    def restart(self) -> None:
        for stem in self.stems.values():
            stem.restart()

    # ---- Decoding ----------------------------------------------------------------------------

    def forward(self, rows: list[Row], ids: list[list[int]]) -> torch.Tensor:
        """As many new tokens for each of ``rows``, each selecting for itself; logits [rows, count,
        vocabulary]."""
        count = len(ids[0])
        assert count <= STEP_QUERIES_MAX
        self._active = rows
        positions = [list(range(row.tokens, row.tokens + count)) for row in rows]
        logits = self.model(
            torch.tensor(ids), position_ids=torch.tensor(positions), **{self._name: self._cache}
        ).logits
        for row in rows:
            row.tokens += count
        return logits

    def attend(self, call: Call, query: torch.Tensor, *more: Any) -> torch.Tensor:
        """What kvtier's attention function calls, once per layer."""
        keys, values = call.keys.half(), call.values.half()
        asked = query.transpose(1, 2).contiguous()
        out = torch.empty_like(asked)
        for index, row in enumerate(self._active):
            row.sequence.append(
                call.layer, keys[index].transpose(0, 1), values[index].transpose(0, 1)
            )
            row.sequence.step(
                call.layer,
                asked[index],
                row.budget_tokens(row.tokens + asked.shape[1]),
                out=out[index],
                own_selection=asked.shape[1] > 1,
            )
        return out

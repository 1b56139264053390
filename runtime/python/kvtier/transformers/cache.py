"""``TieredCache``: a transformers cache whose full-attention layers live in a kvtier runtime.

Sliding-window and linear layers keep transformers' own cache layers. ``update`` of a tiered layer
stores nothing yet: it returns the new keys with a :class:`Call` tied to the tensor, and the
attention function, which sees the padding and the queries too, takes it from there. Two caches on
one model are therefore never mixed up, in whatever order they run.
"""

from __future__ import annotations

import inspect
import os
import weakref
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ..errors import InvalidArgument, Unsupported
from ..options import Capacity
from . import attention, families
from .store import STEP_QUERIES_MAX, Call, Store, StoreOptions

# Until 5.0 `crop(n)` keeps n tokens, 0 too; later it takes what to remove, negative, and 0 removes
# nothing.
_CROP_REMOVES = "tokens_to_remove" in inspect.signature(DynamicLayer.crop).parameters


class TieredLayer(CacheLayerMixin):
    """One full-attention layer. Its length counts positions, padding included."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, store: Store, index: int, model_layer: int) -> None:
        super().__init__()
        self.keys = self.values = None
        self.store = store
        self.index = index
        self.model_layer = model_layer
        self.length = 0
        self._call: Call | None = None

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._call is not None and not self._call.appended:
            raise InvalidArgument(
                f"layer {self.model_layer}: the keys before these never reached kvtier's attention "
                f"function. Is model.config._attn_implementation still {attention.NAMES}? After a "
                "forward that failed, crop the cache to where it stood before."
            )
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise Unsupported("kvtier has no gradients: run the model under torch.no_grad()")
        self.is_initialized = True
        self._call = Call(self.store, self.index, self.length, key_states, value_states)
        self.length = self._call.end
        return attention.marked(key_states, self._call), value_states

    def forget_call(self) -> None:
        self._call = None

    def get_seq_length(self, *args: Any) -> int:
        return self.length

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        # The query's length, or until 5.0 its positions.
        count = query if isinstance(query, int) else query.shape[0]
        return attention.TieredLength(self.length + count), 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def crop(self, *args: Any) -> None:
        raise Unsupported("tiered layers change together: call the method of the cache")

    def reorder_cache(self, *args: Any) -> None:
        self.crop()

    def batch_repeat_interleave(self, *args: Any) -> None:
        self.crop()

    def batch_select_indices(self, *args: Any) -> None:
        self.crop()


class ExemptLayer(DynamicLayer):
    """A full-attention layer that stays in torch's memory: every token is attended, by stock
    attention, which the statistics count."""

    store: Store

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(*args, **kwargs)
        return attention.marked(keys, self.store), values

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        length, offset = super().get_mask_sizes(query)
        return attention.TieredLength(length), offset


class TieredCache(DynamicCache):
    """A cache for ``model.generate(past_key_values=...)`` that keeps KV on three tiers.

    tokens_max        Longest sequence in positions: prompt, answers and drafts.
    device_capacity   Bytes, "2GiB", or a share of all KV at ``tokens_max``: "10%".
    host_capacity     Likewise. ``disk_path`` adds a disk tier for the rest, in a nameless scratch
                      file in that folder; ``disk_capacity`` None: as much as is missing.
    selector, budget  What decode steps attend: a share of the tokens (float) or a number (int), per
                      KV head, sinks and window included.
    exact_above       Forwards of more new tokens than this are exact (the prefill); fewer select.
                      At most 8.
    own_selection     Where several new tokens select: each for itself, else one choice for all.
    exempt_layers     Layers of the model that keep transformers' cache and attend everything.
    sequences_max     Rows open at a time; None: the batch of the first forward.
    dtype             Of stored KV; None: as the model computes them.
    options           Further fields of ``kvtier.Options``: ``window=128``, ``verify="all"``, ...

    Switches the model's attention implementation to kvtier's, which leaves other caches on the
    model as they were. Memory is taken at the first forward and returned by :meth:`close`, or when
    the cache is collected.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokens_max: int,
        device_capacity: Capacity = "25%",
        host_capacity: Capacity = "100%",
        disk_path: str | None = None,
        disk_capacity: Capacity | None = None,
        selector: str | None = None,
        budget: float | int = 0.05,
        exact_above: int = STEP_QUERIES_MAX,
        own_selection: bool = False,
        exempt_layers: tuple[int, ...] = (),
        sequences_max: int | None = None,
        dtype: str | None = None,
        allow_untested: bool = False,
        **options: Any,
    ) -> None:
        config = families.text_config(model)
        family = families.family(config, allow_untested)
        _check_choices(budget, exact_above)
        super().__init__(config=config)
        tiered = self._tiered_layers(family, exempt_layers)
        chosen = StoreOptions(
            tokens_max=tokens_max,
            device_capacity=device_capacity,
            host_capacity=host_capacity,
            disk_path=disk_path,
            disk_capacity=disk_capacity,
            selector=selector,
            budget=budget,
            exact_above=exact_above,
            own_selection=own_selection,
            sequences_max=sequences_max,
            dtype=dtype,
            runtime=options,
        )
        self.store = Store(chosen, len(tiered), family, families.sink_logits(model, tiered))
        for index, model_layer in enumerate(tiered):
            self.layers[model_layer] = TieredLayer(self.store, index, model_layer)
        for model_layer in exempt_layers:
            layer = ExemptLayer()
            layer.store = self.store
            self.layers[model_layer] = layer
        attention.switch_on(model, config)
        self._model = weakref.ref(model)
        self._finalizer = weakref.finalize(self, Store.close, self.store)

    def _tiered_layers(self, family: families.Family, exempt: tuple[int, ...]) -> list[int]:
        full = [index for index, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        wrong = [index for index in exempt if index not in full]
        if wrong:
            raise InvalidArgument(f"exempt_layers {wrong} are no full-attention layers: {full} are")
        tiered = [index for index in full if index not in exempt]
        if not tiered:
            raise Unsupported(
                f"this {family.model_type} has no full-attention layer left to tier: sliding and "
                "linear layers keep a bounded state of their own"
            )
        return tiered

    @property
    def _tiered(self) -> list[TieredLayer]:
        return [layer for layer in self.layers if isinstance(layer, TieredLayer)]

    @property
    def _others(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, TieredLayer)]

    # ---- What generate() does to a cache -----------------------------------------------------

    def crop(self, amount: int) -> None:
        """As the installed transformers has it: negative, tokens to remove; positive, until 5.0,
        tokens to keep. Also puts the cache right after a forward that failed."""
        amount = int(amount)  # Some versions pass a tensor.
        length = max(layer.length for layer in self._tiered)
        if amount < 0:
            kept = max(length + amount, 0)
        elif _CROP_REMOVES:
            if amount > 0:
                raise InvalidArgument(f"crop({amount}): pass what to remove, as a negative number")
            kept = length
        else:
            kept = min(amount, length)
        for layer in self._others:
            # After a forward that failed, a layer behind it has less to remove.
            behind = length - layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else 0
            layer.crop(min(amount + behind, 0) if amount < 0 else amount)
        self._keep(min(kept, length))

    def keep(self, tokens: int) -> None:
        """Forgets everything from position ``tokens`` on, whatever ``crop`` means in the installed
        transformers."""
        length = max(layer.length for layer in self._tiered)
        self.crop(tokens - length if tokens < length else (0 if _CROP_REMOVES else tokens))

    def _keep(self, positions: int) -> None:
        for layer in self._tiered:
            layer.length = min(layer.length, positions)
            layer.forget_call()
        self.store.truncate(positions)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        for layer in self._others:
            layer.reorder_cache(beam_idx)
        self.store.select_rows([int(row) for row in beam_idx])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Needs ``sequences_max`` for the rows that are to come."""
        for layer in self._others:
            layer.batch_repeat_interleave(repeats)
        rows = len(self.store.sequences)
        self.store.select_rows([row for row in range(rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for layer in self._others:
            layer.batch_select_indices(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.store.select_rows([int(row) for row in indices])

    def reset(self) -> None:
        for layer in self._others:
            layer.reset()
        self._keep(0)

    def __iter__(self) -> Any:
        raise Unsupported("a TieredCache does not show its keys and values: they lie on tiers")

    def __deepcopy__(self, memo: Any) -> TieredCache:
        raise Unsupported(
            "a TieredCache owns its tiers and cannot be copied: repeat its rows instead "
            "(sequences_max=, batch_repeat_interleave)"
        )

    # ---- Prefixes that outlive the process ----------------------------------------------------

    def open_store(self, path: str | os.PathLike[str], *, model: str, **options: Any) -> None:
        """Opens the prefix store in the folder ``path``; the arguments are those of
        :meth:`kvtier.Runtime.open_store`. ``model`` names model and weights: what was saved under
        another name is not found.

        For caches of one row whose layers are all tiered. Where nothing was stored yet, the model
        computes one token that is forgotten again: it shows what the tiers must hold.
        """
        if self._others:
            kept = [i for i, layer in enumerate(self.layers) if not isinstance(layer, TieredLayer)]
            raise Unsupported(
                f"layers {kept} keep transformers' cache, which a prefix store does not hold"
            )
        if self.store.runtime is None:
            self._show_shapes()
        self.store.open_prefixes(path, model=model, **options)

    def close_store(self) -> None:
        """Ends the store cleanly, so that another process may open it; :meth:`close` does so
        too."""
        self.store.close_prefixes()

    def save(self, token_ids: Any, *, value: float = 1.0) -> int:
        """Saves what the cache holds of ``token_ids``, the ids of its tokens from the first on:
        [tokens] or [1, tokens], as ``generate`` returns them. Returns how many were saved: whole
        runs, see :meth:`kvtier.Sequence.save`."""
        return self.store.save(_row(token_ids), value)

    def restore(self, token_ids: Any) -> int:
        """Fills an empty cache with the longest stored prefix of ``token_ids``, [tokens] or [1,
        tokens], and returns its length; 0 when nothing was found. At least one token is left for
        the model to compute: ``generate(token_ids)`` with this cache continues with the rest."""
        held = max(layer.length for layer in self._tiered)
        if held > 0:
            raise InvalidArgument(f"restore fills an empty cache: this one holds {held} positions")
        tokens = self.store.restore(_row(token_ids)[:-1])
        for layer in self._tiered:
            layer.length = tokens
        return tokens

    def _show_shapes(self) -> None:
        model = self._model()
        if model is None:
            raise InvalidArgument("the model that the cache was made for is gone")
        with torch.no_grad():
            device = next(model.parameters()).device
            token = torch.zeros((1, 1), dtype=torch.long, device=device)
            model(token, use_cache=True, **{attention.cache_name(model): self})
        self._keep(0)
        self.store.forget_calls()

    # ---- Its own -----------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Calls by kind (exact, selected, stock), the share of tokens attended, and the runtime's
        statistics: tiers, bytes moved, verification."""
        return self.store.stats()

    def close(self) -> None:
        """Returns memory and disk space. The cache is of no use afterwards."""
        self._finalizer.detach()
        self.store.close()

    def __enter__(self) -> TieredCache:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def _row(token_ids: Any) -> np.ndarray:
    ids = np.asarray(token_ids.cpu() if isinstance(token_ids, torch.Tensor) else token_ids)
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1 or len(ids) == 0:
        raise InvalidArgument(
            f"token_ids has shape {list(ids.shape)}, expected [tokens] or [1, tokens]"
        )
    return ids


def _check_choices(budget: float | int, exact_above: int) -> None:
    if isinstance(budget, float) and not 0.0 < budget <= 1.0:
        raise InvalidArgument(f"budget is {budget}: a share is above 0 and at most 1")
    if isinstance(budget, int) and budget < 1:
        raise InvalidArgument(f"budget is {budget}: expected a share (float) or tokens (int)")
    if not 0 <= exact_above <= STEP_QUERIES_MAX:
        raise InvalidArgument(f"exact_above is {exact_above}, expected 0 to {STEP_QUERIES_MAX}")

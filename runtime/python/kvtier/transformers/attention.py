"""The attention and mask functions that transformers calls, by its public registries.

Registered twice: ``kvtier`` uses SDPA for layers that are not tiered, ``kvtier_eager`` the model's
own plain attention, for models whose logits are capped or have sinks, which SDPA cannot do.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import InvalidArgument, StockAttentionWarning, Unsupported
from .store import Call, Store

SDPA, EAGER = "kvtier", "kvtier_eager"
NAMES = (SDPA, EAGER)
_MARK = "_kvtier_call"
# The cache's name among the arguments: the first one at first, the second one since 5.24 or so.
CACHE_NAMES = ("past_key_values", "cache")
# On an attention module: what hears of each of its attentions, see `listen`.
_LISTENER = "_kvtier_listener"
# Queries of an exempt layer whose mask is made at once: queries * keys booleans.
_MASK_QUERIES = 512


class TieredLength(int):
    """The length of a cache that needs no mask but its padding. How the mask function knows, which
    is not handed the cache."""


@dataclasses.dataclass
class Heard:
    """One layer's attention in one forward, as it reached the attention function."""

    layer: int               # Of the model.
    begin: int               # Position of the first new token.
    query: torch.Tensor      # [rows, query_heads, new, head_dim], rotated.
    keys: torch.Tensor       # [rows, kv_heads, new, head_dim], rotated: of the new tokens alone.
    values: torch.Tensor     # [rows, kv_heads, new, value_dim].
    out: torch.Tensor        # [rows, new, query_heads, value_dim].
    exact: bool              # Whether `out` is attention over every token.
    tiered: bool             # Whether a TieredCache holds the layer.
    scale: float
    softcap: float
    sinks: torch.Tensor | None    # [query_heads], logits.
    sliding_window: int | None


def listen(model: Any, layers: list[int], listener: Callable[[Heard], None]) -> None:
    """Tells ``listener`` of every attention of ``layers`` while kvtier's attention is switched on;
    one listener per model. What it raises ends the forward."""
    modules = _numbered(model)
    if any(hasattr(module, _LISTENER) for module in modules):
        raise InvalidArgument("the model is being recorded already: one recording at a time")
    for module in modules:
        setattr(module, _LISTENER, listener if module.layer_idx in layers else _deaf)


def forget_listener(model: Any) -> None:
    for module in _numbered(model):
        module.__dict__.pop(_LISTENER, None)


def _deaf(heard: Heard) -> None:
    """Of the layers that are not listened to; tells that stock attention is meant there too."""


def _numbered(model: Any) -> list[Any]:
    # Some models number their decoder layers too, which never reach an attention function.
    return [each for each in model.modules() if hasattr(each, "layer_idx")]


class _Carrier(torch.Tensor):
    """A tensor whose mark goes on to whatever is computed from it. For latent attention, which
    expands what the cache returns into keys and values before it attends them."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        mark = _first_mark(args)
        if mark is None:
            return result
        if isinstance(result, torch.Tensor):
            return _carried(result, mark)
        if isinstance(result, (tuple, list)) and type(result) in (tuple, list):
            return type(result)(
                _carried(item, mark) if isinstance(item, torch.Tensor) else item for item in result
            )
        return result


def _carried(tensor: torch.Tensor, mark: Call | Store) -> torch.Tensor:
    carrier = tensor.as_subclass(_Carrier)
    setattr(carrier, _MARK, mark)
    return carrier


def _first_mark(args: Any) -> Call | Store | None:
    for item in args:
        if isinstance(item, (tuple, list)):
            found = _first_mark(item)
        else:
            found = getattr(item, _MARK, None) if isinstance(item, _Carrier) else None
        if found is not None:
            return found
    return None


def marked(keys: torch.Tensor, mark: Call | Store) -> torch.Tensor:
    """The same keys as a tensor object of their own, with what belongs to them."""
    store = mark.store if isinstance(mark, Call) else mark
    keys = keys.view_as(keys)
    if store.family.compressed:
        return _carried(keys, mark)
    setattr(keys, _MARK, mark)
    return keys


def cache_name(model: Any) -> str:
    """What the installed transformers calls the cache among a model's (or its class's)
    arguments."""
    kind: Any = model if isinstance(model, type) else type(model)
    newer = CACHE_NAMES[1] in inspect.signature(kind.forward).parameters
    return CACHE_NAMES[1] if newer else CACHE_NAMES[0]


def switch_on(model: Any, config: Any) -> None:
    """Registers and selects kvtier's attention. Other caches on the model are served by the stock
    implementation with its stock masks."""
    register()
    plain = getattr(config, "attn_logit_softcapping", None) or any(
        hasattr(module, "sinks") for module in model.modules()
    )
    current = getattr(config, "_attn_implementation", None)
    if current in NAMES:
        return
    if current not in (None, "sdpa", "eager"):
        raise Unsupported(
            f"the model attends with {current!r}: load it with attn_implementation=\"sdpa\""
        )
    model.set_attn_implementation(EAGER if plain or current == "eager" else SDPA)


def register() -> None:
    """Puts both names into transformers' registries; once is enough, twice does no harm."""
    for name, stock in ((SDPA, "sdpa"), (EAGER, "eager")):
        AttentionInterface.register(name, _attention_over(stock))
        AttentionMaskInterface.register(name, _mask_over(stock))


def _mask_over(stock: str) -> Callable[..., torch.Tensor | None]:
    def mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        if isinstance(kwargs.get("kv_length"), TieredLength):
            # [rows, positions] or None. Causality is the runtime's affair: the stock mask would
            # take queries * keys bytes.
            padding = kwargs.get("attention_mask")
            return None if padding is None or bool(padding.all()) else padding
        return ALL_MASK_ATTENTION_FUNCTIONS[stock](*args, **kwargs)

    return mask


def _attention_over(stock: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        mark = getattr(key, _MARK, None)
        key, value = key.as_subclass(torch.Tensor), value.as_subclass(torch.Tensor)
        listener = getattr(module, _LISTENER, None)
        if isinstance(mark, Call):
            mark.take(key, value)
            answer = _tiered(mark, query, attention_mask, scaling, kwargs), None
        else:
            inner = _stock_function(stock, module)
            given = (inner, stock, module, query, key, value, attention_mask, scaling, kwargs)
            if isinstance(mark, Store):
                mark.stock_calls += 1
                answer = _exempt(*given)
            else:
                answer = _untiered(*given, expected=listener is not None)
        if listener not in (None, _deaf):
            listener(_heard(module, mark, query, key, value, answer[0], scaling, kwargs))
        return answer

    return attention


def _untiered(
    inner: Callable[..., Any],
    stock: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
    *,
    expected: bool,
) -> Any:
    """Stock attention, with a warning where nobody can have meant it."""
    if not expected and kwargs.get("sliding_window") is None:
        warnings.warn(
            "a model with kvtier's attention ran without a TieredCache (use_cache=False, or "
            "another cache): stock attention over every token",
            StockAttentionWarning,
            stacklevel=3,
        )
    return inner(module, query, key, value, mask, scaling=scaling, **kwargs)


def _heard(
    module: torch.nn.Module,
    mark: Call | Store | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Heard:
    count = query.shape[2]
    return Heard(
        layer=int(module.layer_idx),  # type: ignore[arg-type]
        begin=mark.end - count if isinstance(mark, Call) else key.shape[2] - count,
        query=query,
        keys=key[:, :, -count:],
        values=value[:, :, -count:],
        out=out,
        exact=not isinstance(mark, Call) or mark.store.is_exact(count),
        tiered=isinstance(mark, Call),
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        softcap=kwargs.get("softcap") or 0.0,
        sinks=kwargs.get("s_aux"),
        sliding_window=kwargs.get("sliding_window"),
    )


def _tiered(
    call: Call,
    query: torch.Tensor,
    padding: torch.Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    if padding is not None and padding.dim() != 2:
        raise Unsupported(
            f"an attention mask of shape {list(padding.shape)}: kvtier takes padding [rows, "
            "positions]; what may attend what is causal"
        )
    if kwargs.get("sliding_window") is not None:
        raise Unsupported("a sliding window reached a tiered layer: exempt it")
    if kwargs.get("dropout"):
        raise Unsupported("attention dropout: call model.eval()")
    if kwargs.get("is_causal") is False:
        raise Unsupported("bidirectional attention")
    return call.store.attend(
        call, query, padding, scaling, kwargs.get("softcap"), kwargs.get("s_aux")
    )


def _stock_function(stock: str, module: torch.nn.Module) -> Callable[..., Any]:
    if stock != "eager":
        return ALL_ATTENTION_FUNCTIONS[stock]
    found = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if found is None:
        raise Unsupported(f"{type(module).__name__} has no plain attention function")
    return found


def _exempt(
    inner: Callable[..., Any],
    stock: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding: torch.Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """Stock attention with a causal mask made from the padding, for a few queries at a time."""
    if padding is not None and padding.dim() != 2:
        raise InvalidArgument(f"an attention mask of shape {list(padding.shape)}")
    count, length = query.shape[2], key.shape[2]
    parts = []
    for begin in range(0, count, _MASK_QUERIES):
        part = query[:, :, begin : begin + _MASK_QUERIES]
        positions = torch.arange(begin, begin + part.shape[2]) + length - count
        allowed = (torch.arange(length) <= positions[:, None])[None, None]
        if padding is not None:
            # A row of padding sees itself, so that no softmax is over nothing.
            own = torch.arange(length) == positions[:, None]
            allowed = (allowed & padding[:, None, None, :length].bool()) | own
        mask = allowed.expand(query.shape[0], 1, -1, -1)
        if stock == "eager":
            mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(
                ~mask, torch.finfo(query.dtype).min
            )
        parts.append(inner(module, part, key, value, mask, scaling=scaling, **kwargs)[0])
    return torch.cat(parts, dim=1), None

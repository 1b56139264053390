"""``attach``: from then on plain ``model.generate()`` runs over a tiered cache."""

from __future__ import annotations

from typing import Any

from ..errors import InvalidArgument
from . import attention, families
from .cache import TieredCache

# Tokens of a draft that may be stored before they are rejected.
_DRAFT_TOKENS = 64


class Attached:
    """What :func:`attach` returns: the latest cache, statistics, and the way back."""

    def __init__(self, model: Any, tokens_max: int | None, choices: dict[str, Any]) -> None:
        config = families.text_config(model)
        families.family(config, choices.get("allow_untested", False))
        self.model = model
        self.cache: TieredCache | None = None
        self._tokens_max = tokens_max
        self._choices = choices
        self._before = config._attn_implementation
        self._generate = model.generate
        attention.switch_on(model, config)
        model.generate = self.generate

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate`` with a new TieredCache, unless a cache is passed or switched off."""
        passed = any(kwargs.get(name) is not None for name in attention.CACHE_NAMES)
        if not passed and kwargs.get("use_cache", True):
            self.cache = None  # Returns its memory first, unless a result still holds it.
            tokens_max = self._tokens_max or _longest(self.model, args, kwargs)
            self.cache = TieredCache(self.model, tokens_max=tokens_max, **self._choices)
            kwargs[attention.cache_name(self.model)] = self.cache
        return self._generate(*args, **kwargs)

    def stats(self) -> dict[str, Any]:
        """Of the latest cache; empty before the first call."""
        return {} if self.cache is None else self.cache.stats()

    def detach(self) -> None:
        """The model as it was. Caches that are still held go on living, unused."""
        if self.model.__dict__.get("generate") == self.generate:
            del self.model.__dict__["generate"]
        self.model.set_attn_implementation(self._before)
        self.cache = None

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *error: Any) -> None:
        self.detach()


def attach(model: Any, *, tokens_max: int | None = None, **choices: Any) -> Attached:
    """Makes ``model.generate()`` keep its KV on tiers and select what it attends.

    ``choices`` are those of :class:`TieredCache`. ``tokens_max`` None: what each call of
    ``generate`` can reach, by its input and ``max_new_tokens`` or ``max_length``; pass it for
    conversations that go on with one cache.
    """
    return Attached(model, tokens_max, choices)


def _longest(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    given = args[0] if args else kwargs.get("inputs")
    for name in ("input_ids", "inputs_embeds"):
        if given is None:
            given = kwargs.get(name)
    if given is None:
        raise InvalidArgument("pass tokens_max to attach: generate was called without input_ids")
    prompt = int(given.shape[1])
    config = kwargs.get("generation_config") or model.generation_config
    new = kwargs.get("max_new_tokens", getattr(config, "max_new_tokens", None))
    if new is not None:
        return prompt + int(new) + _DRAFT_TOKENS
    # 20 is generate()'s own default, beyond the prompt.
    whole = kwargs.get("max_length", getattr(config, "max_length", None)) or 20
    return max(int(whole), prompt + 20) + _DRAFT_TOKENS

"""Which models are known to work, and what of a configuration matters to the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import InvalidArgument, Unsupported

# Each is compared with the stock cache in tests/python/test_families.py.
TESTED = frozenset(
    "llama qwen2 qwen3 mistral phi3 glm4 olmo olmo2 gemma2 gemma3_text gemma4_text cohere2 gpt_oss "
    "qwen3_next qwen3_5_text deepseek_v2 deepseek_v3".split()
)

# Rotated in two halves, so that a selector which un-rotates keys can be told how.
_HALVES = frozenset("llama qwen2 qwen3 mistral phi3 olmo olmo2".split())

# Bounds of the attention kernels, kernels/partial_attention.h.
HEAD_DIM_STEP = 8
HEAD_DIM_MAX = 576
QUERIES_PER_KV_HEAD_MAX = 16


@dataclass(frozen=True)
class Family:
    model_type: str
    rope_theta: float  # 0 where selectors must not un-rotate.
    compressed: bool   # Multi-head latent attention, whose keys reach the cache expanded.


def text_config(model_or_config: Any) -> Any:
    config = getattr(model_or_config, "config", model_or_config)
    return config.get_text_config(decoder=True)


def family(config: Any, allow_untested: bool) -> Family:
    """Refuses by name what has not been compared with the stock cache."""
    name = config.model_type
    if name not in TESTED and not allow_untested:
        raise Unsupported(
            f"kvtier has not been compared with transformers' own cache for model type {name!r}; "
            f"it has for {', '.join(sorted(TESTED))}. Pass allow_untested=True to try."
        )
    return Family(
        model_type=name,
        rope_theta=_rope_theta(config) if name in _HALVES else 0.0,
        compressed=getattr(config, "kv_lora_rank", None) is not None,
    )


def _rope_theta(config: Any) -> float:
    """The base of plain rotary embeddings, 0 where they are scaled or partial."""
    parameters = getattr(config, "rope_parameters", None) or {}
    scaling = getattr(config, "rope_scaling", None) or {}
    kind = parameters.get("rope_type") or scaling.get("rope_type") or scaling.get("type")
    partial = parameters.get("partial_rotary_factor") or getattr(
        config, "partial_rotary_factor", None
    )
    if kind not in (None, "default") or partial not in (None, 1.0):
        return 0.0
    theta = parameters.get("rope_theta") or getattr(config, "rope_theta", None)
    return float(theta) if theta else 0.0


def check_shape(query_heads: int, kv_heads: int, head_dim: int, value_dim: int) -> None:
    """Refuses by name what the kernels do not take; they would at the first step."""
    for name, dim in (("head_dim", head_dim), ("value_dim", value_dim)):
        if dim % HEAD_DIM_STEP != 0 or dim > HEAD_DIM_MAX:
            raise Unsupported(
                f"{name} is {dim}: the kernels take multiples of {HEAD_DIM_STEP} up to "
                f"{HEAD_DIM_MAX}"
            )
    if query_heads % kv_heads != 0:
        raise Unsupported(f"{query_heads} query heads are no multiple of {kv_heads} KV heads")
    if query_heads // kv_heads > QUERIES_PER_KV_HEAD_MAX:
        raise Unsupported(
            f"{query_heads // kv_heads} query heads share a KV head: the kernels take up to "
            f"{QUERIES_PER_KV_HEAD_MAX}"
        )


def sink_logits(model: Any, layer_indices: list[int]) -> list[Any] | None:
    """The layers' parameters of attention sinks, for models that have them (GPT-OSS)."""
    by_layer = {
        module.layer_idx: module.sinks
        for module in model.modules()
        if getattr(module, "layer_idx", None) is not None and hasattr(module, "sinks")
    }
    if not by_layer:
        return None
    missing = [index for index in layer_indices if index not in by_layer]
    if missing:
        raise InvalidArgument(f"layers {missing} have no sink logits while others have")
    return [by_layer[index] for index in layer_indices]

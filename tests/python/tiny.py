"""Tiny random models and what the tests do with them."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from kvtier.transformers import TieredCache  # noqa: E402
from kvtier.transformers.attention import cache_name  # noqa: E402

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
# What the installed version calls the cache among a model's arguments.
CACHE = cache_name(transformers.LlamaForCausalLM)
VOCABULARY = 97

torch.set_num_threads(1)


def llama(seed=0, **changes):
    fields = dict(vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
                  num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=512,
                  bos_token_id=1, eos_token_id=None, pad_token_id=0)
    fields.update(changes)
    return built(transformers.LlamaForCausalLM, transformers.LlamaConfig(**fields), seed)


def built(kind, config, seed=0):
    torch.manual_seed(seed)
    model = kind(config).eval()
    # Random weights of the usual size give nearly uniform attention, in which errors hide.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "qkv" in name:
                weight.mul_(4.0)
    return model


def stock_of(model):
    """The same weights with the stock attention, whatever happens to `model`."""
    return copy.deepcopy(model)


def prompt(rows, tokens, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)


def tiered(model, **changes):
    fields = dict(tokens_max=256, device_capacity="30%", host_capacity="100%", budget=1.0,
                  threads=1, extent_bytes=16 << 10, window=16)
    fields.update(changes)
    return TieredCache(model, **fields)

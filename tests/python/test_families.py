"""Each family on a tiny random configuration against its stock cache, at budget 100 %."""

import pytest
from tiny import CACHE, VERSION, built, llama, prompt, stock_of, tiered, torch, transformers

import kvtier
from kvtier.transformers import TESTED_FAMILIES

SMALL = dict(vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=4,
             num_attention_heads=6, num_key_value_heads=2, head_dim=8,
             max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None)
FULL = {"layer_types": ["full_attention"] * 4}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
           shared_expert_intermediate_size=32)
LINEAR = dict(layer_types=["linear_attention", "full_attention"] * 2, linear_num_key_heads=2,
              linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
              linear_conv_kernel_dim=4)
LATENT = dict(q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8,
              v_head_dim=16, num_key_value_heads=6, head_dim=8, n_routed_experts=4,
              moe_intermediate_size=32, n_group=1, topk_group=1, num_experts_per_tok=2,
              n_shared_experts=1, first_k_dense_replace=2)

# model type: (class, what differs, tiered layers)
CASES = {
    "llama": ("Llama", {}, 4),
    "qwen2": ("Qwen2", {}, 4),
    "qwen3": ("Qwen3", {}, 4),
    "mistral": ("Mistral", {"sliding_window": None}, 4),
    "phi3": ("Phi3", {"sliding_window": None}, 4),
    "glm4": ("Glm4", {}, 4),
    "olmo": ("Olmo", {}, 4),
    "olmo2": ("Olmo2", {}, 4),
    "gemma2": ("Gemma2", {**MIXED, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}, 2),
    "gemma3_text": ("Gemma3", {**MIXED, "query_pre_attn_scalar": 8}, 2),
    "cohere2": ("Cohere2", MIXED, 2),
    "gpt_oss": ("GptOss", {**MIXED, "num_local_experts": 4, "num_experts_per_tok": 2}, 2),
    "qwen3_next": ("Qwen3Next", {**MOE, **LINEAR}, 2),
    "qwen3_5_text": ("Qwen3_5", LINEAR, 2),
    "gemma4_text": ("Gemma4", {**MIXED, "global_head_dim": 8, "num_kv_shared_layers": 0,
                               "hidden_size_per_layer_input": 0}, 2),
    "deepseek_v2": ("DeepseekV2", {**LATENT, "topk_method": "greedy"}, 4),
    "deepseek_v3": ("DeepseekV3", LATENT, 4),
}


def model_of(name):
    kind, changes, layers = CASES[name]
    config = getattr(transformers, kind + "TextConfig", None) or getattr(
        transformers, kind + "Config", None)
    model = getattr(transformers, kind + "ForCausalLM", None)
    if config is None or model is None:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    if name == "qwen3_next" and VERSION < (5, 17):
        pytest.skip("its cache is no transformers.Cache in this version")
    made = config(**{**SMALL, **changes})
    # Plain attention throughout: SDPA knows neither capping nor sinks.
    made._attn_implementation = "eager"
    built_model = built(model, made)
    for module in built_model.modules():
        if hasattr(module, "sinks"):
            torch.nn.init.normal_(module.sinks, std=2.0)
    return built_model, layers


def test_every_family_that_is_called_tested_is_tested():
    assert set(CASES) == set(TESTED_FAMILIES)


@pytest.mark.parametrize("name", sorted(CASES))
def test_logits_are_those_of_the_stock_cache(name):
    model, layers = model_of(name)
    stock = stock_of(model)
    ids = prompt(2, 75)
    mask = torch.ones_like(ids)
    if name not in ("qwen3_next", "qwen3_5_text"):  # Linear layers mix padding in, stock as well.
        mask[1, :13] = 0
    plain = transformers.DynamicCache(config=stock.config)
    with tiered(model) as cache, torch.no_grad():
        assert cache.stats()["layers"] == layers
        begin = 0
        for size in [50, 1, 1, 20, 3]:
            arguments = dict(attention_mask=mask[:, : begin + size],
                             position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, begin:begin + size])
            part = ids[:, begin : begin + size]
            expected = stock(part, **{CACHE: plain}, **arguments).logits
            found = model(part, **{CACHE: cache}, **arguments).logits
            seen = mask[:, begin : begin + size].bool()
            torch.testing.assert_close(found[seen], expected[seen], atol=1e-4, rtol=0)
            begin += size
        stats = cache.stats()
        assert stats["exact_calls"] == 2 * 2 * layers
        assert stats["selected_calls"] == 3 * 2 * layers
        assert (stats["latent_attention"] == "expanded") == name.startswith("deepseek")


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_exempt_layers(name):
    model, layers = model_of(name)
    stock = stock_of(model)
    ids = prompt(1, 60)
    full = [1] if name == "gpt_oss" else [0, 2]
    plain = transformers.DynamicCache(config=stock.config)
    with tiered(model, exempt_layers=tuple(full)) as cache, torch.no_grad():
        for part in (ids[:, :40], ids[:, 40:41], ids[:, 41:]):
            torch.testing.assert_close(model(part, **{CACHE: cache}).logits,
                                       stock(part, **{CACHE: plain}).logits, atol=1e-4, rtol=0)
        assert cache.stats()["layers"] == layers - len(full)
        assert cache.stats()["stock_calls"] == 3 * len(full)


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2", "qwen3_next", "deepseek_v3"])
def test_greedy_text(name):
    model, _ = model_of(name)
    stock = stock_of(model)
    how = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
    expected = stock.generate(prompt(1, 40), **how)
    with tiered(model) as cache:
        assert model.generate(prompt(1, 40), **{CACHE: cache}, **how).tolist() == expected.tolist()


def test_another_family_is_refused_by_name():
    config = transformers.GPTNeoXConfig(vocab_size=97, hidden_size=48, num_hidden_layers=2,
                                        num_attention_heads=6, intermediate_size=64)
    model = built(transformers.GPTNeoXForCausalLM, config)
    with pytest.raises(kvtier.Unsupported, match="'gpt_neox'"):
        tiered(model)
    tiered(model, allow_untested=True).close()


@pytest.mark.parametrize("head_dim", [12, 584])
def test_a_head_dim_that_the_kernels_do_not_take_is_refused_by_name(head_dim):
    model = llama(head_dim=head_dim, num_attention_heads=2)
    with tiered(model) as cache, torch.no_grad():
        with pytest.raises(kvtier.Unsupported, match=f"head_dim is {head_dim}"):
            model(prompt(1, 10), **{CACHE: cache})


def test_many_queries_per_kv_head_are_refused_by_name():
    model = llama(hidden_size=144, num_attention_heads=18, num_key_value_heads=1)
    with tiered(model) as cache, torch.no_grad():
        with pytest.raises(kvtier.Unsupported, match="18 query heads share a KV head"):
            model(prompt(1, 10), **{CACHE: cache})

"""generate() over a TieredCache at budget 100 % against the stock cache."""

import pytest
from tiny import CACHE, VERSION, VOCABULARY, llama, prompt, stock_of, tiered, torch, transformers

import kvtier
from kvtier.transformers import TieredCache, attach

PLAIN = dict(max_new_tokens=24, do_sample=False, pad_token_id=0)


def logits_of(model, ids, cache=None, chunks=None, mask=None):
    """Teacher-forced logits, fed in chunks of the given sizes."""
    parts, begin = [], 0
    with torch.no_grad():
        for size in chunks or [ids.shape[1]]:
            arguments = {} if mask is None else {
                "attention_mask": mask[:, : begin + size],
                "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, begin : begin + size]}
            parts.append(model(ids[:, begin : begin + size], **{CACHE: cache},
                               use_cache=cache is not None, **arguments).logits)
            begin += size
    return torch.cat(parts, dim=1)


def assert_same_text(model, stock, ids, cache=None, **how):
    how = {**PLAIN, **how}
    expected = stock.generate(ids, **how)
    found = model.generate(ids, **{CACHE: cache}, **how)
    assert found.tolist() == expected.tolist()
    return found


def test_greedy_with_a_disk_tier(tmp_path):
    model = llama()
    stock = stock_of(model)
    with tiered(model, device_capacity="10%", host_capacity="30%", disk_path=str(tmp_path),
                extent_bytes=8 << 10) as cache:
        assert_same_text(model, stock, prompt(1, 200), cache)
        stats = cache.stats()
        assert stats["exact_calls"] == 3 and stats["selected_calls"] == 3 * 23
        assert stats["stock_calls"] == 0 and stats["attended_share"] == 1.0
        assert stats["runtime"]["host_to_disk_bytes"] > 0
        assert stats["runtime"]["disk_to_host_bytes"] > 0


@pytest.mark.parametrize("chunks", [[100], [40, 40, 20], [60] + [1] * 40, [50, 8, 8, 3, 1, 30]])
def test_logits_in_any_chunking(chunks):
    model = llama()
    ids = prompt(2, sum(chunks))
    expected = logits_of(stock_of(model), ids)
    with tiered(model) as cache:
        torch.testing.assert_close(logits_of(model, ids, cache, chunks), expected,
                                   atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunks", [[60, 1, 1], [40, 15, 4, 3]])
def test_left_padding(chunks):
    model = llama()
    ids = prompt(3, 62)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    mask[2, :45] = 0  # Beyond the first chunk of the second case.
    expected = logits_of(stock_of(model), ids, transformers.DynamicCache(), chunks, mask)
    with tiered(model) as cache:
        found = logits_of(model, ids, cache, chunks, mask)
        seen = mask.bool()
        torch.testing.assert_close(found[seen], expected[seen], atol=1e-4, rtol=0)
        assert [s.tokens(0) for s in cache.store.sequences] == [62, 51, 17]


def test_generate_with_left_padding():
    model = llama()
    ids = prompt(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    with tiered(model) as cache:
        assert_same_text(model, stock_of(model), ids, cache, attention_mask=mask)


def test_a_mask_that_changes_its_mind_is_refused():
    model = llama()
    ids = prompt(1, 40)
    mask = torch.ones_like(ids)
    with tiered(model) as cache, torch.no_grad():
        model(ids[:, :30], **{CACHE: cache}, attention_mask=mask[:, :30])
        mask[0, 3] = 0
        with pytest.raises(kvtier.InvalidArgument, match="attention_mask differs"):
            model(ids[:, 30:], **{CACHE: cache}, attention_mask=mask)


def test_sampling_draws_the_same():
    model = llama()
    stock = stock_of(model)
    how = {**PLAIN, "do_sample": True, "temperature": 0.8, "top_k": 20}
    torch.manual_seed(5)
    expected = stock.generate(prompt(2, 50), **how)
    with tiered(model) as cache:
        torch.manual_seed(5)
        found = model.generate(prompt(2, 50), **{CACHE: cache}, **how)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("rows", [1, 2])
def test_beams(rows):
    model = llama()
    with tiered(model) as cache:
        assert_same_text(model, stock_of(model), prompt(rows, 50), cache, num_beams=3)
        assert len(cache.store.sequences) == 3 * rows


def test_assisted_generation_truncates():
    model, assistant = llama(), llama(seed=3, num_hidden_layers=1)
    with tiered(model) as cache:
        assert_same_text(model, stock_of(model), prompt(1, 50), cache, assistant_model=assistant)
        # Rejected drafts are gone from every layer.
        assert len({layer.length for layer in cache._tiered}) == 1
        assert cache.store.sequences[0].tokens(0) == cache._tiered[0].length


def test_prompt_lookup_truncates():
    model = llama()
    ids = prompt(1, 12).repeat(1, 5)
    with tiered(model) as cache:
        assert_same_text(model, stock_of(model), ids, cache, prompt_lookup_num_tokens=5,
                         eos_token_id=2)


def test_chunked_prefill():
    model = llama()
    # 5.0 chunks only where it is handed a cache, the stock one too.
    expected = stock_of(model).generate(prompt(1, 90), **PLAIN)
    with tiered(model) as cache:
        found = model.generate(prompt(1, 90), **{CACHE: cache}, prefill_chunk_size=32, **PLAIN)
        assert found.tolist() == expected.tolist()
        assert cache.stats()["exact_calls"] >= 3 * 3


def test_two_turns_and_a_stream():
    model = llama()
    stock = stock_of(model)

    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    with tiered(model) as cache:
        first = assert_same_text(model, stock, prompt(1, 40), cache)
        second = torch.cat([first, prompt(1, 9, seed=8)], dim=1)
        streamer = Streamer()
        expected = stock.generate(second, **PLAIN)
        found = model.generate(second, **{CACHE: cache}, streamer=streamer, **PLAIN)
        assert found.tolist() == expected.tolist()
        assert streamer.tokens == found[0].tolist() + ["end"]


def test_two_caches_on_one_model_are_told_apart():
    model = llama()
    stock = stock_of(model)
    ids = [prompt(1, 60, seed=1), prompt(1, 60, seed=2)]
    expected = [logits_of(stock, each) for each in ids]
    found = [[], []]
    with tiered(model) as first, tiered(model) as second, torch.no_grad():
        for begin, end in [(0, 40), (40, 41), (41, 50), (50, 60)]:
            for which, cache in ((0, first), (1, second)):
                found[which].append(
                    model(ids[which][:, begin:end], **{CACHE: cache}).logits)
        # A stock cache between them, on the model that has kvtier's attention.
        plain = logits_of(model, ids[0], transformers.DynamicCache(config=model.config))
        torch.testing.assert_close(plain, expected[0], atol=1e-5, rtol=0)
    for which in (0, 1):
        torch.testing.assert_close(
            torch.cat(found[which], dim=1), expected[which], atol=1e-4, rtol=0)


def test_layers_of_two_caches_interleaved():
    """The updates of both caches come before either attention: the order that a ticket per layer
    would confuse."""
    from kvtier.transformers import attention

    model = llama()
    function = transformers.AttentionInterface()[attention.SDPA]
    with tiered(model) as first, tiered(model) as second, torch.no_grad():
        module = model.model.layers[0].self_attn
        keys = torch.randn(2, 1, 2, 20, 8)
        query = torch.randn(1, 6, 20, 8)
        handed = [cache.update(keys[i], keys[i], 0) for i, cache in enumerate((first, second))]
        for i in (1, 0):
            out, _ = function(module, query, *handed[i], None, scaling=0.3)
            expected = torch.nn.functional.scaled_dot_product_attention(
                query, keys[i].repeat_interleave(3, 1), keys[i].repeat_interleave(3, 1),
                is_causal=True, scale=0.3)
            torch.testing.assert_close(out, expected.transpose(1, 2), atol=1e-5, rtol=0)


def test_attach_needs_nothing_further():
    model = llama()
    stock = stock_of(model)
    ids = prompt(2, 70)
    with attach(model, device_capacity="50%", budget=1.0, threads=1) as attached:
        assert_same_text(model, stock, ids)
        assert attached.stats()["rows"] == 2
        # The next call starts over, with another batch.
        assert_same_text(model, stock, ids[:1, :30], num_beams=2)
        assert attached.stats()["rows"] == 2
        result = model.generate(ids[:1], return_dict_in_generate=True, **PLAIN)
        assert isinstance(result[CACHE], TieredCache)
    assert "generate" not in model.__dict__
    assert model.config._attn_implementation == stock.config._attn_implementation
    assert_same_text(model, stock, ids)


def test_exempt_layers_attend_everything():
    model = llama()
    ids = prompt(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    chunks = [50, 6, 3, 1]
    expected = logits_of(stock_of(model), ids, transformers.DynamicCache(), chunks, mask)
    with tiered(model, exempt_layers=(0, 2)) as cache:
        found = logits_of(model, ids, cache, chunks, mask)
        seen = mask.bool()
        torch.testing.assert_close(found[seen], expected[seen], atol=1e-4, rtol=0)
        assert cache.stats()["stock_calls"] == 2 * 4
        assert cache.stats()["layers"] == 1


@pytest.mark.parametrize("own", [False, True])
def test_a_small_budget_attends_little(own):
    model = llama()
    ids = prompt(1, 220)
    with tiered(model, budget=0.2, own_selection=own, window=8) as cache:
        logits = logits_of(model, ids, cache, [200] + [1] * 8 + [4] * 3)
        assert torch.isfinite(logits).all()
        assert 0.1 < cache.stats()["attended_share"] <= 0.25
        assert (logits - logits_of(stock_of(model), ids)).abs().max() > 1e-4


@pytest.mark.parametrize("selector", ["mean", "minmax", "recency", "prompt-observed", "cluster"])
def test_other_selectors_run(selector):
    if selector not in [entry["name"] for entry in kvtier.selectors()]:
        selector = next(entry["name"] for entry in kvtier.selectors()
                        if selector.split("-")[0] in entry["name"])
    model = llama()
    with tiered(model, selector=selector) as cache:
        assert_same_text(model, stock_of(model), prompt(1, 120), cache)


def test_reorder_select_and_repeat():
    model = llama()
    stock = stock_of(model)
    ids = prompt(2, 40)
    plain = transformers.DynamicCache()
    with tiered(model, sequences_max=4) as cache:
        for each, own in ((model, cache), (stock, plain)):
            logits_of(each, ids, own)
            own.batch_repeat_interleave(2)
            own.reorder_cache(torch.tensor([3, 0, 0, 3]))
            own.batch_select_indices(torch.tensor([0, 1, 2]))
        more = prompt(3, 5, seed=9)
        torch.testing.assert_close(logits_of(model, more, cache), logits_of(stock, more, plain),
                                   atol=1e-4, rtol=0)


def test_crop_means_what_it_means_in_this_version():
    model = llama()
    ids = prompt(1, 50)
    expected = logits_of(stock_of(model), ids)
    with tiered(model) as cache:
        logits_of(model, ids, cache)
        cache.crop(-20)
        assert cache.get_seq_length() == 30
        if VERSION < (5, 17):
            cache.crop(25)
            assert cache.get_seq_length() == 25
        else:
            cache.crop(0)
            assert cache.get_seq_length() == 30
        cache.keep(20)
        torch.testing.assert_close(
            logits_of(model, ids[:, 20:], cache), expected[:, 20:], atol=1e-4, rtol=0)
        cache.reset()
        torch.testing.assert_close(logits_of(model, ids, cache), expected, atol=1e-4, rtol=0)


def test_after_a_forward_that_failed_the_cache_can_be_cropped():
    model = llama()
    ids = prompt(1, 60)
    with tiered(model) as cache:
        logits_of(model, ids[:, :40], cache)
        middle = model.model.layers[1]
        handle = middle.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(OSError("x")))
        with pytest.raises(OSError):
            logits_of(model, ids[:, 40:], cache)
        handle.remove()
        cache.keep(40)
        torch.testing.assert_close(logits_of(model, ids[:, 40:], cache),
                                   logits_of(stock_of(model), ids)[:, 40:], atol=1e-4, rtol=0)


def test_misuse_is_named():
    model = llama()
    ids = prompt(1, 30)
    with pytest.raises(kvtier.InvalidArgument, match="budget"):
        tiered(model, budget=1.5)
    with pytest.raises(kvtier.InvalidArgument, match="exempt_layers"):
        tiered(model, exempt_layers=(9,))
    with pytest.raises(kvtier.Unsupported, match="no full-attention layer"):
        tiered(model, exempt_layers=(0, 1, 2))
    with tiered(model) as cache:
        with pytest.raises(kvtier.Unsupported, match="no gradients"):
            model(ids, **{CACHE: cache})
    with tiered(model) as cache, torch.no_grad():
        with pytest.raises(kvtier.Unsupported, match="attention mask of shape"):
            model(ids, **{CACHE: cache},
                  attention_mask=torch.ones(1, 1, 30, 30, dtype=torch.bool))
    with tiered(model) as cache, torch.no_grad():
        model(ids, **{CACHE: cache})
        with pytest.raises(kvtier.InvalidArgument, match="batch of 2"):
            model(prompt(2, 3), **{CACHE: cache})
    with tiered(model) as cache, torch.no_grad():
        model.set_attn_implementation("sdpa")
        model(ids, **{CACHE: cache})
        with pytest.raises(kvtier.InvalidArgument, match="never reached"):
            model(ids, **{CACHE: cache})


def test_too_long_is_named():
    model = llama()
    with tiered(model, tokens_max=40) as cache, torch.no_grad():
        with pytest.raises(kvtier.InvalidArgument, match="tokens_max|40"):
            model(prompt(1, 41), **{CACHE: cache})


def test_stock_attention_on_an_attached_model_is_not_silent():
    model = llama()
    tiered(model).close()
    with torch.no_grad(), pytest.warns(kvtier.StockAttentionWarning):
        model(prompt(1, 10), use_cache=False)


def test_caches_that_are_dropped_return_their_memory():
    import gc
    import weakref

    model = llama()
    cache = tiered(model)
    logits_of(model, prompt(1, 30), cache)
    runtime = weakref.ref(cache.store.runtime)
    finalizer = runtime()._finalizer
    del cache
    gc.collect()
    assert runtime() is None and not finalizer.alive
    assert VOCABULARY  # The model lives on.

"""A TieredCache that is saved and restored: what follows is as if it had never gone."""

import pytest
from test_families import model_of
from tiny import CACHE, llama, prompt, stock_of, tiered, torch

import kvtier

PLAIN = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)


def stored(model, folder, name="tiny", **changes):
    cache = tiered(model, **{"extent_bytes": 8 << 10, "deterministic": True, **changes})
    cache.open_store(folder / "store", model=name, capacity_bytes=16 << 20, free_bytes_min=0)
    return cache


def fed(model):
    """How many tokens each later forward computes."""
    counts = []

    def note(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        counts.append(ids.shape[1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    return counts


def test_generate_computes_only_what_was_not_restored(tmp_path):
    model = llama()
    stock = stock_of(model)
    ids = prompt(1, 200)
    with stored(model, tmp_path) as cache:
        text = model.generate(ids, **{CACHE: cache}, **PLAIN)
        assert text.tolist() == stock.generate(ids, **PLAIN).tolist()
        # The last token was drawn and never computed.
        saved = cache.save(text)
        run = cache.stats()["store"]["tokens_per_run"]
        assert saved == 211 // run * run > 0
    longer = torch.cat([text, prompt(1, 30, seed=5)], dim=1)
    with stored(model, tmp_path) as cache:
        stats = cache.stats()
        assert stats["exact_calls"] == stats["selected_calls"] == stats["positions"] == 0
        assert cache.restore(longer) == saved == cache.get_seq_length()
        counts = fed(model)
        again = model.generate(longer, **{CACHE: cache}, **PLAIN)
        assert counts == [longer.shape[1] - saved] + [1] * 11
        assert again.tolist() == stock.generate(longer, **PLAIN).tolist()


def test_one_token_is_left_to_compute(tmp_path):
    model = llama()
    ids = prompt(1, 200)
    with stored(model, tmp_path) as cache:
        expected = model.generate(ids, **{CACHE: cache}, **PLAIN)
        saved = cache.save(ids)
    with stored(model, tmp_path) as cache:
        run = cache.stats()["store"]["tokens_per_run"]
        assert cache.restore(ids[:, :saved]) == saved - run
    with stored(model, tmp_path) as cache:
        assert cache.restore(ids[0]) == saved
        assert model.generate(ids, **{CACHE: cache}, **PLAIN).tolist() == expected.tolist()


def test_nothing_found_leaves_an_empty_cache(tmp_path):
    model = llama()
    ids = prompt(1, 100)
    with stored(model, tmp_path) as cache:
        expected = model.generate(ids, **{CACHE: cache}, **PLAIN)
        cache.save(ids)
    with stored(model, tmp_path, name="other weights") as cache:
        assert cache.restore(ids) == 0
        assert model.generate(ids, **{CACHE: cache}, **PLAIN).tolist() == expected.tolist()


def test_padding_is_not_saved(tmp_path):
    model = llama()
    ids = prompt(1, 120)
    padded = torch.cat([torch.zeros((1, 7), dtype=torch.long), ids], dim=1)
    mask = (torch.arange(127) >= 7).long()[None]
    with stored(model, tmp_path) as cache:
        model.generate(padded, attention_mask=mask, **{CACHE: cache}, **PLAIN)
        saved = cache.save(padded)
    with stored(model, tmp_path) as cache:
        assert cache.restore(ids) == saved > 0
        found = model.generate(ids, **{CACHE: cache}, **PLAIN)
        assert found.tolist() == stock_of(model).generate(ids, **PLAIN).tolist()


def test_expanded_latents_come_back(tmp_path):
    model, _ = model_of("deepseek_v3")
    stock = stock_of(model)
    ids = prompt(1, 150)
    with stored(model, tmp_path) as cache, torch.no_grad():
        model(ids, **{CACHE: cache})
        saved = cache.save(ids)
    with stored(model, tmp_path) as cache, torch.no_grad():
        assert cache.restore(ids) == saved > 0
        torch.testing.assert_close(model(ids[:, saved:], **{CACHE: cache}).logits,
                                   stock(ids).logits[:, saved:], atol=1e-4, rtol=0)


def test_a_model_with_layers_of_another_kind_is_refused(tmp_path):
    model, _ = model_of("gemma2")
    with tiered(model) as cache:
        with pytest.raises(kvtier.Unsupported, match=r"layers \[0, 2\]"):
            cache.open_store(tmp_path / "store", model="tiny")


def test_misuse_is_named(tmp_path):
    model = llama()
    ids = prompt(1, 100)
    with tiered(model) as cache:
        for call in (cache.save, cache.restore):
            with pytest.raises(kvtier.InvalidArgument, match="open_store"):
                call(ids)
        cache.close_store()
    with tiered(model, exempt_layers=(1,)) as cache:
        with pytest.raises(kvtier.Unsupported, match=r"layers \[1\]"):
            cache.open_store(tmp_path / "store", model="tiny")
    with tiered(model) as cache, torch.no_grad():
        model(prompt(2, 20), **{CACHE: cache})
        with pytest.raises(kvtier.Unsupported, match="2 rows"):
            cache.open_store(tmp_path / "store", model="tiny")
    with stored(model, tmp_path) as cache:
        with pytest.raises(kvtier.InvalidArgument, match=r"expected \[tokens\]"):
            cache.restore(prompt(2, 20))
        cache.restore(ids)
        model.generate(ids, **{CACHE: cache}, **PLAIN)
        with pytest.raises(kvtier.InvalidArgument, match="111 positions"):
            cache.restore(ids)
        cache.close_store()
        with pytest.raises(kvtier.InvalidArgument, match="no store"):
            cache.save(ids)

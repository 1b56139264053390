"""Runtime and Sequence against plain attention, with NumPy alone."""

import gc
import resource
import threading

import numpy as np
import pytest
from reference import attention

import kvtier

HEADS, KV_HEADS, DIM = 6, 2, 16


def options(**changes):
    fields = dict(query_heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, tokens_max=1024,
                  dtype="float32", extent_bytes=16 << 10, threads=1, layers=2)
    fields.update(changes)
    return kvtier.Options(**fields)


def opened(device="100%", host="100%", disk=None, **changes):
    return kvtier.Runtime(kvtier.with_capacities(options(**changes), device, host, disk))


def rows(rng, tokens, heads=KV_HEADS, dim=DIM):
    return rng.standard_normal((tokens, heads, dim)).astype(np.float32)


def test_exact_attention_is_attention(rng):
    keys, values, queries = rows(rng, 300), rows(rng, 300), rows(rng, 40, HEADS)
    with opened() as runtime, runtime.create_sequence() as sequence:
        sequence.append(1, keys, values)
        assert sequence.tokens(1) == 300 and sequence.tokens(0) == 0
        lse = np.empty((40, HEADS), dtype=np.float32)
        out = sequence.attend(1, queries, lse=lse)
        np.testing.assert_allclose(out, attention(keys, values, queries), atol=2e-5)
        assert np.isfinite(lse).all()


@pytest.mark.parametrize("kind", ["capped", "sinks", "scaled", "value_dim"])
def test_variants_of_softmax(rng, kind):
    changes, extra, value_dim = {}, {}, DIM
    if kind == "capped":
        changes, extra = {"logit_cap": 2.0}, {"cap": 2.0}
    if kind == "sinks":
        logits = rng.standard_normal((2, HEADS)).astype(np.float32)
        changes, extra = {"sink_logits": logits.tolist()}, {"sinks": logits[1]}
    if kind == "scaled":
        changes, extra = {"softmax_scale": 0.7}, {"scale": 0.7}
    if kind == "value_dim":
        value_dim = 24
        changes = {"value_dim": value_dim}
    keys, values, queries = rows(rng, 90), rows(rng, 90, dim=value_dim), rows(rng, 3, HEADS)
    with opened(**changes) as runtime, runtime.create_sequence() as sequence:
        sequence.append(1, keys, values)
        expected = attention(keys, values, queries, **extra)
        np.testing.assert_allclose(sequence.attend(1, queries), expected, atol=2e-5)
        np.testing.assert_allclose(sequence.step(1, queries, 90), expected, atol=2e-5)


def test_steps_select_and_say_so(rng):
    keys, values, query = rows(rng, 800), rows(rng, 800), rows(rng, 1, HEADS)
    with opened() as runtime, runtime.create_sequence() as sequence:
        sequence.append(0, keys, values)
        out = np.full((1, HEADS, DIM), np.nan, dtype=np.float32)
        assert sequence.step(0, query, 120, out=out) is out
        assert np.isfinite(out).all()
        assert 0 < sequence.report["attended_tokens_max"] <= 120
        ranges = runtime.attended()
        by_group = [sum(r["tokens"] for r in ranges if r["head_group"] == g) for g in range(2)]
        assert max(by_group) == sequence.report["attended_tokens_max"]
        assert runtime.stats()["steps"] == 1
        assert runtime.stats_json()


def test_disk_in_use_gives_the_same_answers(rng, tmp_path):
    keys, values, queries = rows(rng, 1000), rows(rng, 1000), rows(rng, 20, HEADS)
    with opened("5%", "30%", disk_path=str(tmp_path)) as runtime:
        with runtime.create_sequence() as sequence:
            for begin in range(0, 1000, 37):
                for layer in range(2):
                    sequence.append(layer, keys[begin : begin + 37], values[begin : begin + 37])
            for layer in range(2):
                out = sequence.attend(layer, queries)
                np.testing.assert_allclose(out, attention(keys, values, queries), atol=2e-5)
            stats = runtime.stats()
            assert stats["host_to_disk_bytes"] > 0 and stats["disk_to_host_bytes"] > 0
            assert stats["blocks_verified"] > 0 and stats["blocks_failed"] == 0
            assert sequence.stats()["disk_bytes"] > 0


def test_truncate_and_fork(rng):
    keys, values, query = rows(rng, 500), rows(rng, 500), rows(rng, 1, HEADS)
    with opened(sequences_max=2, layers=1) as runtime, runtime.create_sequence() as parent:
        parent.append(0, keys[:400], values[:400])
        with parent.fork(250) as child:
            child.append(0, keys[400:], values[400:])
            parent.truncate(100)
            both = np.r_[0:250, 400:500]
            np.testing.assert_allclose(
                child.attend(0, query), attention(keys[both], values[both], query), atol=2e-5)
            with pytest.raises(kvtier.NoSpace):
                child.fork()
        np.testing.assert_allclose(
            parent.attend(0, query), attention(keys[:100], values[:100], query), atol=2e-5)


def test_strided_rows_are_read_where_they_lie(rng):
    # [kv_heads, tokens, 2 * dim]: keys and values side by side, heads first.
    packed = rng.standard_normal((KV_HEADS, 70, 2 * DIM)).astype(np.float32)
    keys, values = packed[:, :, :DIM].transpose(1, 0, 2), packed[:, :, DIM:].transpose(1, 0, 2)
    query = rows(rng, 1, HEADS)
    with opened(layers=1) as runtime, runtime.create_sequence() as sequence:
        sequence.append(0, keys, values)
        np.testing.assert_allclose(
            sequence.attend(0, query), attention(keys, values, query), atol=2e-5)


def test_half_precision(rng):
    keys, values = rows(rng, 60).astype(np.float16), rows(rng, 60).astype(np.float16)
    query = rows(rng, 1, HEADS).astype(np.float16)
    with opened(dtype="float16", layers=1) as runtime, runtime.create_sequence() as sequence:
        sequence.append(0, keys, values)
        out = sequence.attend(0, query)
        assert out.dtype == np.float16
        np.testing.assert_allclose(out, attention(keys, values, query), atol=2e-3)


def test_a_dlpack_exporter_is_read(rng):
    class Exporter:
        def __init__(self, array):
            self._array = array

        def __dlpack__(self, **arguments):
            return self._array.__dlpack__(**arguments)

        def __dlpack_device__(self):
            return self._array.__dlpack_device__()

    keys, values, query = rows(rng, 30), rows(rng, 30), rows(rng, 1, HEADS)
    with opened(layers=1) as runtime, runtime.create_sequence() as sequence:
        sequence.append(0, Exporter(keys), Exporter(values))
        np.testing.assert_allclose(
            sequence.attend(0, query), attention(keys, values, query), atol=2e-5)


def test_misuse_ends_in_a_message(rng):
    keys, query = rows(rng, 30), rows(rng, 1, HEADS)
    with opened(layers=1, sequences_max=2) as runtime:
        sequence = runtime.create_sequence()
        with pytest.raises(kvtier.InvalidArgument):
            sequence.step(0, query, 100)  # Before any token.
        with pytest.raises(kvtier.InvalidArgument, match=r"expected \[tokens, 2, 16\]"):
            sequence.append(0, keys[:, :1], keys[:, :1])
        with pytest.raises(kvtier.InvalidArgument, match="opened for float32"):
            sequence.append(0, keys.astype(np.float16), keys.astype(np.float16))
        with pytest.raises(kvtier.InvalidArgument, match="float64"):
            sequence.append(0, keys.astype(np.float64), keys)
        with pytest.raises(kvtier.InvalidArgument, match="last dimension"):
            sequence.append(0, np.swapaxes(rows(rng, 16, 2, 30), 0, 2), keys)
        with pytest.raises(kvtier.InvalidArgument, match="list"):
            sequence.append(0, keys.tolist(), keys)
        sequence.append(0, keys, keys)
        with pytest.raises(kvtier.InvalidArgument):
            sequence.append(7, keys, keys)
        with pytest.raises(kvtier.InvalidArgument, match="queries has shape"):
            sequence.step(0, query[:, :4], 100)
        with pytest.raises(kvtier.InvalidArgument, match="out must be"):
            sequence.step(0, query, 100, out=np.empty((2, HEADS, DIM), dtype=np.float32))
        with pytest.raises(kvtier.InvalidArgument):
            sequence.fork(31)
        freed = sequence._handle
        sequence.free()
        sequence.free()
        sequence._handle = freed
        with pytest.raises(kvtier.Error):
            sequence.append(0, keys, keys)
        with pytest.raises(kvtier.Error):
            sequence.fork(1)
    with pytest.raises(kvtier.InvalidArgument, match="closed"):
        runtime.create_sequence()


def test_a_tier_that_is_too_small_says_how_much_is_needed():
    with pytest.raises(kvtier.InvalidArgument, match=r"[0-9]"):
        kvtier.Runtime(kvtier.with_capacities(options(), 4096, "100%"))
    with pytest.raises(kvtier.Error, match="selector"):
        kvtier.Runtime(kvtier.with_capacities(options(selector="no-such-selector"), "1%", "1%"))
    with pytest.raises(kvtier.InvalidArgument, match="expected bytes"):
        kvtier.with_capacities(options(), "a lot", "100%")
    with pytest.raises(kvtier.InvalidArgument, match="disk_path"):
        kvtier.with_capacities(options(), "1%", "1%", "2GiB")


def test_two_threads_on_one_runtime(rng):
    keys = rows(rng, 1000)
    queries = rows(rng, 1000, HEADS)
    outcomes = []
    with opened(layers=1) as runtime, runtime.create_sequence() as sequence:
        sequence.append(0, keys, keys)

        def ask():
            for _ in range(20):
                try:
                    out = sequence.attend(0, queries)
                    outcomes.append(bool(np.isfinite(out).all()))
                except kvtier.Busy:
                    outcomes.append("busy")

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == 80 and False not in outcomes and True in outcomes
        assert sequence.tokens(0) == 1000


def test_a_thousand_sequences_leak_nothing(rng):
    keys, query = rows(rng, 64), rows(rng, 1, HEADS)
    with opened(layers=1, sequences_max=2, tokens_max=64) as runtime:

        def work(count):
            for _ in range(count):
                with runtime.create_sequence() as sequence:
                    sequence.append(0, keys, keys)
                    sequence.step(0, query, 64)
                    sequence.fork(32).free()
            gc.collect()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        work(200)
        begin = work(100)
        grown_kib = work(1000) - begin
        assert grown_kib < 2048
        assert runtime.stats()["device"]["used_bytes"] == 0


def test_a_collected_runtime_returns_its_memory(rng):
    def resident_kib():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

    def use():
        runtime = opened(layers=1, host="64MiB")
        runtime.create_sequence().append(0, rows(rng, 8), rows(rng, 8))

    use()
    gc.collect()
    begin = resident_kib()
    for _ in range(10):
        use()
    gc.collect()
    assert resident_kib() - begin < 64 << 10


def test_the_logger_hears_as_text(rng):
    heard = []
    with opened(layers=1, logger=heard.append) as runtime:
        runtime.create_sequence()
    assert all(isinstance(line, str) for line in heard)

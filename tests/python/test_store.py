"""Prefixes that outlive a runtime, with NumPy alone."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_runtime import HEADS, opened, rows

import kvtier

TOKENS = 900
CAPACITY = 16 << 20


def stored(path, **changes):
    """A runtime with the store in `path` open."""
    fields = dict(model="a model", capacity_bytes=CAPACITY, free_bytes_min=0)
    choices = {name: changes.pop(name) for name in list(changes)
               if name in ("model", "capacity_bytes", "tenant_salt", "durability", "key_file",
                           "read_only")}
    runtime = opened(disk_path=str(path), sequences_max=2, deterministic=True, **changes)
    runtime.open_store(path / "store", **{**fields, **choices})
    return runtime


def filled(runtime, keys, values):
    sequence = runtime.create_sequence()
    for layer in range(2):
        sequence.append(layer, keys, values)
    return sequence


@pytest.fixture
def ids(rng):
    return rng.integers(0, 2**32, TOKENS, dtype=np.uint32)


def answers(sequence, queries):
    exact = [sequence.attend(layer, queries) for layer in range(2)]
    return exact + [sequence.step(layer, queries[-1:], 200) for layer in range(2)]


def test_a_second_runtime_attends_bit_for_bit_what_was_saved(rng, ids, tmp_path):
    keys, values, queries = rows(rng, TOKENS), rows(rng, TOKENS), rows(rng, 5, HEADS)
    with stored(tmp_path) as runtime:
        sequence = filled(runtime, keys, values)
        saved = sequence.save(ids)
        run = runtime.store_stats()["tokens_per_run"]
        assert saved == TOKENS // run * run and 0 < saved < TOKENS
        assert runtime.store_stats()["written_bytes"] > 0
    with stored(tmp_path) as runtime, filled(runtime, keys[:saved], values[:saved]) as fresh:
        expected = answers(fresh, queries)
        restored, tokens = runtime.restore(ids)
        assert tokens == saved and restored.tokens(0) == restored.tokens(1) == saved
        for found, wanted in zip(answers(restored, queries), expected):
            assert np.array_equal(found, wanted)
        for layer in range(2):
            for sequence in (restored, fresh):
                sequence.append(layer, keys[saved:], values[saved:])
        for found, wanted in zip(answers(restored, queries), answers(fresh, queries)):
            assert np.array_equal(found, wanted)
        stats = runtime.store_stats()
        assert stats["read_bytes"] > 0 and stats["blocks_verified"] > 0
        assert stats["blocks_corrupt"] == 0


def test_a_changed_token_ends_the_prefix_before_it(rng, ids, tmp_path):
    keys = rows(rng, TOKENS)
    with stored(tmp_path) as runtime, filled(runtime, keys, keys) as sequence:
        sequence.save(ids)
        run = runtime.store_stats()["tokens_per_run"]
        changed = ids.copy()
        changed[2 * run] += 1
        restored, tokens = runtime.restore(changed)
        assert tokens == 2 * run
        restored.free()
        changed[0] += 1
        restored, tokens = runtime.restore(changed)
        assert tokens == 0 and restored.tokens(0) == 0
        restored.append(0, keys, keys)


@pytest.mark.parametrize("change", [{"model": "another"}, {"tenant_salt": "secret"}])
def test_another_model_or_tenant_finds_nothing(rng, ids, tmp_path, change):
    keys = rows(rng, TOKENS)
    with stored(tmp_path) as runtime:
        filled(runtime, keys, keys).save(ids)
    with stored(tmp_path, **change) as runtime:
        assert runtime.restore(ids)[1] == 0
    with stored(tmp_path) as runtime:
        assert runtime.restore(ids)[1] > 0


def test_what_is_forgotten_is_gone(rng, ids, tmp_path):
    keys = rows(rng, TOKENS)
    with stored(tmp_path) as runtime, filled(runtime, keys, keys) as sequence:
        sequence.save(ids.astype(np.int64))
        assert runtime.store_stats()["items"] > 0
        runtime.forget(ids)
        assert runtime.restore(ids)[1] == 0
        with pytest.raises(kvtier.NotFound):
            runtime.forget(ids)


def test_with_a_key_nothing_lies_in_the_clear(rng, ids, tmp_path):
    keys = rows(rng, TOKENS)
    # Known bytes in every block.
    keys[:, :, :4] = np.frombuffer(b"kvtier in clear!", dtype=np.float32)
    key_file = tmp_path / "key"
    key_file.write_bytes(rng.bytes(64))
    key_file.chmod(0o600)

    def lies_in_the_clear(store):
        return any(b"kvtier in clear!" in path.read_bytes() for path in store.iterdir())

    for name, choices in (("plain", {}), ("sealed", {"key_file": key_file})):
        folder = tmp_path / name
        folder.mkdir()
        with stored(folder, **choices) as runtime:
            filled(runtime, keys, keys).save(ids)
        assert lies_in_the_clear(folder / "store") == (name == "plain")
    with stored(tmp_path / "sealed", key_file=key_file) as runtime:
        assert runtime.restore(ids)[1] > 0


def test_a_process_that_was_killed_leaves_its_saves(ids, tmp_path):
    program = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT / "tests" / "python")!r}, {str(ROOT / "runtime" / "python")!r}]
from pathlib import Path
import numpy as np
from test_store import filled, stored
keys = np.ones(({TOKENS}, 2, 16), dtype=np.float32)
runtime = stored(Path({str(tmp_path)!r}))
filled(runtime, keys, keys).save(np.load({str(tmp_path / "ids.npy")!r}))
os.kill(os.getpid(), signal.SIGKILL)
"""
    np.save(tmp_path / "ids.npy", ids)
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    with stored(tmp_path) as runtime:
        assert runtime.restore(ids)[1] > 0


def test_misuse_ends_in_a_message(rng, ids, tmp_path):
    keys = rows(rng, TOKENS)
    with opened() as runtime, filled(runtime, keys, keys) as sequence:
        for call in (lambda: sequence.save(ids), lambda: runtime.restore(ids),
                     lambda: runtime.forget(ids), runtime.store_stats):
            with pytest.raises(kvtier.InvalidArgument, match="no store is open"):
                call()
        runtime.close_store()
        with pytest.raises(kvtier.InvalidArgument, match="none, clean, crash, power"):
            runtime.open_store(tmp_path / "store", model="m", durability="certainly")
        with pytest.raises(kvtier.InvalidArgument, match="capacity_bytes"):
            runtime.open_store(tmp_path / "store", model="m", capacity_bytes=-1)
    with stored(tmp_path) as runtime, filled(runtime, keys, keys) as sequence:
        with pytest.raises(kvtier.Busy, match="close it first"):
            runtime.open_store(tmp_path / "other", model="m", capacity_bytes=CAPACITY)
        with pytest.raises(kvtier.Busy):
            stored(tmp_path)
        with pytest.raises(kvtier.InvalidArgument, match="901 token ids"):
            sequence.save(np.zeros(901, dtype=np.uint32))
        with pytest.raises(kvtier.InvalidArgument):
            sequence.save(ids[:3])
        with pytest.raises(kvtier.InvalidArgument, match=r"expected \[tokens\]"):
            sequence.save(ids[None])
        with pytest.raises(kvtier.InvalidArgument, match="integers"):
            sequence.save(ids.astype(np.float32))
        with pytest.raises(kvtier.InvalidArgument, match="32 bits"):
            runtime.restore([-1])
        runtime.close_store()
        with stored(tmp_path) as second:
            assert second.restore([])[1] == 0

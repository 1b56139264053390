"""Recordings of tiny random models: what is in the trace, read back and attended once more."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from reference import attention
from test_families import CASES, model_of
from tiny import CACHE, llama, prompt, tiered, torch, transformers

import kvtier
import kvtier.transformers
from kvtier.trace import prompt_positions
from kvtier.transformers.recording import sentence_ends

ROOT = Path(__file__).resolve().parents[2]
TYPES = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32, "I32": np.int32, "I64": np.int64}


def read(path):
    """One safetensors file; its data must begin at a multiple of 4 KiB."""
    raw = Path(path).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    assert (size + 8) % 4096 == 0
    body = raw[8 + size :]
    assert max(each["data_offsets"][1] for each in header.values()) == len(body)
    return {
        name: np.frombuffer(body[slice(*each["data_offsets"])], TYPES[each["dtype"]])
        .reshape(each["shape"])
        for name, each in header.items()
    }


def manifest_of(path):
    """The manifest, its files compared with their digests and with what lies in the folder."""
    manifest = json.loads((path / "manifest.json").read_text())
    assert {each.name for each in path.iterdir()} == {"manifest.json", *manifest["files"]}
    for name, entry in manifest["files"].items():
        raw = (path / name).read_bytes()
        assert len(raw) == entry["bytes"]
        assert hashlib.sha256(raw).hexdigest() == entry["sha256"]
    return manifest


def generate(model, ids, new=12, **more):
    return model.generate(ids, max_new_tokens=new, do_sample=False, **more)


class Spy:
    """The stock attention's outputs by layer, as transformers computed them."""

    def __init__(self, model, layers):
        self.out = {layer: [] for layer in layers}
        for module in model.modules():
            if getattr(module, "layer_idx", None) in layers and hasattr(module, "o_proj"):
                module.o_proj.register_forward_pre_hook(self._hear(module.layer_idx))

    def _hear(self, layer):
        return lambda module, args: self.out[layer].append(args[0][0].detach().clone())


def test_a_recording_holds_what_the_model_attended(tmp_path):
    model = llama()
    layers, ids = [0, 2], prompt(1, 90)
    spy = Spy(model, layers)
    stock = generate(model, ids, **{CACHE: transformers.DynamicCache(config=model.config)})
    heads = model.config.num_attention_heads
    stock_out = {layer: torch.cat(parts).reshape(-1, heads, 8) for layer, parts in spy.out.items()}
    before = model.config._attn_implementation
    with kvtier.transformers.record(model, tmp_path / "trace", layers=layers, prompt_queries=16,
                                    about={"description": "a test"}) as recording:
        text = generate(model, ids)
    assert torch.equal(text, stock)
    assert model.config._attn_implementation == before
    manifest = manifest_of(tmp_path / "trace")
    assert manifest["kept_layers"] == layers and manifest["dtype"] == "float32"
    # The last token that was generated is not attended any more.
    assert (manifest["tokens"], manifest["context_tokens"], manifest["steps"]) == (101, 90, 11)
    assert manifest["description"] == "a test" and recording.difference < 1e-5
    tokens = read(tmp_path / "trace/tokens.safetensors")
    assert tokens["token_ids"].tolist() == text[0, :101].tolist()
    for layer in layers:
        found = read(tmp_path / f"trace/layer-{layer:03}.safetensors")
        assert found["keys"].shape == (101, 2, 8) and found["queries"].shape == (11, heads, 8)
        assert found["query_positions"].tolist() == list(range(90, 101))
        expected = attention(found["keys"], found["values"], found["queries"])
        assert np.abs(found["out"] - expected).max() < 1e-6
        # What transformers' own attention computed, and not only what we make of its inputs.
        own = stock_out[layer][90:101].numpy()
        assert np.abs(found["out"] - own).max() < 1e-5
        places = found["prompt_query_positions"]
        assert places.tolist() == prompt_positions(90, 16).tolist()
        assert found["prompt_queries"].shape == (16, heads, 8)


def test_prompt_queries_are_those_of_their_positions(tmp_path):
    model, ids = llama(), prompt(1, 40)
    for name, count in (("all", 40), ("some", 8), ("none", 0)):
        with kvtier.transformers.record(model, tmp_path / name, layers=[1], prompt_queries=count):
            generate(model, ids, new=3)
    whole = read(tmp_path / "all/layer-001.safetensors")
    some = read(tmp_path / "some/layer-001.safetensors")
    assert whole["prompt_query_positions"].tolist() == list(range(40))
    places = some["prompt_query_positions"]
    assert len(set(places.tolist())) == 8 and places.tolist() == sorted(places.tolist())
    assert places.tolist()[-4:] == [36, 37, 38, 39]
    assert np.array_equal(some["prompt_queries"], whole["prompt_queries"][places])
    assert "prompt_queries" not in read(tmp_path / "none/layer-001.safetensors")


def test_the_shipped_trace_has_the_same_prompt_positions():
    shipped = read(ROOT / "tests/traces/smollm2-8k-demo/layer-007.safetensors")
    assert np.array_equal(shipped["prompt_query_positions"], prompt_positions(7378, 512))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_types_are_rounded_and_the_oracle_is_of_what_is_stored(tmp_path, dtype):
    model, ids = llama(), prompt(1, 40)
    with kvtier.transformers.record(model, tmp_path / "exact", layers=[1]):
        generate(model, ids, new=5)
    with kvtier.transformers.record(model, tmp_path / "narrow", layers=[1], dtype=dtype):
        generate(model, ids, new=5)
    exact = read(tmp_path / "exact/layer-001.safetensors")
    narrow = read(tmp_path / "narrow/layer-001.safetensors")
    stored = {}
    for name in ("keys", "values", "queries"):
        rounded = torch.from_numpy(exact[name].copy()).to(getattr(torch, dtype))
        raw = narrow[name].view(np.int16).copy()
        assert torch.equal(rounded.view(torch.int16), torch.from_numpy(raw))
        stored[name] = rounded.double().numpy()
    expected = attention(stored["keys"], stored["values"], stored["queries"])
    assert np.abs(narrow["out"] - expected).max() < 1e-6


def test_chunks_turns_and_rejected_drafts_leave_the_tokens_that_count(tmp_path):
    model, ids = llama(), prompt(1, 60)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad(), kvtier.transformers.record(
        model, tmp_path / "trace", layers=[0, 1], context_tokens=50
    ):
        model(ids[:, :30], **{CACHE: cache})
        model(ids[:, 30:50], **{CACHE: cache})
        wrong = torch.full((1, 4), 5)
        model(wrong, **{CACHE: cache})
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :50], layer.values[:, :, :50]
        model(ids[:, 50:], **{CACHE: cache})
    manifest = manifest_of(tmp_path / "trace")
    assert (manifest["tokens"], manifest["context_tokens"]) == (60, 50)
    tokens = read(tmp_path / "trace/tokens.safetensors")["token_ids"]
    assert tokens.tolist() == ids[0].tolist()
    for layer in (0, 1):
        found = read(tmp_path / f"trace/layer-{layer:03}.safetensors")
        keys = cache.layers[layer].keys[0].transpose(0, 1).numpy()
        assert np.array_equal(found["keys"], keys)


def test_assisted_generation_records_what_was_accepted(tmp_path):
    model = llama()
    ids = prompt(1, 12).repeat(1, 3)  # Something to look up.
    with kvtier.transformers.record(model, tmp_path / "trace", layers=[0]) as recording:
        text = generate(model, ids, new=20, prompt_lookup_num_tokens=4, eos_token_id=2)
    tokens = read(tmp_path / "trace/tokens.safetensors")["token_ids"]
    assert recording.tokens >= 36 + 18
    known = min(len(tokens), text.shape[1])
    assert tokens[:known].tolist() == text[0, :known].tolist()


def test_a_tiered_cache_is_recorded_as_a_stock_one(tmp_path):
    model, ids = llama(), prompt(1, 80)
    with kvtier.transformers.record(model, tmp_path / "stock", layers=[1]):
        text = generate(model, ids, new=8)
    with tiered(model, budget=1.0) as cache, kvtier.transformers.record(
        model, tmp_path / "tiered", layers=[1]
    ) as recording:
        again = generate(model, ids, new=8, **{CACHE: cache})
    assert torch.equal(text, again) and recording.difference < 1e-4
    stock, found = (read(tmp_path / f"{name}/layer-001.safetensors") for name in
                    ("stock", "tiered"))
    for name in ("keys", "values", "queries", "out", "lse"):
        assert np.abs(stock[name] - found[name]).max() < 1e-4
    assert "tiered" in manifest_of(tmp_path / "tiered")["recorded_with"]


def test_what_selects_is_recorded_but_not_compared(tmp_path):
    """The oracle is exact attention, which a selecting step is not meant to give."""
    model, ids = llama(max_position_embeddings=1024), prompt(1, 300)
    with kvtier.transformers.attach(model, budget=40, window=16, threads=1), \
            kvtier.transformers.record(model, tmp_path / "trace", layers=[1]) as recording:
        generate(model, ids, new=6)
    assert recording.difference is None
    found = read(tmp_path / "trace/layer-001.safetensors")
    expected = attention(found["keys"], found["values"], found["queries"])
    assert np.abs(found["out"] - expected).max() < 1e-6
    # Behind both blocks the model is as it was.
    generate(model, prompt(1, 20), new=3)


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_family_is_recorded_as_it_attends(tmp_path, name):
    """Caps, sinks, latent attention: the recording compares its oracle with the model's outputs."""
    model, _ = model_of(name)
    with kvtier.transformers.record(model, tmp_path / "trace") as recording:
        generate(model, prompt(1, 40), new=4)
    assert recording.difference is not None and recording.difference < 1e-4
    manifest = manifest_of(tmp_path / "trace")
    assert manifest["kept_layers"] == recording.layers
    if name == "gemma2":
        assert manifest["logit_cap"] == 3.0
    if name == "gpt_oss":
        assert "sink_logits" in read(tmp_path / "trace/layer-001.safetensors")


# ---- What fails ------------------------------------------------------------------------------


def nothing_left(folder):
    return list(folder.iterdir()) == []


def refused(tmp_path, message, run, error=kvtier.Unsupported, **choices):
    model = llama()
    before = model.config._attn_implementation
    with pytest.raises(error, match=message):
        with kvtier.transformers.record(model, tmp_path / "trace", **choices):
            run(model)
    assert nothing_left(tmp_path)
    # The model is as it was, and can be recorded again.
    assert model.config._attn_implementation == before
    with kvtier.transformers.record(model, tmp_path / "next", layers=[0]):
        generate(model, prompt(1, 20), new=3)
    shutil.rmtree(tmp_path / "next")


def test_what_a_trace_cannot_hold_is_refused(tmp_path):
    refused(tmp_path, "batch of 2", lambda model: generate(model, prompt(2, 20)))
    refused(tmp_path, "batch of 3", lambda model: generate(model, prompt(1, 20), num_beams=3))
    mask = torch.ones((1, 20), dtype=torch.long)
    mask[0, :3] = 0
    refused(tmp_path, "padding",
            lambda model: generate(model, prompt(1, 20), attention_mask=mask))
    refused(tmp_path, "empty cache that grows",
            lambda model: generate(model, prompt(1, 20), cache_implementation="static"),
            error=kvtier.InvalidArgument)

    def twice(model):
        generate(model, prompt(1, 20))
        generate(model, prompt(1, 20))

    refused(tmp_path, "second sequence", twice)
    refused(tmp_path, "leaves no step", lambda model: generate(model, prompt(1, 20), new=1),
            error=kvtier.InvalidArgument)
    refused(tmp_path, "nothing ran", lambda model: None, error=kvtier.InvalidArgument)


def test_an_exception_inside_leaves_nothing(tmp_path):
    def fail(model):
        generate(model, prompt(1, 20))
        raise KeyError("mine")

    refused(tmp_path, "mine", fail, error=KeyError)


def test_a_name_is_never_overwritten(tmp_path):
    model = llama()
    (tmp_path / "trace").mkdir()
    with pytest.raises(kvtier.InvalidArgument, match="exists"):
        with kvtier.transformers.record(model, tmp_path / "trace"):
            pass
    (tmp_path / "trace").rmdir()
    with pytest.raises(kvtier.InvalidArgument, match="appeared"):
        with kvtier.transformers.record(model, tmp_path / "trace"):
            generate(model, prompt(1, 20))
            (tmp_path / "trace").mkdir()
    assert [each.name for each in tmp_path.iterdir()] == ["trace"]


def test_two_recordings_of_one_layer_are_refused(tmp_path):
    model = llama()
    with pytest.raises(kvtier.InvalidArgument, match="one recording at a time"):
        with kvtier.transformers.record(model, tmp_path / "one"):
            generate(model, prompt(1, 20))
            with kvtier.transformers.record(model, tmp_path / "two"):
                pass
    assert nothing_left(tmp_path)


def test_layers_that_cannot_be_recorded_are_named(tmp_path):
    model, _ = model_of("gemma2")
    with pytest.raises(kvtier.InvalidArgument, match=r"\[0\] are no full-attention layers"):
        kvtier.transformers.record(model, tmp_path / "trace", layers=[0, 1])


def test_a_misunderstood_model_is_refused(tmp_path):
    model = llama()
    from kvtier.transformers import attention as functions

    heard = functions._heard

    def doubled(*args):
        seen = heard(*args)
        seen.scale *= 4
        return seen

    functions._heard = doubled
    try:
        with pytest.raises(kvtier.Unsupported, match="differs from the model's own"):
            with kvtier.transformers.record(model, tmp_path / "trace"):
                generate(model, prompt(1, 60))
    finally:
        functions._heard = heard
    assert nothing_left(tmp_path)


def test_sentences_end_at_tokens():
    pieces = ["Mr", ".", " Wood", "house", ".", "\"", " He", " came", "!", "\n\n", "So", ".5", " on"]
    assert sentence_ends(pieces).tolist() == [2, 6, 9, 10, 13]


# ---- The command line tool -------------------------------------------------------------------


def program():
    for build in sorted((ROOT / "build").glob("*/tools/kvtier")):
        return build
    named = os.environ.get("KVTIER_PROGRAM")
    if named:
        return named
    pytest.skip("the program kvtier was not built")


def test_the_tool_replays_a_recording_and_finds_the_models_own_outputs(tmp_path):
    tool = program()
    model, layers = llama(head_dim=64, hidden_size=384, max_position_embeddings=2048), [0, 2]
    spy = Spy(model, layers)
    with kvtier.transformers.record(model, tmp_path / "trace", layers=layers, prompt_queries=32):
        generate(model, prompt(1, 600), new=10)
    # The oracle that the replay compares with is what transformers computed.
    for layer in layers:
        own = torch.cat(spy.out[layer]).view(609, 6, 64)[600:].numpy()
        out = read(tmp_path / f"trace/layer-{layer:03}.safetensors")["out"]
        assert np.abs(out - own).max() < 1e-5 * np.abs(own).max() + 1e-6
    shown = subprocess.run([tool, "inspect", tmp_path / "trace"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    replayed = subprocess.run(
        [tool, "replay", tmp_path / "trace", "--budget", "100%,20%", "--selector", "oracle",
         "--device-capacity", "60%", "--host-capacity", "80%", "--extent-bytes", "16KiB",
         "--threads", "1", "--format", "json"], capture_output=True, text=True)
    assert replayed.returncode == 0, replayed.stderr
    whole, part = json.loads(replayed.stdout)["runs"]
    assert whole["verified"] and part["verified"]
    assert whole["recall"]["min"] > 0.9999 and whole["output_error"]["max"] < 1e-5
    # A replay that compares with nothing would find no error here either.
    assert part["output_error"]["mean"] > 1e-3


def test_the_command_line_records(tmp_path, monkeypatch, capsys):
    from kvtier import record
    from kvtier.demo import talk

    model = llama()
    model.generation_config.eos_token_id = None

    class Letters:
        eos_token_id = None

        def __call__(self, text, add_special_tokens):
            from types import SimpleNamespace

            return SimpleNamespace(input_ids=[3 + ord(each) % 90 for each in text])

        def decode(self, ids):
            return "".join(chr(32 + each) for each in ids)

    monkeypatch.setattr(talk, "load", lambda path: (model, Letters()))
    monkeypatch.setattr(talk, "weights_name", lambda path: "sha256 0")
    (tmp_path / "prompt.txt").write_text("One sentence. And another one, of some length. So?")
    given = ["--model", str(tmp_path / "tiny.gguf"), "--prompt", str(tmp_path / "prompt.txt"),
             "--layers", "0,2", "--new-tokens", "6", "--chunk-tokens", "7"]
    record.main([*given, "--output", str(tmp_path / "trace"), "--text", "a test's, ours"])
    manifest = manifest_of(tmp_path / "trace")
    assert (manifest["context_tokens"], manifest["steps"]) == (50, 6)
    assert manifest["kept_layers"] == [0, 2] and manifest["dtype"] == "float16"
    assert manifest["text"] == "a test's, ours" and manifest["model"]["weights"] == "sha256 0"
    # The same without chunks.
    record.main([*given[:-2], "--output", str(tmp_path / "whole")])
    chunked, whole = (read(tmp_path / name / "layer-002.safetensors") for name in
                      ("trace", "whole"))
    assert np.abs(chunked["queries"].astype(float) - whole["queries"]).max() < 2e-3
    assert "6 of answer" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="exists"):
        record.main([*given, "--output", str(tmp_path / "trace")])

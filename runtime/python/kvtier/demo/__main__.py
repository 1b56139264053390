"""python -m kvtier.demo [--budget 0.05] [--selector scan] [--model FOLDER_OR_GGUF]"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .talk import WHEEL, Talk, find_model, load, weights_name

SYSTEM = "You are a helpful assistant. Read the text and answer the questions about it."
QUESTIONS = (
    "What is the special magic number for the red lantern mentioned in the text?",
    "What is the special magic number for the harbor key mentioned in the text?",
    "Who is Emma's governess in the text?",
)
# Answered by the second process.
NEXT_QUESTION = "What is the special magic number for the garden gate mentioned in the text?"
# Whole extents are saved: of short ones, less is left to compute when they are restored.
EXTENT_BYTES = 32 << 10
STORE_BYTES = 512 << 20
# Which layers' attention is compared with exact attention, for the recall that is printed.
PROBED_LAYERS = (7, 14, 21)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kvtier.demo", description=__doc__)
    parser.add_argument("--model", help="folder or .gguf file; default: the one in " + WHEEL)
    parser.add_argument("--budget", type=float, default=0.05, help="share of tokens attended")
    parser.add_argument("--selector", help="default: the library's")
    parser.add_argument("--device-capacity", default="10%")
    parser.add_argument("--host-capacity", default="30%")
    parser.add_argument("--disk-path", default=tempfile.gettempdir())
    parser.add_argument("--dtype", default="float16", help="of the stored KV")
    return parser.parse_args()


class RecallProbe:
    """How much of the attention that full attention pays to the text a step found."""

    def __init__(self, stock: Any, context: int) -> None:
        self.stock, self.context = stock, context
        self.shares: list[float] = []

    def __call__(self, runtime: Any, layer: int, queries: Any) -> None:
        import torch

        if layer not in PROBED_LAYERS or queries.shape[0] != 1:
            return
        keys = self.stock.layers[layer].keys[0, :, : self.context]
        block = runtime.options.tokens_per_block
        found = torch.zeros(keys.shape[:2], dtype=torch.bool)
        for item in runtime.attended():
            begin = item["block"] * block + item["first_token"]
            found[item["head_group"], begin : begin + item["tokens"]] = True
        grouped = queries[0].view(keys.shape[0], -1, keys.shape[2])
        weights = (grouped @ keys.transpose(1, 2) * keys.shape[2] ** -0.5).softmax(-1)
        self.shares.append(float((weights * found[:, None]).sum(-1).mean()))


def main() -> None:
    choices = arguments()
    path = find_model(choices.model)
    import torch
    import transformers

    from .. import library_version
    from ..transformers import TieredCache

    print(f"kvtier {library_version()}, transformers {transformers.__version__}, torch "
          f"{torch.__version__}, {torch.get_num_threads()} threads")
    print(f"Takes some 2 GB of memory, 1 GB of disk in {choices.disk_path} and some minutes on two "
          "cores; downloads nothing.")
    model, tokenizer = load(path)
    packed = Path(__file__).with_name("emma.txt.gz").read_bytes()
    text = gzip.decompress(packed).decode()
    prompt = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{text}"
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    print(f"Jane Austen, Emma, with three planted facts: {len(ids)} tokens\n", flush=True)
    cache_options = {
        "tokens_max": len(ids) + 512,
        "device_capacity": choices.device_capacity,
        "host_capacity": choices.host_capacity,
        "disk_path": choices.disk_path,
        "budget": choices.budget,
        "selector": choices.selector,
        "dtype": choices.dtype,
        "extent_bytes": EXTENT_BYTES,
    }
    with tempfile.TemporaryDirectory(dir=choices.disk_path, prefix="kvtier-demo-") as folder:
        saved: dict[str, Any] = {
            "model": str(path),
            "question": NEXT_QUESTION,
            "cache": cache_options,
            "store": f"{folder}/store",
        }
        with torch.inference_mode(), TieredCache(model, **cache_options) as cache:
            full = Talk(model, tokenizer, transformers.DynamicCache(config=model.config))
            tiered = Talk(model, tokenizer, cache)
            saved["ids"] = converse(choices, full, tiered, ids)
            cache.open_store(saved["store"], model=weights_name(path), capacity_bytes=STORE_BYTES)
            started = time.monotonic()
            tokens = cache.save(saved["ids"])
            took = time.monotonic() - started
            # One process at a time has a store open.
            cache.close_store()
            print(f"\nsaved the first {tokens} tokens in {took:.1f} s; a second process goes on\n")
            print(f"Q: {NEXT_QUESTION}")
            print(f"   full attention   {full.ask(NEXT_QUESTION)}")
            print(f"   not restored     {tiered.ask(NEXT_QUESTION)}", flush=True)
        conversation = Path(folder, "conversation.json")
        conversation.write_text(json.dumps(saved))
        command = [sys.executable, "-m", "kvtier.demo.resume", str(conversation)]
        sys.exit(subprocess.run(command).returncode)


def converse(
    choices: argparse.Namespace, full: Talk, tiered: Talk, ids: list[int]
) -> list[int]:
    """Reads the context, asks the questions of both and sums up; what kvtier's cache then holds."""
    probe = RecallProbe(full.cache, len(ids))
    tiered.cache.store.probe = probe
    prefill_s = {talk: talk.read(ids) for talk in (full, tiered)}
    first_token_s: dict[Talk, float] = {}
    for number, question in enumerate(QUESTIONS):
        print(f"Q: {question}")
        for talk, name in ((full, "full attention"), (tiered, f"{choices.budget:4.0%} of tokens")):
            print(f"   {name:16} {talk.ask(question, first=number == 0)}", flush=True)
            first_token_s.setdefault(talk, prefill_s[talk] + talk.first_token_s)
    tiered.cache.store.probe = None
    summary(choices, tiered.cache, probe)
    for talk, name in ((full, "full attention"), (tiered, "kvtier")):
        print(f"{name:14} prefill {prefill_s[talk]:6.1f} s, time to first token "
              f"{first_token_s[talk]:6.1f} s, {statistics.median(talk.step_s) * 1e3:6.1f} ms per "
              "token")
    return list(tiered.ids)


def summary(choices: argparse.Namespace, cache: Any, probe: RecallProbe) -> None:
    stats = cache.stats()
    runtime = stats["runtime"]
    hits = {tier: runtime[tier]["hits"] for tier in ("device", "host", "disk")}
    whole = max(sum(hits.values()), 1)
    print("\ntier     capacity      in use   attended blocks found there (sinks, window apart)")
    for tier, count in hits.items():
        sizes = [runtime[tier][name] / 2**20 for name in ("capacity_bytes", "used_bytes")]
        print(f"{tier:6} {sizes[0]:7.1f} MiB {sizes[1]:7.1f} MiB   {100 * count / whole:5.1f} %")
    if probe.shares:
        print(f"recall: {statistics.fmean(probe.shares):.3f} of full attention's weight on the "
              f"text, in layers {', '.join(map(str, PROBED_LAYERS))}, from "
              f"{stats['attended_share']:.1%} of the tokens")
    print(f"verified {runtime['blocks_verified']} blocks on arrival, "
          f"{runtime['blocks_failed']} lost; read {runtime['disk_to_host_bytes'] / 2**20:.0f} MiB "
          f"from {choices.disk_path}")


if __name__ == "__main__":
    main()

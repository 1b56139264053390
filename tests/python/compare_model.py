"""usage: compare_model.py MODEL_FOLDER [exact] [select]

A real model over kvtier's cache beside the stock cache, on the text of the shipped trace. `exact`:
float32 blocks, budget 100 %, a tenth on the device, three tenths in host memory, the rest on disk:
the largest difference of 256 teacher-forced logits. `select`: budget 5 % of 7.5K tokens in every
layer: Kullback-Leibler divergence of the next-token distributions, and time per token of both.
No test: takes minutes, and a model.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "runtime" / "python"))

from kvtier.transformers import TieredCache  # noqa: E402
from kvtier.transformers.attention import cache_name  # noqa: E402

CONTEXT = 7378  # Tokens before the first question.


def trace_tokens():
    raw = (ROOT / "tests/traces/smollm2-8k-demo/tokens.safetensors").read_bytes()
    import json

    size = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + size])["token_ids"]
    begin, end = entry["data_offsets"]
    kind = {"I32": np.int32, "I64": np.int64, "U32": np.uint32}[entry["dtype"]]
    ids = np.frombuffer(raw[8 + size + begin : 8 + size + end], dtype=kind)
    return torch.from_numpy(ids.astype(np.int64))[None]


def forward(model, ids, cache):
    return model(ids, **{cache_name(model): cache}).logits


def exact(model, ids):
    worst = 0.0
    for number, (begin, tokens) in enumerate(
        [(0, 600), (900, 300), (1500, 900), (3000, 50), (3400, 400), (4500, 600)]
    ):
        part = ids[:, begin : begin + tokens + 256]
        stock = DynamicCache(config=model.config)
        forward(model, part[:, :tokens], stock)
        expected = forward(model, part[:, tokens:], stock)[0]
        with tempfile.TemporaryDirectory() as folder, TieredCache(
            model, tokens_max=tokens + 256, device_capacity="10%", host_capacity="30%",
            disk_path=folder, budget=1.0, dtype="float32",
        ) as cache:
            forward(model, part[:, :tokens], cache)
            found = [forward(model, part[:, t : t + 1], cache)[0] for t in
                     range(tokens, tokens + 256)]
            difference = (torch.cat(found) - expected).abs().max().item()
            moved = cache.stats()["runtime"]["disk_to_host_bytes"]
        worst = max(worst, difference)
        print(f"prompt {number}: {tokens} + 256 tokens, largest difference {difference:.2e}, "
              f"{moved >> 20} MiB read from disk", flush=True)
    print(f"exact: largest difference {worst:.2e}", flush=True)


def select(model, ids, budget=0.05):
    stock = DynamicCache(config=model.config)
    started = time.monotonic()
    forward(model, ids[:, :CONTEXT], stock)
    stock_prefill = time.monotonic() - started
    with tempfile.TemporaryDirectory() as folder, TieredCache(
        model, tokens_max=ids.shape[1], device_capacity="10%", host_capacity="30%",
        disk_path=folder, budget=budget,
    ) as cache:
        started = time.monotonic()
        forward(model, ids[:, :CONTEXT], cache)
        print(f"prefill of {CONTEXT} tokens: stock {stock_prefill:.1f} s, kvtier "
              f"{time.monotonic() - started:.1f} s", flush=True)
        divergences, agree, times = [], 0, ([], [])
        for t in range(CONTEXT, ids.shape[1]):
            logits = []
            for which, own in enumerate((stock, cache)):
                started = time.monotonic()
                logits.append(forward(model, ids[:, t : t + 1], own)[0, 0].double())
                times[which].append(time.monotonic() - started)
            full, selected = (each.log_softmax(-1) for each in logits)
            divergences.append((full.exp() * (full - selected)).sum().item())
            agree += int(full.argmax() == selected.argmax())
        print(f"budget {budget:.0%}: mean KL {statistics.fmean(divergences):.4f}, largest "
              f"{max(divergences):.3f}, top-1 agreement {agree / len(divergences):.3f}")
        for name, took in zip(("stock", "kvtier"), times):
            print(f"{name}: {statistics.median(took) * 1e3:.1f} ms per token (median of "
                  f"{len(took)})")
        print({k: v for k, v in cache.stats().items() if k != "runtime"})
        print(cache.stats()["runtime"], flush=True)


def main():
    folder, *what = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = trace_tokens()
    with torch.inference_mode():
        for kind in what or ["exact", "select"]:
            {"exact": exact, "select": select}[kind](model, ids)


if __name__ == "__main__":
    main()

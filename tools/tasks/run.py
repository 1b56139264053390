"""usage: run.py --model FOLDER_OR_GGUF --output RESULTS.jsonl [options]

Asks a model questions about generated contexts (instances.py), with full attention and with each
selector and budget, and writes one line of JSON per question. An interrupted run goes on where it
stopped: lines that are there are not computed again. `table.py` makes the table.

Needs torch, transformers, the package kvtier (found in this source tree, too) and its library.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "runtime" / "python"))

import instances  # noqa: E402

# The library's default. Results say so before anything has been measured.
DEFAULT_SELECTOR = "scan"
SELECTORS = (
    "scan two-stage int4 vq soft-vote cluster mean minmax mean-minmax chunk-tree hierarchical "
    "chunk-summary sentence probe prompt-observed refresh(interval=4)/scan adaptive-budget/scan "
    "oracle recency random"
).split()
# Not run, and why, for the table's reader.
LEFT_OUT = {
    "landmark-token": "needs a model trained with landmark tokens",
    "external": "needs scores from a model's own indexer",
    "full": "is full attention cut at the budget",
    "head-class": "needs a profile of every layer of the model",
}
BUDGETS = (0.25, 0.10, 0.05)
ANSWER_TOKENS = 6


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--model", required=True, type=Path, help="Hugging Face folder or .gguf")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--kinds", default=",".join(instances.KINDS))
    parser.add_argument("--contexts", type=int, default=8, help="of each kind")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--words", type=int, default=1500, help="of a context; 1.35 tokens each")
    parser.add_argument("--selectors", default=";".join(SELECTORS), help="separated by semicolons")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    return parser.parse_args()


def main() -> None:
    choices = arguments()
    import torch

    import kvtier
    from kvtier.demo.talk import load, weights_name

    from asking import Asker
    from panel import Choice

    if choices.threads:
        torch.set_num_threads(choices.threads)
    wanted = [
        Choice(selector, float(budget))
        for selector in choices.selectors.split(";") for budget in choices.budgets.split(",")
    ]
    known = {str(entry["name"]) for entry in kvtier.selectors()}
    missing = [s for s in choices.selectors.split(";")
               if s.split("/")[-1].split("(")[0] not in known]
    if missing:
        sys.exit(f"no such selector: {', '.join(missing)}")
    header = {
        "schema": "kvtier.tasks", "version": 1, "model": weights_name(choices.model),
        "model_file": choices.model.name, "default_selector": DEFAULT_SELECTOR,
        "left_out": LEFT_OUT, "words": choices.words,
    }
    done = resume(choices.output, header)
    model, tokenizer = load(choices.model)
    filler = instances.Filler()
    asker = Asker(model, tokenizer, wanted, ANSWER_TOKENS)
    with torch.inference_mode(), choices.output.open("a") as output:
        for seed in range(choices.first_seed, choices.first_seed + choices.contexts):
            for kind in choices.kinds.split(","):
                context = instances.make(kind, seed, choices.words, filler)
                started, cpu = time.monotonic(), time.process_time()
                lines = asker.ask(context, done.get((kind, seed), {}))
                for line in lines:
                    output.write(json.dumps(line) + "\n")
                output.flush()
                print(f"{kind} {seed}: {sum(x['solved_by_full'] for x in lines)} of {len(lines)} "
                      f"solved by full attention, {time.monotonic() - started:.0f} s "
                      f"({time.process_time() - cpu:.0f} s of processor time)", flush=True)


def resume(path: Path, header: dict[str, Any]) -> dict[tuple[str, int], dict[int, Any]]:
    """What is in the file: by kind and seed, by question, the rows that are there. Another model's
    results are refused, not mixed in."""
    if not path.exists():
        path.write_text(json.dumps(header) + "\n")
        return {}
    first, *lines = path.read_text().splitlines()
    if json.loads(first) != header:
        sys.exit(f"{path} holds results of another model or other lengths: name a new file")
    done: dict[tuple[str, int], dict[int, Any]] = {}
    whole = []
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # The end of a run that was killed while it wrote.
        whole.append(line)
        asked = done.setdefault((entry["kind"], entry["seed"]), {})
        rows = asked.setdefault(entry["question"], {})
        rows.update(entry["rows"])
    path.write_text("\n".join([first, *whole]) + "\n")
    return done


if __name__ == "__main__":
    main()

"""usage: compare_exact.py [MODEL_FOLDER] RESULTS.json [--groups 5] [--modes single,batch,...]
          compare_exact.py --table RESULTS.json
Two processes take a file each and other --modes; `--merge OTHER.json` adds its results.

Budget 100 % against the stock cache with a real model in float32: float32 blocks, a tenth of the KV
on the device, three tenths in host memory, the rest on disk. Every mode makes the same forwards with
both caches, forcing the stock model's own greedy text on them, and compares all logits of 256 new
tokens; so greedy text is the same wherever the largest logit is the same, and where it is not, the
gap between the stock model's two largest is kept.

Groups of four prompts from the text of the shipped trace. Ends with 1 where a logit differs by more
than 1e-4, or a largest logit whose lead was wider. Minutes per group and mode, so `ctest` runs it
only with `-C long`, and where KVTIER_TEST_MODEL names a model's folder. What is in RESULTS.json is
not computed again.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import DynamicCache

from compare_model import trace_tokens
from kvtier.transformers import TieredCache
from kvtier.transformers.attention import cache_name

NEW = 256
TOLERANCE = 1e-4
GROUP = 4
# Tokens of the prompts of a group.
LENGTHS = (300, 180, 600, 240, 420)
# Tokens that the rows of a padded batch lack at their beginning.
SHORTER = (0, 37, 91, 140)
TURN, TURN_TOKENS = 96, 60     # Decoded before the second turn; tokens that it brings.
DRAFT, ACCEPTED = 6, 4         # Tokens of a draft with the one before it; how many are kept.
REORDER = 5                    # Steps from one reordering of beams to the next.


class Both:
    """The same forwards over the stock cache and over kvtier's, compared logit by logit.

    `alone` is what one forward over all tokens gives, where there is one: the stock cache's own
    distance from it says what the order of float32 sums is worth.
    """

    def __init__(self, model, tokens, folder, rows=1, alone=None):
        self.model, self.alone = model, alone
        self.stock = DynamicCache(config=model.config)
        self.cache = tiered(model, tokens, folder, rows)
        self.largest, self.noise, self.places, self.changed, self.gap = 0.0, 0.0, 0, 0, 0.0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.cache.close()

    def read(self, ids, **more):
        """Without a comparison: the prompt, which both compute in one forward."""
        for cache in (self.stock, self.cache):
            forward(self.model, ids, cache, **more)

    def decode(self, ids, at, kept=None, **more):
        """`ids` [rows, count] stand at position `at` of `alone`; the first `kept` are compared."""
        expected, found = (
            forward(self.model, ids, cache, **more)[:, :kept] for cache in (self.stock, self.cache)
        )
        self.largest = max(self.largest, difference(found, expected))
        if self.alone is not None:
            part = self.alone[:, at : at + expected.shape[1]]
            self.noise = max(self.noise, difference(part, expected))
        found, expected = (each.reshape(-1, each.shape[-1]) for each in (found, expected))
        self.places += found.shape[0]
        for row in (found.argmax(-1) != expected.argmax(-1)).nonzero().flatten():
            top = expected[row].topk(2).values
            self.changed += 1
            self.gap = max(self.gap, (top[0] - top[1]).item())

    def keep(self, tokens):
        for layer in self.stock.layers:
            layer.keys, layer.values = layer.keys[:, :, :tokens], layer.values[:, :, :tokens]
        self.cache.keep(tokens)

    def reorder(self, rows):
        self.stock.reorder_cache(rows)
        self.cache.reorder_cache(rows)

    def result(self, tokens):
        moved = self.cache.stats()["runtime"]["disk_to_host_bytes"]
        assert moved > 0, "nothing was read from disk: the comparison is not what it says"
        return {"prompt_tokens": tokens, "places": self.places, "largest": self.largest,
                "noise": self.noise, "changed": self.changed, "gap_of_changed": self.gap,
                "disk_bytes": moved}


def difference(found, expected):
    return (found - expected).abs().max().item()


def forward(model, ids, cache, **more):
    return model(ids, **{cache_name(model): cache}, **more).logits


def tiered(model, tokens, folder, rows=1):
    return TieredCache(model, tokens_max=tokens + 16, device_capacity="10%", host_capacity="30%",
                       disk_path=folder, budget=1.0, dtype="float32", sequences_max=rows,
                       extent_bytes=32 << 10)


def greedy(model, prompts):
    """[rows, NEW]: the stock model's text."""
    cache = DynamicCache(config=model.config)
    logits = forward(model, prompts, cache)[:, -1]
    told = []
    for _ in range(NEW):
        told.append(logits.argmax(-1, keepdim=True))
        logits = forward(model, told[-1], cache)[:, -1]
    return torch.cat(told, dim=1)


def in_one_forward(model, ids, **more):
    return forward(model, ids, DynamicCache(config=model.config), **more)


def stepwise(model, ids, tokens, folder):
    """Rows of equal length, token by token."""
    alone = in_one_forward(model, ids)
    with Both(model, ids.shape[1], folder, len(ids), alone) as both:
        both.read(ids[:, :tokens])
        for at in range(tokens, tokens + NEW):
            both.decode(ids[:, at : at + 1], at)
        return both.result(tokens)


def padding(model, ids, tokens, folder):
    mask = torch.ones_like(ids)
    for row, shorter in enumerate(SHORTER):
        mask[row, :shorter] = 0
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    alone = in_one_forward(model, ids, attention_mask=mask, position_ids=places)
    with Both(model, ids.shape[1], folder, len(ids), alone) as both:
        both.read(ids[:, :tokens], attention_mask=mask[:, :tokens],
                  position_ids=places[:, :tokens])
        for at in range(tokens, tokens + NEW):
            both.decode(ids[:, at : at + 1], at, attention_mask=mask[:, : at + 1],
                        position_ids=places[:, at : at + 1])
        return both.result(tokens)


def turns(model, ids, tokens, folder):
    """Decodes, reads another turn in one forward, decodes on."""
    turn = trace_tokens()[:, -TURN_TOKENS:]
    ids = torch.cat([ids[:, : tokens + TURN], turn, ids[:, tokens + TURN :]], dim=1)
    with Both(model, ids.shape[1], folder, alone=in_one_forward(model, ids)) as both:
        both.read(ids[:, :tokens])
        at = tokens
        while at < ids.shape[1]:
            count = TURN_TOKENS if at == tokens + TURN else 1
            both.decode(ids[:, at : at + count], at)
            at += count
        return both.result(tokens)


def assisted(model, ids, tokens, folder):
    """Drafts whose last tokens are wrong and are taken back, as assisted generation does it."""
    with Both(model, ids.shape[1], folder, alone=in_one_forward(model, ids)) as both:
        both.read(ids[:, :tokens])
        for at in range(tokens, tokens + NEW, ACCEPTED):
            draft = ids[:, at : at + DRAFT].clone()
            draft[:, ACCEPTED:] = 17
            both.decode(draft, at, ACCEPTED)
            both.keep(at + ACCEPTED)
        return both.result(tokens)


def beams(model, ids, tokens, folder):
    """One prompt, four rows that say different things and change places."""
    generator = torch.Generator().manual_seed(tokens)
    with Both(model, ids.shape[1], folder, GROUP) as both:
        both.read(ids[:1, :tokens].expand(GROUP, -1))
        for step, at in enumerate(range(tokens, tokens + NEW)):
            if step % REORDER == REORDER - 1:
                both.reorder(torch.randint(GROUP, (GROUP,), generator=generator))
            both.decode(ids[:, at : at + 1], at)
        return both.result(tokens)


# Whether a mode takes a group of prompts, or each prompt by itself.
MODES = {
    "single": (stepwise, False), "batch": (stepwise, True), "padding": (padding, True),
    "turns": (turns, False), "assisted": (assisted, False), "beams": (beams, True),
}


def group(model, number, results, path):
    """The prompts of a group with the stock model's text behind them."""
    length = LENGTHS[number % len(LENGTHS)]
    ids = trace_tokens()[0]
    begin = [(number * GROUP + row) * 340 for row in range(GROUP)]
    prompts = torch.stack([ids[each : each + length] for each in begin])
    if str(number) not in results["text"]:
        results["text"][str(number)] = greedy(model, prompts).tolist()
        path.write_text(json.dumps(results))
    return torch.cat([prompts, torch.tensor(results["text"][str(number)])], dim=1), length


def run(choices):
    from transformers import AutoModelForCausalLM

    path = choices.results
    results = json.loads(path.read_text()) if path.exists() else {"text": {}, "found": {}}
    torch.set_num_threads(choices.threads or torch.get_num_threads())
    model = AutoModelForCausalLM.from_pretrained(choices.model, dtype=torch.float32).eval()
    with torch.inference_mode():
        for number in range(choices.groups):
            ids, tokens = group(model, number, results, path)
            for mode in choices.modes.split(","):
                compare, together = MODES[mode]
                for row in [None] if together else range(GROUP):
                    name = f"{mode} {number} {'all' if row is None else row}"
                    if name in results["found"]:
                        continue
                    part = ids if row is None else ids[row : row + 1]
                    with tempfile.TemporaryDirectory() as folder:
                        results["found"][name] = compare(model, part, tokens, folder)
                    print(name, results["found"][name], flush=True)
                    path.write_text(json.dumps(results))


def exact(results):
    """Whether everything that was compared is within TOLERANCE."""
    return bool(results["found"]) and all(
        each["largest"] <= TOLERANCE and each["gap_of_changed"] <= TOLERANCE
        for each in results["found"].values()
    )


def table(results):
    print("| mode | prompts | of tokens | logits compared at | largest difference | the stock "
          "cache against one forward | another largest logit at, widest lead |")
    print("|---|---|---|---|---|---|---|")
    for mode, (_, together) in MODES.items():
        found = [v for k, v in results["found"].items() if k.split()[0] == mode]
        if not found:
            continue
        # Of beams one prompt is four rows.
        prompts = len(found) * (GROUP if together and mode != "beams" else 1)
        lengths = sorted({each["prompt_tokens"] for each in found})
        changed = sum(each["changed"] for each in found)
        lead = f", {max(each['gap_of_changed'] for each in found):.1e}" if changed else ""
        noise = max(each["noise"] for each in found)
        print(f"| {mode} | {prompts} | {lengths[0]} - {lengths[-1]} | "
              f"{sum(each['places'] for each in found)} | "
              f"{max(each['largest'] for each in found):.1e} | "
              f"{f'{noise:.1e}' if noise else ''} | {changed}{lead} |")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("results", type=Path)
    parser.add_argument("--groups", type=int, default=5)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--merge", type=Path, action="append", default=[])
    choices = parser.parse_args()
    if not choices.table:
        choices.model = choices.model or os.environ.get("KVTIER_TEST_MODEL")
        if not choices.model:
            sys.exit("skipped: no model; name a Hugging Face folder")
        run(choices)
    results = json.loads(choices.results.read_text())
    for other in choices.merge:
        results["found"].update(json.loads(other.read_text())["found"])
    table(results)
    sys.exit(0 if exact(results) else 1)


if __name__ == "__main__":
    main()

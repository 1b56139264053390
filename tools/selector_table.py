#!/usr/bin/env python3
"""Makes the tables of selectors/README.md, and the plot beside it, from recorded traces.

usage: tools/selector_table.py [--kvtier PROGRAM] [--selector NAMES] [--plot FILE.svg] TRACE...

Runs `kvtier replay` with every selector that a trace can feed, at budgets of 1, 2, 5 and 10 %, and
prints one Markdown table a trace. With --plot (needs matplotlib) it also runs block sizes of 1, 4,
8, 16 and 64 tokens and draws output error against bytes moved per step. Nothing here measures
time: that is `kvtier bench select`.
"""

import argparse
import json
import subprocess
import sys

BUDGETS = ["1%", "2%", "5%", "10%"]
BLOCK_TOKENS = [1, 4, 8, 16, 64]
# Of the runs with other block sizes: few enough to tell apart in a plot.
FRONTIER = ["oracle", "scan", "two-stage", "mean", "minmax"]


def replay(program, trace, selectors, budgets, block_tokens=8, extra=()):
    """The result of one replay, as parsed JSON; the device holds a tenth, host memory the rest."""
    command = [program, "replay", trace, "--selector", selectors, "--budget", ",".join(budgets),
               "--block-tokens", str(block_tokens), "--sinks", "4", "--window", "64",
               "--device-capacity", "12%", "--host-capacity", "120%", "--look-ahead", "0",
               "--format", "json", *extra]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit {done.returncode}")
    return json.loads(done.stdout)


def bytes_per_step(result, run):
    """KV bytes that cross the link for one layer's step, in the mean."""
    steps = result["trace"]["steps"] * len(result["trace"]["layers"])
    return run["bytes"]["host_to_device"] / steps


def hit_ratio(run):
    hits = run["tiers"]["device"]["hits"]
    total = sum(tier["hits"] for tier in run["tiers"].values())
    return hits / total if total else None


def number(value, form):
    return "–" if value is None else format(value, form)


def table(result):
    """Markdown: a row a selector, best far recall at 2 % first, a column group a budget."""
    runs = {}
    for run in result["runs"]:
        runs.setdefault(run["selector"], {})[run["budget"]] = run
    order = sorted(runs, key=lambda name: -(runs[name]["2%"]["recall_long_range"] or 0))
    budgets = [b for b in BUDGETS if b in next(iter(runs.values()))]
    tokens = result["trace"]["tokens"] * len(result["trace"]["layers"])
    print("| selector | keeps, B/token | " +
          " | ".join(f"{b}: recall, far of best, evidence, error" for b in budgets) +
          " | 2 %: hits, KiB/step |")
    print("|---|---|" + "---|" * (len(budgets) + 1))
    for name in order:
        cells = []
        for budget in budgets:
            run = runs[name][budget]
            cells.append(", ".join([number(run["recall"]["mean"], ".3f"),
                                    number(run["recall_long_range_ratio"], ".3f"),
                                    number(run["evidence_recall"], ".2f"),
                                    number(run["output_error"]["mean"], ".3f")]))
        two = runs[name]["2%"]
        moved = f"{number(hit_ratio(two), '.2f')}, {bytes_per_step(result, two) / 1024:.0f}"
        print(f"| `{name}` | {two['metadata_bytes'] / tokens:.0f} | " + " | ".join(cells) +
              f" | {moved} |")
    for left in result.get("left_out", []):
        print(f"| `{left['selector']}` | – |" + f" lacks {left['lacks']} |" +
              " |" * len(budgets))


def plot(program, traces, file):
    import matplotlib  # pylint: disable=import-outside-toplevel
    matplotlib.use("svg")
    from matplotlib import pyplot  # pylint: disable=import-outside-toplevel
    figure, axes = pyplot.subplots(1, len(traces), figsize=(6 * len(traces), 5), squeeze=False)
    markers = dict(zip(BLOCK_TOKENS, "osD^v"))
    for axis, trace in zip(axes[0], traces):
        lines = {}
        for block_tokens in BLOCK_TOKENS:
            result = replay(program, trace, ",".join(FRONTIER), BUDGETS, block_tokens)
            for run in result["runs"]:
                lines.setdefault((run["selector"], block_tokens), []).append(
                    (bytes_per_step(result, run), run["output_error"]["mean"]))
        for (selector, block_tokens), points in lines.items():
            axis.plot([x / 1024 for x, _ in points], [y for _, y in points],
                      color=f"C{FRONTIER.index(selector)}", marker=markers[block_tokens],
                      markersize=4, linewidth=0.8,
                      label=selector if block_tokens == 8 else None)
        axis.set(title=result["trace"]["name"], xscale="log", yscale="log",
                 xlabel="KiB over the link per layer and step", ylabel="output error, mean")
        axis.legend()
    for block_tokens, marker in markers.items():
        axes[0][0].plot([], [], "k" + marker, markersize=4, label=f"{block_tokens}-token blocks")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", metavar="TRACE")
    parser.add_argument("--kvtier", default="build/release/tools/kvtier", metavar="PROGRAM")
    parser.add_argument("--selector", default="all", metavar="NAMES")
    parser.add_argument("--plot", metavar="FILE.svg")
    options = parser.parse_args()
    for trace in options.traces:
        result = replay(options.kvtier, trace, options.selector, BUDGETS)
        shape = result["trace"]
        print(f"\n{shape['name']}: layers {', '.join(map(str, shape['layers']))}, "
              f"{shape['tokens']} tokens, {shape['steps']} steps\n")
        table(result)
    if options.plot:
        plot(options.kvtier, options.traces, options.plot)


if __name__ == "__main__":
    main()

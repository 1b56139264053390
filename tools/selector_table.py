#!/usr/bin/env python3
"""Makes the tables of selectors/README.md, and the plot beside it, from recorded traces.

usage: tools/selector_table.py [--kvtier PROGRAM] [--selector NAMES | --plot FILE.svg] TRACE...

Runs `kvtier replay` with every selector that a trace can feed, at budgets of 1, 2, 5 and 10 %, and
prints one Markdown table a trace, and who falls below the baselines in which layer. With --plot
(needs matplotlib 3.6 or newer) it instead runs some of them at block sizes of 1, 4, 8, 16 and 64
tokens and draws output error against bytes moved per step, each selector with the line that no
other of its settings undercuts. Nothing here measures time: that is `kvtier bench select`.
"""

import argparse
import json
import subprocess
import sys

BUDGETS = ["1%", "2%", "5%", "10%"]
BLOCK_TOKENS = [1, 4, 8, 16, 64]
MARKERS = dict(zip(BLOCK_TOKENS, "osD^v"))
# Of the runs with other block sizes: few enough to tell apart in a plot.
COLOURS = {"oracle": "#808080", "scan": "#d62728", "two-stage": "#e0872b", "int4": "#9467bd",
           "cluster": "#2ca02c", "mean": "#3a87c8", "minmax": "#17a2a8"}
FRONTIER = list(COLOURS)


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


def below_baselines(result):
    """A line per layer and budget: who finds less of the far mass than recency or random."""
    runs = {}
    for run in result["runs"]:
        for layer in run["layers"]:
            if layer["recall_long_range"] is not None:
                found = runs.setdefault((layer["layer"], run["budget"]), {})
                found[run["selector"]] = layer["recall_long_range"]
    print("\nBelow `recency` or `random` in far mass found, by layer (1 % left out):\n")
    for (layer, budget), found in runs.items():
        line = max(found.get("recency", 0), found.get("random", 0))
        low = [f"`{name}` {mass:.3f}" for name, mass in sorted(found.items(), key=lambda x: x[1])
               if mass < line and name not in ("recency", "random")]
        if budget != "1%" and low:
            print(f"- layer {layer}, {budget} (`recency` {found.get('recency', 0):.3f}, `random` "
                  f"{found.get('random', 0):.3f}): {', '.join(low)}")


def frontier(points):
    """Of (bytes, error): those that no other undercuts in both, by bytes."""
    best, kept = float("inf"), []
    for point in sorted(points):
        if point[1] < best:
            best = point[1]
            kept.append(point)
    return kept


def draw_trace(axis, program, trace):
    """One panel: every run a mark, and a line through each selector's frontier."""
    points = {name: [] for name in FRONTIER}
    for block_tokens in BLOCK_TOKENS:
        result = replay(program, trace, ",".join(FRONTIER), BUDGETS, block_tokens)
        for run in result["runs"]:
            moved = bytes_per_step(result, run) / 1024
            if moved <= 0:
                continue  # Nothing but sinks and window fits: not a choice.
            error = run["output_error"]["mean"]
            points[run["selector"]].append((moved, error))
            axis.plot(moved, error, color=COLOURS[run["selector"]], alpha=0.55, markersize=4,
                      marker=MARKERS[block_tokens], markeredgewidth=0, linestyle="")
    for name, found in points.items():
        axis.plot(*zip(*frontier(found)), color=COLOURS[name], linewidth=1.8)
    axis.set(title=result["trace"]["name"], xscale="log", yscale="log",
             xlabel="KiB over the link per layer and step")
    axis.grid(alpha=0.25, which="both", linewidth=0.5)


def plot(program, traces, file):
    """Error against bytes moved, as an SVG without a background: its greys and colours are of
    middle brightness, so that it can be read on white and on black."""
    import matplotlib  # pylint: disable=import-outside-toplevel
    matplotlib.use("svg")
    from matplotlib import pyplot  # pylint: disable=import-outside-toplevel
    grey = "#808080"
    pyplot.rcParams.update({
        # The same input gives the same bytes; text stays text, for size and for readers.
        "svg.hashsalt": "kvtier", "svg.fonttype": "none", "font.family": "sans-serif",
        "font.size": 11, "text.color": grey, "axes.labelcolor": grey, "axes.edgecolor": grey,
        "xtick.color": grey, "ytick.color": grey, "grid.color": grey})
    figure, axes = pyplot.subplots(1, len(traces), figsize=(5 * len(traces), 5.2), squeeze=False)
    for axis, trace in zip(axes[0], traces):
        draw_trace(axis, program, trace)
    axes[0][0].set_ylabel("output error, mean (relative)")
    lines = [pyplot.Line2D([], [], color=COLOURS[name], linewidth=1.8, label=name)
             for name in FRONTIER]
    marks = [pyplot.Line2D([], [], color=grey, marker=marker, linestyle="", markersize=5,
                           label=f"{tokens}-token blocks")
             for tokens, marker in MARKERS.items()]
    figure.legend(handles=lines + marks, ncols=6, loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(file, transparent=True, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", metavar="TRACE")
    parser.add_argument("--kvtier", default="build/release/tools/kvtier", metavar="PROGRAM")
    parser.add_argument("--selector", default="all", metavar="NAMES")
    parser.add_argument("--plot", metavar="FILE.svg")
    options = parser.parse_args()
    if options.plot:
        plot(options.kvtier, options.traces, options.plot)
        return
    for trace in options.traces:
        result = replay(options.kvtier, trace, options.selector, BUDGETS)
        shape = result["trace"]
        print(f"\n{shape['name']}: layers {', '.join(map(str, shape['layers']))}, "
              f"{shape['tokens']} tokens, {shape['steps']} steps\n")
        table(result)
        below_baselines(result)


if __name__ == "__main__":
    main()

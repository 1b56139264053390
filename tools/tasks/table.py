"""usage: table.py RESULTS.jsonl [MORE.jsonl...]

Makes the table of README.md from what run.py wrote.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    headers, lines = [], []
    for path in sys.argv[1:]:
        first, *rest = Path(path).read_text().splitlines()
        headers.append(json.loads(first))
        lines += merged([json.loads(line) for line in rest])
    if not headers:
        sys.exit(__doc__)
    if len({header["model"] for header in headers}) > 1:
        sys.exit("results of different models: one table each")
    print_kinds(headers[0], lines)
    print()
    print_selectors(headers[0], [line for line in lines if line["solved_by_full"]])


def merged(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per question: a later run may have added rows."""
    found: dict[tuple[str, int, int], dict[str, Any]] = {}
    for line in lines:
        known = found.setdefault((line["kind"], line["seed"], line["question"]), line)
        known["rows"].update(line["rows"])
    return list(found.values())


def print_kinds(header: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    default = header["default_selector"]
    budgets = budgets_of(lines)
    names = [f"{default} {budget:g}" for budget in budgets]
    print(f"| kind | contexts | tokens | questions | solved by full attention | "
          + " | ".join(f"of those by `{default}` at {budget:.0%}" for budget in budgets) + " |")
    print("|---" * (5 + len(budgets)) + "|")
    kinds = list(dict.fromkeys(line["kind"] for line in lines))
    for kind in [*kinds, "all"]:
        part = [line for line in lines if kind in ("all", line["kind"])]
        solved = [line for line in part if line["solved_by_full"]]
        cells = [kind, len({(line["kind"], line["seed"]) for line in part}),
                 f"{min(x['context_tokens'] for x in part)} - "
                 f"{max(x['context_tokens'] for x in part)}",
                 len(part), len(solved)]
        cells += [count(solved, name) for name in names]
        print("| " + " | ".join(map(str, cells)) + " |")


def print_selectors(header: dict[str, Any], solved: list[dict[str, Any]]) -> None:
    budgets = budgets_of(solved)
    print("| selector | " + " | ".join(
        f"{budget:.0%}: solved, mean KL, largest, top-1" for budget in budgets) + " |")
    print("|---" * (1 + len(budgets)) + "|")
    names = list(dict.fromkeys(split(row)[0] for line in solved for row in line["rows"]))
    for selector in names:
        mark = " (default)" if selector == header["default_selector"] else ""
        cells = [f"`{selector}`{mark}"]
        for budget in budgets:
            rows = [line["rows"][f"{selector} {budget:g}"] for line in solved
                    if f"{selector} {budget:g}" in line["rows"]]
            divergences = [each for row in rows for each in row["kl"]]
            if not rows:
                cells.append("")
                continue
            agreed = sum(row["agree"] for row in rows) / len(divergences)
            cells.append(f"{count(solved, f'{selector} {budget:g}')}, "
                         f"{statistics.fmean(divergences):.3g}, {max(divergences):.2g}, "
                         f"{agreed:.3f}")
        print("| " + " | ".join(cells) + " |")


def count(solved: list[dict[str, Any]], name: str) -> str:
    rows = [line["rows"][name] for line in solved if name in line["rows"]]
    return f"{sum(row['solved'] for row in rows)} / {len(rows)}" if rows else ""


def split(row: str) -> tuple[str, float]:
    selector, budget = row.rsplit(" ", 1)
    return selector, float(budget)


def budgets_of(lines: list[dict[str, Any]]) -> list[float]:
    return sorted({split(row)[1] for line in lines for row in line["rows"]}, reverse=True)


if __name__ == "__main__":
    main()

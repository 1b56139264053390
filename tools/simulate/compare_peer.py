#!/usr/bin/env python3
"""Compares `kvtier sweep` with the PyPI package kvcache-simulator on one Mooncake-like trace.

usage: compare_peer.py KVTIER TRACE.jsonl [PYTHON]

PYTHON is an interpreter that has kvcache-simulator (default: this one). Both run the same 20
capacities of fifo, lru and optimal on one thread, the peer with its C++ back-end, compiled by a run
before those that are timed. Times are medians of interleaved repetitions. Figures are of the last
half of the requests, which is all that the peer reports; it leaves out capacities that are not full
by then.
"""
import json
import os
import resource
import statistics
import subprocess
import sys
import time

MODEL = "llama-3.1-8b"  # 128 KiB of KV per token in bf16.
BLOCK_TOKENS = 512
BLOCKS_PER_GIB = (1 << 30) // (BLOCK_TOKENS * 128 * 1024)
POLICIES = ["fifo", "lru", "optimal"]
REPETITIONS = 7


def timed(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    wall = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(output), wall, cpu


def ours(kvtier, trace, order):
    command = [kvtier, "sweep", trace, "--policy", ",".join(POLICIES), "--threads", "1",
               "--touch-order", order, "--order", "file", "--format", "json"]
    result, wall, cpu = timed(command)
    hits = {(curve["policy"], point["capacity_blocks"]): point["second_half_hit_tokens"]
            for curve in result["curves"] for point in curve["points"]}
    return hits, wall, cpu


def peer(python, trace, capacities):
    # Half a block more, so that rounding cannot lose one.
    budgets = ",".join(repr((c + 0.5) / BLOCKS_PER_GIB) for c in capacities)
    command = [python, "-m", "kvcache_sim", "run", "--trace", trace, "--model", MODEL,
               "--block-size", str(BLOCK_TOKENS), "--budgets-gib", budgets,
               "--policies", ",".join(POLICIES), "--backend", "cpp", "--format", "json"]
    result, wall, cpu = timed(command)
    hits = {(policy, point["cacheBlocks"]): point["results"][policy]["hitTokens"]
            for point in result["points"] for policy in POLICIES}
    return hits, wall, cpu


def main():
    kvtier, trace = sys.argv[1:3]
    python = sys.argv[3] if len(sys.argv) > 3 else sys.executable
    usual, _, _ = ours(kvtier, trace, "last-first")
    forward, _, _ = ours(kvtier, trace, "first-first")
    capacities = sorted({capacity for _, capacity in usual})
    theirs, _, _ = peer(python, os.path.abspath(trace), capacities)
    times = [(*ours(kvtier, trace, "last-first")[1:], *peer(python, trace, capacities)[1:])
             for _ in range(REPETITIONS)]
    wall, cpu, peer_wall, peer_cpu = (statistics.median(column) for column in zip(*times))
    print(f"{'blocks':>8}  " + "  ".join(f"{p + ' ours':>14}  {p + ' peer':>14}" for p in POLICIES))
    differences = 0
    for capacity in capacities:
        cells = []
        for policy in POLICIES:
            # The peer's FIFO admits first to last.
            mine = (forward if policy == "fifo" else usual)[(policy, capacity)]
            other = theirs.get((policy, capacity))
            differences += other is not None and other != mine
            cells.append(f"{mine:>14}  {'-' if other is None else other:>14}")
        print(f"{capacity:>8}  " + "  ".join(cells))
    print(f"\n{len(theirs)} figures of the peer, {differences} differ")
    print(f"ours {wall:.2f} s ({cpu:.2f} s of CPU), peer {peer_wall:.2f} s ({peer_cpu:.2f} s of CPU): "
          f"{peer_wall / wall:.1f} times, {peer_cpu / cpu:.1f} times by CPU")


if __name__ == "__main__":
    main()

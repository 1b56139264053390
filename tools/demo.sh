#!/usr/bin/env bash
# usage: tools/demo.sh [arguments of `kvtier replay`]
# Installs what is missing, builds, replays the shipped attention trace over three tiers and prints
# the table. Arguments replace the default ones below.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
trace=$root/tests/traces/smollm2-8k-demo

"$root/tools/install-packages.sh"
"$root/tools/build-preset.sh" release

# Under build/, so that the disk tier is a disk: elsewhere a temporary folder is often memory.
TMPDIR=$(mktemp -d "$root/build/tmp.XXXXXX")
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT

# A tenth of the cache on the device and less than half in memory: most of it lies on disk only.
arguments=(
  --selector 'scan,mean,oracle,recency,random'
  --budget '5%'
  --device-capacity '10%'
  --host-capacity '40%'
  --disk-path "$TMPDIR"
)
[ $# -eq 0 ] || arguments=("$@")

"$root/build/release/tools/kvtier" replay "$trace" "${arguments[@]}"

#!/usr/bin/env bash
# usage: tools/build-preset.sh PRESET
# Configures and builds one preset of CMakePresets.json. Quiet when all is well; on failure the end
# of the log. Writes nothing outside build/.
set -euo pipefail

preset=${1:?usage: tools/build-preset.sh PRESET}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

folder=build/$preset
log=$folder/build.log
mkdir -p "$folder"
export CCACHE_DIR=$root/build/ccache

run() {
  "$@" >>"$log" 2>&1 && return
  # The first error is what matters, and ninja prints it before the jobs that were still running.
  grep -m 10 -E '(: (fatal )?error: |^CMake Error|undefined reference)' "$log" >&2 || true
  printf '%s\n' '...' >&2
  tail -n 30 "$log" >&2
  printf 'kvtier: preset %s does not build; the whole log is %s\n' "$preset" "$root/$log" >&2
  exit 1
}

: >"$log"
run cmake --preset "$preset"
run cmake --build --preset "$preset" --parallel "$(nproc)"

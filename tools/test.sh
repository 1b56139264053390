#!/usr/bin/env bash
# usage: tools/test.sh [--preset dev|asan|tsan] [ctest arguments, for example -L cpu]
# Installs what is missing, builds the preset (dev by default) and runs its tests. Shows failures
# and ctest's closing lines only; everything else is in build/PRESET/.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
preset=dev
if [ "${1:-}" = --preset ]; then
  preset=${2:?--preset needs a name}
  shift 2
fi

"$root/tools/install-packages.sh"
"$root/tools/build-preset.sh" "$preset"

# Under build/, so that tests of the disk meet a disk: elsewhere a temporary folder is often memory.
TMPDIR=$(mktemp -d "$root/build/tmp.XXXXXX")
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT

cd "$root"
ctest --preset "$preset" --parallel "$(nproc)" --no-tests=error "$@" 2>&1 |
  tee "build/$preset/ctest.log" |
  grep --line-buffered -vE '^ *(Start +[0-9]+: |[0-9]+/[0-9]+ Test +#[0-9]+: .* Passed +[0-9.]+ sec$)'

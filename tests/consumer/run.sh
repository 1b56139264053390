#!/usr/bin/env bash
# usage: run.sh BUILD_FOLDER
# Installs the build into a folder of its own and uses it from there: a CMake project in C and one
# in C++, a compile line from pkg-config, and the list of what the shared library exports.
set -euo pipefail

build=$(cd "${1:?usage: run.sh BUILD_FOLDER}" && pwd)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$build/consumer
rm -rf "$work"
mkdir -p "$work"
cmake --install "$build" --prefix "$work/prefix" >"$work/install.log"

for language in c cxx; do
  cmake -S "$here/$language" -B "$work/$language" -G Ninja -DCMAKE_PREFIX_PATH="$work/prefix" \
    >"$work/$language.log"
  cmake --build "$work/$language" >>"$work/$language.log" || { cat "$work/$language.log"; exit 1; }
  LD_LIBRARY_PATH=$(dirname "$(find "$work/prefix" -name libkvtier.so)") "$work/$language/consumer"
done

pc=$(dirname "$(find "$work/prefix" -name kvtier.pc)")
read -ra flags <<<"$(PKG_CONFIG_PATH=$pc pkg-config --cflags --libs kvtier)"
cc -std=c11 -Wall -Wextra -Wpedantic -Werror "$here/c/main.c" -o "$work/with-pkg-config" \
  "${flags[@]}"
LD_LIBRARY_PATH=$(dirname "$pc") "$work/with-pkg-config"

# An accidental export is a promise that nobody meant, a missing one breaks who is linked already.
nm -D --defined-only "$(find "$work/prefix" -name libkvtier.so)" | awk '$2 == "T" {print $3}' |
  sed 's/@.*//' | sort | diff "$here/symbols.txt" - ||
  { echo 'the exported names differ from tests/consumer/symbols.txt'; exit 1; }

test -x "$work/prefix/bin/kvtier" && "$work/prefix/bin/kvtier" --version

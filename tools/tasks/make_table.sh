#!/bin/sh
# usage: make_table.sh FOLDER_OR_GGUF RESULTS.jsonl
# Makes the table of README.md: half an hour of one idle core. An interrupted run goes on.
set -eu
here=$(dirname "$0")
model=$1
results=$2
ask() {
  python3 "$here/run.py" --model "$model" --output "$results" --threads 1 "$@"
}
ask --kinds multi-key,variables,turns --contexts 10
ask --kinds key-value,common-words --contexts 2
ask --kinds needle --contexts 4
python3 "$here/table.py" "$results"

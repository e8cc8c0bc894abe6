#!/usr/bin/env bash
# Collect the wheels that a GPU machine without a network lacks, for benchmarks/gpu.py and training there.
#   bash benchmarks/gpu_wheels.sh [FOLDER]          default: runs/gpu_wheels
#   python3 -m pip install --no-index --no-deps --find-links FOLDER $(cat FOLDER/names)      there
# Assumed there: torch, transformers, numpy, safetensors, sentencepiece, tokenizers, tensorboard. Parquet tables need
# datasets as well, which training and benchmarks/gpu.py do not. pip keeps what is there already, as pyarrow may be.
set -euo pipefail
PYTHON=${PYTHON:-python3}                        # of the version that the machine has
PYTHON_VERSION=${PYTHON_VERSION:-3.12}           # of the machine
MOST_MIB=50
out=$(realpath -m "${1:-runs/gpu_wheels}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ $("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') == "$PYTHON_VERSION" ]] ||
  { printf 'error: PYTHON=%s is not Python %s; give one that is\n' "$PYTHON" "$PYTHON_VERSION" >&2; exit 2; }

pinned() { grep -h "^$1==" requirements.txt requirements-real.txt tests/requirements.txt; }
if [[ -e $out ]] && { [[ ! -f $out/names ]] || [[ -n $(find "$out" -mindepth 1 ! -name '*.whl' ! -name names -print -quit) ]]; }; then
  printf 'error: %q is not a folder of this script, which is emptied first; give another one, or remove it\n' "$out" >&2
  exit 2
fi
rm -rf "$out" && mkdir -p "$out" && : >"$out/names"
# Its compiled parts are left out: they are made on first use, by the machine's own compiler.
DS_BUILD_OPS=0 "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$out" "$(pinned deepspeed)"
"$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$out" hjson
"$PYTHON" -m pip download --quiet --only-binary :all: --dest "$out" --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 \
  --python-version "$PYTHON_VERSION" --no-deps \
  annotated-types einops msgpack py-cpuinfo pydantic typing-inspection typing-extensions psutil packaging tqdm \
  "pyarrow==20.*" "$(pinned ninja)" "$(pinned gguf)" "$(pinned accelerate)" "$(pinned pytest)" "$(pinned pytest-timeout)" pluggy iniconfig pygments
# pyarrow: newer ones have more than 50 MiB alone.
core=$(unzip -p "$out"/pydantic-2*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core==\([0-9.]*\).*/\1/p')
"$PYTHON" -m pip download --quiet --only-binary :all: --dest "$out" --platform manylinux2014_x86_64 --python-version "$PYTHON_VERSION" \
  --no-deps "pydantic-core==$core"

for wheel in "$out"/*.whl; do basename "$wheel" | cut -d- -f1; done >"$out/names"
size=$(du -sm "$out" | cut -f1)
printf '%s: %s wheels, %s MiB\n' "$out" "$(wc -l <"$out/names")" "$size"
((size <= MOST_MIB)) || { printf 'error: more than %s MiB\n' "$MOST_MIB" >&2; exit 2; }

#!/usr/bin/env bash
# One session on a GPU machine, about 12 minutes: first what is right, then how fast.
# usage: bench/gpu_session.sh FOLDER_FOR_RESULTS     (peers, if any, in .peers-gpu)
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
folder=$1
python=${PYTHON:-python}
# Every kind of layer as halfbyte runs it, then with every shipped configuration; bandwidth.
"$python" bench/measure_gpu_kernels.py --output "$folder/gpu-checks.json" --seconds 260 \
    --check-all --skip sweep compare
# A decode step: fused, compiled, and what each of the two brings.
timeout 240 "$python" bench/measure_gpu_decode.py --output "$folder/gpu-decode.json" \
    --arms cuda "cuda compiled" "cuda apart" bf16 "bf16 compiled"
# All arms and peers again, Humming too.
"$python" bench/measure_gpu_kernels.py --output "$folder/gpu-kernels.json" --seconds 150 \
    --skip bandwidth check --humming

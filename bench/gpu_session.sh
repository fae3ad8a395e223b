#!/usr/bin/env bash
# A session on a GPU machine: first what is right (260 s at most), then a decode step (240 s), then
# all arms and peers (150 s).
# usage: bench/gpu_session.sh FOLDER_FOR_RESULTS [checks] [decode] [kernels] [tests]
set -uo pipefail
folder=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}

for part in "${@:-checks}"; do
    case $part in
    checks) # Every kind of layer as halfbyte runs it, then with every shipped configuration.
        "$python" bench/measure_gpu_kernels.py --output "$folder/gpu-checks.json" --seconds 260 \
            --check-all --skip sweep compare ;;
    decode) # Fused, compiled, and what each of the two brings.
        timeout 240 "$python" bench/measure_gpu_decode.py --output "$folder/gpu-decode.json" \
            --arms cuda "cuda own" bf16 "cuda compiled" "bf16 compiled" ;;
    tests) # Every part that computes on a GPU, through what a user calls.
        timeout 150 "$python" -m pytest -q -m gpu -p no:cacheprovider -o filterwarnings=default \
            -n 6 tests/gpu ;;
    kernels) # Peers are looked for in .peers-gpu.
        "$python" bench/measure_gpu_kernels.py --output "$folder/gpu-kernels.json" --seconds 150 \
            --skip bandwidth check --humming ;;
    *) echo "No part '$part'; there are checks, decode, kernels and tests." >&2 && exit 2 ;;
    esac
done

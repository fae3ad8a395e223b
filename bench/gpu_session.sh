#!/usr/bin/env bash
# Runs measurements and tests on a GPU machine; results go to FOLDER. Parts and time limits:
#   checks (260 s)    correctness of the kernels
#   decode (240 s)    one decode step
#   experts (150 s)   one decode step of a mixture of experts
#   kernels (150 s)   all kernels and peers on single layers
#   rows (150 s)      the kernel for many rows: candidates and peers
#   stream (150 s)    the kernel for few rows with bulk copies: candidates and peers
#   quantize (150 s)  quantizing a whole model
#   tests (150 s)     tests of the user-facing API
# usage: bench/gpu_session.sh FOLDER [checks] [decode] [experts] [kernels] [rows] [stream] [quantize] [tests]
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
    decode) # Fused and compiled steps, and the gain of each.
        timeout 240 "$python" bench/measure_gpu_decode.py --output "$folder/gpu-decode.json" \
            --arms cuda "cuda own" bf16 "cuda compiled" "bf16 compiled" ;;
    experts) # Experts together and one after the other.
        timeout 150 "$python" bench/measure_gpu_experts.py --output "$folder/gpu-experts.json" ;;
    tests) # Every part that computes on a GPU, through the user-facing API.
        timeout 150 "$python" -m pytest -q -m gpu -p no:cacheprovider -o filterwarnings=default \
            -n 6 --tb=short -s tests/gpu ;;
    kernels) # Peers are loaded from .peers-gpu.
        "$python" bench/measure_gpu_kernels.py --output "$folder/gpu-kernels.json" --seconds 150 \
            --skip bandwidth check --humming ;;
    rows | stream) # All candidates of the kernel; peers are loaded from .peers-gpu.
        timeout 170 "$python" bench/measure_gpu_rows.py --kernel "$part" \
            --output "$folder/gpu-$part.json" --seconds 150 ;;
    quantize) # The 8B shape, limited to 12 GB.
        timeout 150 "$python" bench/measure_gpu_quantize.py --output "$folder/gpu-quantize.json" \
            --memory 12GB ;;
    *) echo "No part '$part'; see the first lines of this script." >&2 && exit 2 ;;
    esac
done

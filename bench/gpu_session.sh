#!/usr/bin/env bash
# A session on a GPU machine: first what is right (260 s at most), then a decode step (240 s), then
# all arms and peers (150 s); the kernel for many rows, and the one for few that copies in bulk, with
# their candidates and peers (150 s each); a whole model quantized (150 s); the tests of what a user
# calls (150 s).
# usage: bench/gpu_session.sh FOLDER [checks] [decode] [kernels] [rows] [stream] [quantize] [tests]
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
            -n 6 --tb=short -s tests/gpu ;;
    kernels) # Peers are looked for in .peers-gpu.
        "$python" bench/measure_gpu_kernels.py --output "$folder/gpu-kernels.json" --seconds 150 \
            --skip bandwidth check --humming ;;
    rows | stream) # Such a kernel, cut in every way; peers are looked for in .peers-gpu.
        timeout 170 "$python" bench/measure_gpu_rows.py --kernel "$part" \
            --output "$folder/gpu-$part.json" --seconds 150 ;;
    quantize) # The 8B shape, within 12 GB.
        timeout 150 "$python" bench/measure_gpu_quantize.py --output "$folder/gpu-quantize.json" \
            --memory 12GB ;;
    *) echo "No part '$part'; see the first lines of this script." >&2 && exit 2 ;;
    esac
done

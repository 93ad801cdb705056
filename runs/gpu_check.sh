#!/usr/bin/env bash
# On a machine with a GPU: the engine's correctness tests in float32 and bfloat16, then the RL step of the 12-layer model: utilisation, tokens/s,
# seconds per step and the projected time of 467 steps, against the plain way (8 rows, one problem at a time).
# usage: bash runs/gpu_check.sh [--device cuda|cpu] [any option of exp2_bench]      CPU trial: bash runs/gpu_check.sh --device cpu --preset smoke
set -eu
. "$(dirname "$0")/env.sh"
make_env 'dev'
device=cuda args=()
while [ $# -gt 0 ]; do
    case $1 in --device) device=$2; shift 2 ;; --device=*) device=${1#*=}; shift ;; *) args+=("$1"); shift ;; esac
done
if [ "$device" != cpu ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: PyTorch sees no GPU here: try --device cpu --preset smoke." >&2; exit 2
fi
echo "== the engine against the plain model on $device"
failed=0; EXP2_DEVICE=$device python -m pytest -q tests/test_engine.py || failed=$?
echo "== the RL step"
exp2_bench --preset d12 --plain-problems 1 --no-trl --device "$device" ${args[@]+"${args[@]}"}
[ $failed = 0 ] || { echo "error: the engine does not agree with the plain model here (see above): trust no figure." >&2; exit "$failed"; }

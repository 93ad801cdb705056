#!/usr/bin/env bash
# On a machine with a GPU: does what is compiled compute what PyTorch's operators compute, and how fast. Fits ten minutes; each part has its own time limit,
# and a part that fails costs no other. Records (JSON) and the log go to $OUT (default: out/gpu_check).
# usage: bash runs/gpu_check.sh [--device cuda|cpu] [--limit SECONDS] [--parts real,tests,before,d12,processes,fresh,even,d26]
#        a trial without a GPU: bash runs/gpu_check.sh --device cpu
# With EXP2_ENV=active the environment that is active is used as it is; otherwise .venv is made.
set -u
. "$(dirname "$0")/env.sh"
make_env 'dev'
device=cuda limit=560 parts=real,tests,before,d12,processes,fresh,even,d26
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift 2 ;;
        --limit) limit=$2; shift 2 ;;
        --parts) parts=$2; shift 2 ;;
        *) echo "error: unknown option $1 (see the head of runs/gpu_check.sh)." >&2; exit 2 ;;
    esac
done
if [ "$device" != cpu ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: PyTorch sees no GPU here: try --device cpu." >&2; exit 2
fi
out=${OUT:-out/gpu_check}; mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore::FutureWarning EXP2_DEVICE=$device
began=$SECONDS failed=()
part() {          # part NAME SECONDS COMMAND…: at most so many seconds, and only if they are left
    local name=$1 most=$2 left=$((limit-SECONDS+began)) start=$SECONDS rc=0; shift 2
    case ",$parts," in *",$name,"*) ;; *) return ;; esac
    [ $left -ge 20 ] || { echo "== $name: left out, no time"; failed+=("$name (no time)"); return; }
    echo "== $name"
    timeout -k 5 $((most < left ? most : left)) "$@" || rc=$?
    echo "   $name: exit $rc after $((SECONDS-start)) s"
    [ $rc = 0 ] || failed+=("$name")
}
bench() {         # bench NAME OPTIONS…: a record and its table
    local name=$1; shift
    python -c 'from exp2nb.fast.bench import exp2_bench; exp2_bench.main()' --device "$device" --no-trl --out "$out/$name.json" "$@"
}
export -f bench; export device out
small=()          # without a GPU: the same ways through the code, in miniature
[ "$device" != cpu ] || small=(--problems 2 --samples 4 --new 24 --prompt 12 --micro-tokens 256)
tiny=(); [ "$device" != cpu ] || tiny=(--preset smoke)

checks() {
    [ "$device" = cpu ] || python -c "import torch; p = torch.cuda.get_device_properties(0); print(p.name, p.total_memory//2**20, 'MiB, PyTorch', torch.__version__)"
    part real 150 bash -c 'bench real --preset smollm2-135m --rounds 2 --check "$@"' _ ${small[@]+"${small[@]}"}
    part tests 200 python -m pytest -q -x --maxfail 20 -n "$([ "$device" = cpu ] && echo 0 || echo 6)" -p no:cacheprovider tests/test_engine.py
    part before 90 bash -c 'bench before --preset smollm2-135m --rounds 1 --without through,to_logits,muon "$@"' _ ${small[@]+"${small[@]}"}
    part d12 120 bash -c 'bench d12 --preset d12 --rounds 2 --plain-problems 1 --check "$@"' _ ${small[@]+"${small[@]}"} ${tiny[@]+"${tiny[@]}"}
    part processes 60 bash -c 'bench processes --preset d12 --rounds 1 --plain-problems 0 --processes 2 --new 32 "$@"' _ ${small[@]+"${small[@]}"} ${tiny[@]+"${tiny[@]}"}
    part fresh 120 bash -c 'bench fresh --preset smollm2-135m --rounds 1 --fresh "$@"' _ ${small[@]+"${small[@]}"}
    part even 60 bash -c 'bench even --preset smollm2-135m --lengths even --rounds 1 --plain-problems 0 "$@"' _ ${small[@]+"${small[@]}"}
    part d26 120 bash -c 'bench d26 --preset d26 --rounds 1 --plain-problems 0 "$@"' _ ${small[@]+"${small[@]}"} ${tiny[@]+"${tiny[@]}"}
    if [ ${#failed[@]} -gt 0 ]; then echo "NOT in order after $((SECONDS-began)) s: ${failed[*]}"; return 1; fi
    echo "All in order after $((SECONDS-began)) s."
}
set -o pipefail
checks 2>&1 | tee "$out/gpu_check.log"

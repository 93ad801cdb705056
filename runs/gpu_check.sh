#!/usr/bin/env bash
# On a machine with a GPU: does what is compiled compute what PyTorch's operators compute, and how fast. Fits ten minutes; each part has its own time limit,
# and a part that fails costs no other. Records (JSON), the log and a table of all figures go to $OUT (default: out/gpu_check).
# usage: bash runs/gpu_check.sh [--dry-run] [--device cuda|cpu] [--limit SECONDS] [--parts tests,real,whole,fresh,d12,d26,processes,even,before,trl]
#        the plan of minutes, nothing run: bash runs/gpu_check.sh --dry-run
#        every part in miniature, without a GPU: bash runs/gpu_check.sh --device cpu
# With EXP2_ENV=active the environment that is active is used as it is; otherwise .venv is made.
set -u
device=cuda limit=560 parts=tests,real,whole,fresh,d12,d26,processes dry=''
while [ $# -gt 0 ]; do
    case $1 in
        --help|-h) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        --dry-run) dry=1; shift; continue ;;
        --device|--limit|--parts) [ $# -gt 1 ] || { echo "error: $1 wants a value (see the head of runs/gpu_check.sh)." >&2; exit 2; } ;;
    esac
    case $1 in
        --device) device=$2; shift 2 ;;
        --limit) limit=$2; shift 2 ;;
        --parts) parts=$2; shift 2 ;;
        *) echo "error: unknown option $1 (see the head of runs/gpu_check.sh)." >&2; exit 2 ;;
    esac
done
case $device in cuda|cpu) ;; *) echo "error: --device is cuda or cpu, not '$device'." >&2; exit 2 ;; esac
[[ $limit =~ ^[1-9][0-9]{0,8}$ ]] || { echo "error: --limit wants a whole number of seconds such as 560, not '$limit'." >&2; exit 2; }
# Name, expected seconds on one card (an H200 where they were measured: tests, real, d12, before; else estimated), most seconds, what it shows.
table='tests|90|130|what is compiled against plain passes: our model, open ones, all ages of nanochat; the same gradient at a second run
real|80|130|SmolLM2-135M, ragged lengths: rollout, gradient, optimizer, drift, same tokens and gradient twice
whole|60|110|RL step with scores and files, supervised step of 32,768 tokens with its text, evaluation of five sets in six ways
fresh|60|120|a fresh process to its first step at full speed, nothing compiled and compiled before
d12|60|120|our 12 layers, even lengths, beside the plain way
d26|80|120|one RL step of 26 layers: does it fit, how long, and what the plan says
processes|40|80|two processes on one card (gloo): the gradient of one process, and the time of a step
even|30|60|SmolLM2-135M, even lengths
before|70|90|SmolLM2-135M by operators: what fused layers, head and stacked Muon are worth
trl|90|120|GRPOTrainer of TRL at the same lengths, where it is installed'
[ -n "${parts//,/}" ] || { echo "error: --parts wants the names of parts, such as tests,real." >&2; exit 2; }
for name in ${parts//,/ }; do
    [[ $'\n'$table == *$'\n'"$name|"* ]] \
    || { echo "error: there is no part $name: choose from $(cut -d'|' -f1 <<<"$table" | paste -sd, -)." >&2; exit 2; }
done
show_plan() {
    local at=0 name seconds most what
    echo "Expected on one H100 or H200, in seconds (limit of all: $limit; on another device it differs):"
    while IFS='|' read -r name seconds most what; do
        case ",$parts," in *",$name,"*) printf '%4d  %-10s %4d, at most %3d  %s\n' $at "$name" "$seconds" "$most" "$what"; at=$((at+seconds)) ;; esac
    done <<<"$table"
    printf '%4d  done\n' $at
}
show_plan
[ -z "$dry" ] || exit 0
command -v timeout >/dev/null || {
    echo "error: the command timeout is missing: install GNU coreutils (on macOS: brew install coreutils)." >&2; exit 2
}
. "$(dirname "$0")/env.sh"
make_env 'dev'
if [ "$device" != cpu ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: PyTorch sees no GPU here: try --device cpu." >&2; exit 2
fi
# A card's minutes are few: what a part would miss later is said before the first one begins.
python -c '
from exp2nb.config import UserError
try:
    import exp2nb.fast.whole
    from exp2nb.bases.hub import library
    library()
except (ImportError, UserError) as e: raise SystemExit(f"error: {e}")' || exit 2
out=${OUT:-out/gpu_check}; mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore::FutureWarning EXP2_DEVICE=$device
began=$SECONDS failed=() allowed=0
limited() { timeout -k 5 $allowed "$@"; }
part() {          # part NAME COMMAND…: at most its seconds, and only if they are left
    local name=$1 most left=$((limit-SECONDS+began)) start=$SECONDS rc=0; shift
    case ",$parts," in *",$name,"*) ;; *) return ;; esac
    most=$(grep "^$name|" <<<"$table" | cut -d'|' -f3)
    [ "$device" != cpu ] || most=$limit     # a trial on a busy CPU is not held to a GPU's seconds
    [ $left -ge 20 ] || { echo "== $name: left out, no time"; failed+=("$name (no time)"); return; }
    echo "== $name"
    allowed=$((most < left ? most : left))
    "$@" || rc=$?
    echo "   $name: exit $rc after $((SECONDS-start)) s"
    [ $rc = 0 ] || failed+=("$name")
}
twelve=d12 more=d26 short=(--new 32) small=() shape=() little=(--eval-rows '256,1024') tests=(-n 6 -k 'not [operators')
if [ "$device" = cpu ]; then   # the same ways through the code, in miniature
    twelve=smoke more=smoke short=() shape=(--depth 1) little=(--steps 1 --sft-tokens 512 --evaluation 2)
    small=(--problems 2 --samples 4 --new 24 --prompt 12 --micro-tokens 256) tests=(-n 0 -k '(families or gradient or buffers) and not [operators')
fi

bench() { # bench NAME OPTIONS…: a record of exp2_bench
    local name=$1; shift
    case " $* " in *' smollm2-135m '*) set -- "$@" ${shape[@]+"${shape[@]}"} ;; esac
    limited python -c 'from exp2nb.fast.bench import exp2_bench; raise SystemExit(exp2_bench.main())' \
        --device "$device" --out "$out/$name.json" "$@" ${small[@]+"${small[@]}"}
}
whole() { # the record of exp2_whole
    limited python -c 'from exp2nb.fast.whole import exp2_whole; raise SystemExit(exp2_whole.main())' \
        --device "$device" --out "$out/whole.json" ${small[@]+"${small[@]}"} ${shape[@]+"${shape[@]}"} ${little[@]+"${little[@]}"}
}

checks() {
    [ "$device" = cpu ] || python -c "import torch; p = torch.cuda.get_device_properties(0); print(p.name, p.total_memory//2**20, 'MiB, PyTorch', torch.__version__)"
    part tests limited python -m pytest -q -rs --tb=short --maxfail 20 -p no:cacheprovider "${tests[@]}" tests/test_engine.py
    part real bench real --preset smollm2-135m --no-trl --rounds 2 --check
    part whole whole
    part fresh bench fresh --preset smollm2-135m --no-trl --rounds 1 --fresh
    part d12 bench d12 --preset $twelve --no-trl --rounds 2 --plain-problems 1 --check
    part d26 bench d26 --preset $more --no-trl --rounds 1 --plain-problems 0
    part processes bench processes --preset $twelve --no-trl --rounds 1 --plain-problems 0 --processes 2 ${short[@]+"${short[@]}"}
    part even bench even --preset smollm2-135m --no-trl --lengths even --rounds 1 --plain-problems 0
    part before bench before --preset smollm2-135m --no-trl --rounds 1 --without through,to_logits,muon
    part trl bench trl --preset smollm2-135m --rounds 1 --plain-problems 0
    python -c 'import sys; from exp2nb.fast.whole import gathered; print(gathered(sys.argv[1]))' "$out" | tee "$out/figures.txt"
    if [ ${#failed[@]} -gt 0 ]; then echo "NOT in order after $((SECONDS-began)) s: ${failed[*]}"; return 1; fi
    echo "All in order after $((SECONDS-began)) s."
}
set -o pipefail
checks 2>&1 | tee "$out/gpu_check.log"

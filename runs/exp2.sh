#!/usr/bin/env bash
# The whole experiment with one command: environment, arms, analysis. Started again, it goes on where it was.
#   bash runs/exp2.sh [--preset P] [--task T] [--base PATH] [--arms a,b] [--seeds N] [--match-on B] [--run-dir DIR]
#                     [--budgets 0.25,0.5,1] [--sft-passes 1,2,4] [--vary arm|sft|base] [--data-dir DIR] [--changes '…'] [--dry-run]
set -u
usage() { sed -n '2,4s/^# \?//p' "$0"; }
fail() { echo "error: $1" >&2; exit 2; }

preset=tiny task='' base='' arms=sft,rl,sft_plus seeds=1 match_on=model run_dir='' budgets=1 passes=0 vary=arm data_dir='' changes='' dry=''
while [ $# -gt 0 ]; do
    case $1 in
        --help|-h) usage; exit 0 ;;
        --dry-run) dry=1; shift; continue ;;
        --preset|--task|--base|--arms|--seeds|--match-on|--run-dir|--budgets|--sft-passes|--vary|--data-dir|--changes) ;;
        *) fail "$1 is not an option: choose from --preset --task --base --arms --seeds --match-on --run-dir --budgets --sft-passes --vary --data-dir --changes --dry-run." ;;
    esac
    [ $# -ge 2 ] || fail "$1 needs a value."
    case $1 in
        --preset) preset=$2 ;; --task) task=$2 ;; --base) base=$2 ;; --arms) arms=$2 ;; --seeds) seeds=$2 ;; --match-on) match_on=$2 ;; --run-dir) run_dir=$2 ;;
        --budgets) budgets=$2 ;; --sft-passes) passes=$2 ;; --vary) vary=$2 ;; --data-dir) data_dir=$2 ;; --changes) changes=$2 ;;
    esac
    shift 2
done
[[ $seeds =~ ^[1-9][0-9]*$ ]] || fail "--seeds $seeds makes no sense: give a whole number of at least 1."
absolute() { case $1 in ''|/*|~*) echo "$1" ;; *) [ -e "$1" ] && realpath "$1" || echo "$1" ;; esac; }
base=$(absolute "$base") data_dir=$(absolute "$data_dir"); case $run_dir in ''|/*) ;; *) run_dir=$PWD/$run_dir ;; esac

. "$(dirname "$0")/env.sh"
make_env ''

# One line per arm and seed, in the order in which they must run; it also says what all of it will take.
queue=$(exp2_queue --preset "$preset" --task "$task" --base "$base" --arms "$arms" --seeds "$seeds" --match_on "$match_on" --run_dir "$run_dir" \
        --budgets "$budgets" --sft_passes "$passes" --vary "$vary" --data_dir "$data_dir" --changes "$changes") || exit $?
run_dir=$(sed -n 's/^# run_dir //p' <<<"$queue")
sed -n 's/^# say //p' <<<"$queue"
if [ -n "$dry" ]; then   # DEVICE and DEVICES: what the plan is for, e.g. DEVICE=a100 DEVICES=8
    sed -n '/^#/!p' <<<"$queue" | sed 's/^/would run: /'
    for p in ${passes//,/ }; do for b in ${budgets//,/ }; do
        [ "$passes $budgets" = "$p $b" ] || echo "Budget $b, SFT passes $p:"
        exp2_plan --preset "$preset" --task "$task" --base "$base" --match-on "$match_on" --budget "$b" --sft-passes "$p" --changes "$changes" ${DEVICE:+--device "$DEVICE"} --devices "${DEVICES:-1}"
    done; done
    exit
fi
mkdir -p "$run_dir/notebooks" "$run_dir/report"
sed -n 's/^# plan //p' <<<"$queue" >"$run_dir/plan.json"   # exp2_status reads it
echo "From another shell, exp2_status $run_dir says how far it has come."

child=''
stop() {          # SIGTERM and SIGINT go to the process that writes the run folder; it saves a checkpoint and ends
    trap '' TERM INT
    echo "Stopping: waiting for a checkpoint." >&2
    exp2_status "$run_dir" --stop >/dev/null 2>&1
    for _ in $(seq 60); do kill -0 "$child" 2>/dev/null || break; sleep .5; done
    kill "$child" 2>/dev/null
    echo "Stopped. The same command goes on from the last checkpoint in $run_dir." >&2
    exit 143
}
trap stop TERM INT

run() {           # run NOTEBOOK OUT ARGS…: papermill in the background and in its own process group, so that signals come to this script alone
    set -m; papermill --log-output --no-progress-bar "$@" >"$run_dir/notebooks/last.log" 2>&1 </dev/null & child=$!; set +m
    wait "$child" || { grep -E '(UserError|Interrupted|Error):' "$run_dir/notebooks/last.log" | tail -n 1 >&2
                       echo "error: $2 stopped; the whole log is in $run_dir/notebooks/last.log." >&2; exit 1; }
}
start=$SECONDS
while read -r name args; do
    case $name in ''|'#') continue ;; esac
    echo "[$(( (SECONDS-start)/60 )) min] $name"
    eval "run nbs/run_arm.ipynb \"$run_dir/notebooks/${name//\//-}.ipynb\" $args"
done <<<"$queue"

case ,$arms, in *,rl,*sft_plus,*|*,sft_plus,*rl,*) ;; *) echo "No verdict: that needs the arms sft, rl and sft_plus in $run_dir."; exit 0 ;; esac
echo "[$(( (SECONDS-start)/60 )) min] analysis"
run nbs/analysis.ipynb "$run_dir/report/analysis.ipynb" -r run_dirs "$run_dir"
echo "Report:  $run_dir/report/report.html"
echo "Figures: $run_dir/report/figures/"
python -c 'import sys; from exp2nb.report import verdict_line; print(verdict_line(sys.argv[1]))' "$run_dir"

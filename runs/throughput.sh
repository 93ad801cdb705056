#!/usr/bin/env bash
# How much do seeds side by side gain on this machine? As many seeds as cores are trained three times, in a folder that is deleted afterwards:
# one at a time on one thread, all at the same time on one thread each, one at a time on all cores. For a machine with nothing else to do.
#   bash runs/throughput.sh [CORES] [any option of runs/exp2.sh but --seeds, --jobs, --arms, --run-dir]
set -u
here=$(cd "$(dirname "$0")" && pwd)
case ${1:-} in
    --help|-h) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    ''|-*) cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu) ;;
    *) cores=$1; shift ;;
esac
[[ $cores =~ ^[1-9][0-9]{0,3}$ ]] || { echo "error: '$cores' is no number of cores: give a whole number such as 4." >&2; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

seconds=0
timed() {         # timed NAME JOBS THREADS [options]: trains all seeds, sets `seconds`
    local name=$1 jobs=$2 began=$SECONDS; export OMP_NUM_THREADS=$3; shift 3
    bash "$here/exp2.sh" --train-only --arms rl --seeds "$cores" --jobs "$jobs" --run-dir "$folder/$name" "$@" >"$folder/log" 2>&1 \
    || { cat "$folder/log" >&2; exit 1; }
    seconds=$((SECONDS-began))
}
uptime
timed warm 1 1 --preset smoke --changes 'rl.steps=1 sft.passes=0.1'   # the loops are compiled
timed one 1 1 "$@"; base=$seconds
printf '%-36s %6d s\n' "$cores seeds, one at a time, 1 thread" "$base"
timed side "$cores" 1 "$@"
printf '%-36s %6d s  %s times the throughput\n' "$cores seeds, $cores at a time, 1 thread" "$seconds" "$(awk "BEGIN{printf \"%.2f\", $base/$seconds}")"
timed all 1 "$cores" "$@"
printf '%-36s %6d s  %s times the throughput\n' "$cores seeds, one at a time, $cores threads" "$seconds" "$(awk "BEGIN{printf \"%.2f\", $base/$seconds}")"
uptime

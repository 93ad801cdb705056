#!/usr/bin/env bash
# Muon or AdamW for the matrices of an open base: the same trials for both (RL and SFT+, factors on the rates, two seeds), scored on dev.
#   bash runs/open_optimizers.sh BASE [--small] [options of exp2_tune, such as --factors 0.5,1,2 --data-dir DIR --changes '…' --run-dir DIR]
# Both start from SFT by AdamW. Every trial stays in DIR/<adamw|muon>/tuning.jsonl (DIR: out/optimizers). At full size this is for a GPU;
# --small is a few steps of SFT+ on 64 problems, to see on a CPU that it works (records/open-optimizers).
set -eu
for o in "$@"; do case $o in --help|-h) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;; esac; done
case ${1:-} in ''|-*) echo "error: name the base first: bash runs/open_optimizers.sh BASE [options]." >&2; exit 2 ;; esac
base=$1; shift
dir=out/optimizers changes='' options=()
while [ $# -gt 0 ]; do
    case $1 in --changes|--run-dir) [ $# -gt 1 ] || { echo "error: $1 wants a value (see --help)." >&2; exit 2; } ;; esac
    case $1 in
        --small)
            options+=(--n-train 64 --dev 8 --arms sft_plus --factors '0.25,1,4' --grow 0 --vary arm)
            changes="$changes sft.passes=0.1 sft.batch_tokens=1024 sft.micro_tokens=1024 sft.rehearsal_new=48 sft_plus.batch_tokens=1024"
            changes="$changes rl.problems=2 rl.samples=4 rl.steps=2 rl.max_new=96 rl.preflight=0 rl.micro_tokens=1024 eval.max_new=96" ;;
        --changes) changes="$changes $2"; shift ;;
        --changes=*) changes="$changes ${1#*=}" ;;
        --run-dir) dir=$2; shift ;;
        --run-dir=*) dir=${1#*=} ;;
        *) options+=("$1") ;;
    esac
    shift
done
here=$PWD
. "$(dirname "$0")/env.sh"
make_env hf
cd "$here"
for optimizer in adamw muon; do
    own="rl.rates.optimizer=$optimizer sft_plus.rates.optimizer=$optimizer"
    # Muon's step has a size of its own: 40 times AdamW's rate is where its trials begin
    [ $optimizer = muon ] && own="$own rl.rates.matrix=0.0002 sft_plus.rates.matrix=0.001"
    exp2_tune --base "$base" --run-dir "$dir/$optimizer" ${options[@]+"${options[@]}"} --changes "$own$changes"
done

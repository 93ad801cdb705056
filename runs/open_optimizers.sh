#!/usr/bin/env bash
# Muon or AdamW for the matrices of an open base: the same trials for both (RL and SFT+, factors on the rates, two seeds), scored on dev.
#   bash runs/open_optimizers.sh BASE [options of exp2_tune, such as --factors 0.5,1,2 --data-dir DIR]
# Both start from SFT by AdamW. Every trial stays in out/optimizers/<adamw|muon>/tuning.jsonl. At full size this is for a GPU.
set -eu
[ $# -gt 0 ] || { sed -n '2,4s/^# \?//p' "$0"; exit 2; }
base=$1; shift
here=$PWD
. "$(dirname "$0")/env.sh"
make_env hf
cd "$here"
for optimizer in adamw muon; do
    changes="rl.rates.optimizer=$optimizer sft_plus.rates.optimizer=$optimizer"
    # Muon's step has a size of its own: 40 times AdamW's rate is where its trials begin
    [ $optimizer = muon ] && changes="$changes rl.rates.matrix=0.0002 sft_plus.rates.matrix=0.001"
    exp2_tune --base "$base" --run-dir "out/optimizers/$optimizer" --changes "$changes" "$@"
done

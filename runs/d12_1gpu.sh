#!/usr/bin/env bash
# The 12-layer experiment on GSM8K, on one GPU: pretraining, the note's SFT mixture, and the three arms.
#   bash runs/d12_1gpu.sh [--dry-run] [any option of runs/exp2.sh]
# Without internet on this machine: exp2_fetch --preset d12 --data-dir DIR on another one, then --data-dir DIR here.
# nanochat's 12-layer model hardly ever solves a GSM8K problem: look at the pre-flight before you let it run, or begin with --task stories.
DEVICES=1 exec bash "$(dirname "$0")/exp2.sh" --preset d12 "$@"   # DEVICES is for the plan that --dry-run prints

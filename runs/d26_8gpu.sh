#!/usr/bin/env bash
# The note's experiment: 26 layers, GSM8K, eight GPUs of one machine (H100; DEVICE=a100 plans for A100). One process a GPU, started by the run notebook itself.
#   bash runs/d26_8gpu.sh [--dry-run] [any option of runs/exp2.sh]
# With a base of your own (--base PATH: nanochat's d26, or an open model) nothing is pretrained here.
# One seed is a first look; a verdict on the methods takes ten, each with an SFT checkpoint of its own: --seeds 10.
# Metrics in W&B or trackio as well: --tracker wandb. From an SFT checkpoint that you have: --sft-checkpoint /its/path
DEVICES=8 exec bash "$(dirname "$0")/exp2.sh" --preset d26 "$@"   # DEVICES is for the plan that --dry-run prints

#!/usr/bin/env bash
# The whole experiment with one command: environment, arms, analysis. Started again, it goes on where it was.
#   bash runs/exp2.sh [--preset P] [--task T] [--base PATH] [--arms a,b] [--seeds N] [--jobs N] [--match-on B[,B]] [--run-dir DIR]
#                     [--budgets 0.25,0.5,1] [--sft-passes 1,2,4] [--vary arm|sft|base] [--data-dir DIR] [--changes '…'] [--dry-run]
# These and more are the options of exp2_run, which does the work.
set -u
extra='' next=''
for o in "$@"; do
    case $o in
        --help|-h)
            sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
            all=$(dirname "$0")/../.venv/bin/exp2_run; [ "${EXP2_ENV:-}" != active ] || all=exp2_run
            if command -v "$all" >/dev/null; then echo; exec "$all" --help; fi
            echo "They are listed here after the installation: bash runs/exp2.sh --dry-run makes the environment, and begins nothing."
            exit 0 ;;
        --base|--sft-checkpoint) next=1; continue ;;
        --base=*|--sft-checkpoint=*) next=1; o=${o#*=} ;;
    esac
    # a model that is neither nanochat's nor our own is read with transformers
    if [ -n "$next" ] && [[ $o != *model_*.pt ]] && ! compgen -G "$o/model_*.pt" >/dev/null && [ ! -e "$o/state.json" ]; then extra=hf; fi
    next=''
done
here=$PWD   # paths are meant from here
. "$(dirname "$0")/env.sh"
make_env "$extra"
EXP2_ROOT=$PWD; export EXP2_ROOT
cd "$here" || exit 1
exec exp2_run "$@"

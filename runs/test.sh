#!/usr/bin/env bash
# Everything that a reviewer wants green: exported files in sync, notebooks clean, lint, the notebooks' own tests, tests/.
set -u
. "$(dirname "$0")/env.sh"
make_env 'dev'
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
began=$SECONDS failed=()
step() {          # step NAME COMMAND…
    local name=$1 t=$SECONDS; shift
    echo "== $name"
    if "$@"; then echo "   ok ($((SECONDS-t)) s)"; else echo "   FAILED: $name"; failed+=("$name"); fi
}
in_sync() {       # export and clean a copy: nothing may change
    local copy; copy=$(mktemp -d)
    cp -r nbs exp2nb settings.ini pyproject.toml README.md "$copy" && (cd "$copy" && nbdev_export && nbdev_clean) \
    && diff -r -x __pycache__ -x .ipynb_checkpoints nbs "$copy/nbs" && diff -r -x __pycache__ exp2nb "$copy/exp2nb"
    local rc=$?; rm -rf "$copy"; return $rc
}
imports() { for m in exp2nb/[a-z]*.py; do python -c "import exp2nb.$(basename "$m" .py)" || return 1; done; }
step 'exported files in sync, notebooks clean' in_sync
step 'lint' ruff check exp2nb tests
step 'every module imports in a fresh process' imports
step 'notebooks (nbdev_test)' nbdev_test --n_workers 2 --do_print
step 'tests/' python -m pytest -q "$@"
if [ ${#failed[@]} -gt 0 ]; then echo "FAILED after $((SECONDS-began)) s: ${failed[*]}"; exit 1; fi
echo "All green after $((SECONDS-began)) s."

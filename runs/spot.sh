#!/usr/bin/env bash
# runs/exp2.sh on a machine that may vanish: begins with what the bucket has, and copies the run folder there while it runs.
#   bash runs/spot.sh BUCKET_FOLDER [--dry-run] [any option of runs/exp2.sh but --run-dir]
# The run itself is on the local disk: a bucket that is mounted as a folder has neither locks nor atomic renames.
set -u
here=$(cd "$(dirname "$0")" && pwd) root=$(cd "$(dirname "$0")/.." && pwd)
bucket=${1:-}; shift || true
case $bucket in ''|-*) echo "error: name the bucket's folder first: bash runs/spot.sh /artefacts [options]." >&2; exit 2 ;; esac
case " $* " in *' --run-dir '*) echo "error: --run-dir is chosen here: the run is copied to $bucket." >&2; exit 2 ;; esac
run=${RUN_DIR:-$root/out/spot}
case " $* " in *' --dry-run '*)
    bash "$here/exp2.sh" "$@" --run-dir "$run" || exit $?
    echo "would copy: $bucket → $run before, $run → $bucket every ${EVERY:-60} s and at the end"
    exit ;; esac
[ -d "$bucket" ] || { echo "error: there is no folder $bucket: mount the bucket there first." >&2; exit 2; }

save() {          # checkpoints first, so that the bucket's files are never shorter than its newest checkpoint says; a half-copied one is known by its manifest
    (cd "$run" && find . -path '*/checkpoints/step_*' -type f -exec cp -u --parents -t "$bucket" {} +
     find . -type f ! -path '*/checkpoints/*' ! -name .lock -exec cp -u --parents -t "$bucket" {} +
     cd "$bucket" && find . -path '*/checkpoints/step_*' -type d | while read -r d; do [ -e "$run/$d" ] || rm -rf "$d"; done) 2>/dev/null
}
mkdir -p "$run" && cp -r "$bucket/." "$run/" || exit 1
run=$(cd "$run" && pwd) bucket=$(cd "$bucket" && pwd)
bash "$here/exp2.sh" "$@" --run-dir "$run" & child=$!
trap 'kill -TERM "$child"' TERM INT
( while sleep "${EVERY:-60}"; do save; done ) >/dev/null 2>&1 & saver=$!
while :; do wait "$child"; rc=$?; kill -0 "$child" 2>/dev/null || break; done   # a signal interrupts wait: wait again
kill "$saver" 2>/dev/null; wait "$saver" 2>/dev/null
save
exit "$rc"

#!/usr/bin/env bash
# runs/exp2.sh on a machine that may vanish: begins with what the bucket has, and copies the run folder there while it runs.
#   bash runs/spot.sh BUCKET_FOLDER [--dry-run] [any option of runs/exp2.sh but --run-dir]
# The run itself is on the local disk: a bucket that is mounted as a folder has neither locks nor atomic renames.
set -u
here=$(cd "$(dirname "$0")" && pwd) root=$(cd "$(dirname "$0")/.." && pwd)
bucket=${1:-}; shift || true
case $bucket in
    --help|-h) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    ''|-*) echo "error: name the bucket's folder first: bash runs/spot.sh /artefacts [options]." >&2; exit 2 ;;
esac
case " $* " in *' --run-dir '*) echo "error: --run-dir is chosen here: the run is copied to $bucket." >&2; exit 2 ;; esac
run=${RUN_DIR:-$root/out/spot}
case " $* " in *' --dry-run '*)
    bash "$here/exp2.sh" "$@" --run-dir "$run" || exit $?
    echo "would copy: $bucket → $run before, $run → $bucket every ${EVERY:-60} s and at the end"
    exit ;; esac
[ -d "$bucket" ] || { echo "error: there is no folder $bucket: mount the bucket there first." >&2; exit 2; }
if ! { echo >"$bucket/.probe" && rm "$bucket/.probe"; } 2>/dev/null; then
    echo "error: $bucket cannot be written: mount the bucket so that this user can write to it." >&2; exit 2
fi

copy() {          # copy TEST…: the run's files of this test of find, where the bucket's are not newer; shows why the first one failed
    local f why rc=0
    while IFS= read -r -d '' f; do
        [ ! "$bucket/$f" -nt "$f" ] || continue
        why=$({ mkdir -p "$bucket/${f%/*}" && cp "$f" "$bucket/$f"; } 2>&1) && continue
        rm -f "$bucket/$f" 2>/dev/null   # a part of a file would look newer than the file
        [ -e "$f" ] || continue          # the run has deleted it meanwhile
        [ $rc = 1 ] || echo "$why" >&2
        rc=1
    done < <(find . -type f "$@" -print0 2>/dev/null)
    return $rc
}
save() {          # checkpoints first, so that the bucket's files are never shorter than its newest checkpoint says; a half-copied one is known by its manifest
    local d rc=0
    cd "$run" || return 1
    copy -path '*/checkpoints/step_*' || rc=1
    copy ! -path '*/checkpoints/*' ! -name .lock || rc=1
    cd "$bucket" || return 1
    while read -r d; do [ -e "$run/$d" ] || rm -rf "$d" || rc=1; done < <(find . -path '*/checkpoints/step_*' -type d -prune)
    return $rc
}
mkdir -p "$run" && cp -r "$bucket/." "$run/" || { echo "error: $bucket could not be copied to $run: see the message above." >&2; exit 1; }
run=$(cd "$run" && pwd) bucket=$(cd "$bucket" && pwd)
bash "$here/exp2.sh" "$@" --run-dir "$run" & child=$!
trap 'kill -TERM "$child"' TERM INT
(   # asked to end, it ends the copy that it is at
    nap=''; trap 'kill $nap 2>/dev/null; exit' TERM
    while :; do
        sleep "${EVERY:-60}" >/dev/null 2>&1 & nap=$!; wait "$nap"
        save || echo "warning: not everything could be copied to $bucket: trying again in ${EVERY:-60} s." >&2
    done
) >/dev/null & saver=$!
while :; do wait "$child"; rc=$?; kill -0 "$child" 2>/dev/null || break; done   # a signal interrupts wait: wait again
kill "$saver" 2>/dev/null; wait "$saver" 2>/dev/null
if ! save; then
    echo "error: files are missing in $bucket: copy them from $run before this machine goes." >&2
    [ "$rc" != 0 ] || rc=1
fi
exit "$rc"

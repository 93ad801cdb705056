#!/usr/bin/env bash
# The book as a web page: README, every notebook with its outputs, the records. Nothing is run; a link that leads nowhere stops it.
#   bash runs/book.sh [FOLDER]        default: _docs in the project's root; open _docs/index.html
set -eu
case ${1:-} in
    --help|-h) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) echo "error: $1 is not an option: bash runs/book.sh [FOLDER]." >&2; exit 2 ;;
    ''|/*) out=${1:-_docs} ;;
    *) out=$PWD/$1 ;;
esac
. "$(dirname "$0")/env.sh"   # goes to the project's root; has find_python
if [ "${EXP2_ENV:-}" != active ]; then   # an environment of its own: it needs none of the package's libraries
    [ -x .venv-book/bin/python ] || { python=$(find_python); "$python" -m venv .venv-book; }
    .venv-book/bin/python - <<'PY' >.venv-book/wanted.txt
import tomllib
print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['book'], sep='\n')
PY
    .venv-book/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-book/wanted.txt
    . .venv-book/bin/activate
fi
python -m sphinx -b html -c runs/book -j auto -q -W --keep-going . "$out"
printf '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=README.html"><a href="README.html">exp2nb</a>\n' >"$out/index.html"
touch "$out/.nojekyll"
echo "The book: $out/index.html"

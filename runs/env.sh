# shellcheck shell=bash
# Sourced by the scripts in this folder: makes .venv in the project's root, or reuses it, and activates it.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# A training step on a CPU allocates and frees large arrays all the time: huge pages, and keeping freed memory, save a tenth of it (Linux; elsewhere these do nothing).
export THP_MEM_ALLOC_ENABLE="${THP_MEM_ALLOC_ENABLE:-1}" MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-4294967296}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-4294967296}"

find_python() {   # the newest of the supported Pythons that really starts
    for p in python3.13 python3.12 python3.11 python3; do
        "$p" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo "$p"; return; }
    done
    echo "error: Python 3.11, 3.12 or 3.13 (with venv) is needed and was not found: install one, e.g. apt-get install python3 python3-venv." >&2
    return 1
}

env_made() {      # env_made EXTRAS: is .venv what they and this machine ask for? Sets want, extras and build.
    local x have; have=$(cat .venv/.made-of 2>/dev/null)
    extras=${have##*\[}; extras=${extras%]}     # those that are there stay
    for x in ${1//,/ }; do [[ ,$extras, == *,$x,* ]] || extras=${extras:+$extras,}$x; done
    # Which PyTorch: with CUDA where there is a GPU, or will be (EXP2_GPU=1, for a login node); an environment with CUDA is never made poorer.
    build=cpu
    if [ "${EXP2_GPU:-}" = 1 ] || command -v nvidia-smi >/dev/null || [[ $have == *' cuda ['* ]]; then build=cuda; fi
    want="$(cat pyproject.toml runs/constraints.txt | cksum) $build [$extras]"
    [ "$have" = "$want" ]
}

install_env() {   # what env_made asks for
    local python pip=(.venv/bin/python -m pip) index=(); python=$(find_python) || return 1
    echo "Making the environment in .venv (once; a few minutes)."
    "${pip[@]}" --version >/dev/null 2>&1 || "$python" -m venv .venv || return 1
    # Without a GPU, PyTorch's own index has a build without CUDA: megabytes in place of gigabytes. Both builds have the same version.
    [ "$build" = cuda ] || index=(--extra-index-url https://download.pytorch.org/whl/cpu)
    if [ "$build" = cuda ] && .venv/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' 2>/dev/null; then
        "${pip[@]}" uninstall -qy torch
    fi
    "${pip[@]}" install -qq --disable-pip-version-check --no-deps --retries 1 --timeout 30 \
        ${index[@]+"${index[@]}"} -c runs/constraints.txt torch \
    && "${pip[@]}" install --quiet --disable-pip-version-check -c runs/constraints.txt -e ".${extras:+[$extras]}" \
    && .venv/bin/python -m ipykernel install --sys-prefix --name python3 >/dev/null 2>&1 \
    && echo "$want" > .venv/.made-of || { echo "error: the installation failed: see the messages above." >&2; return 1; }
}

make_env() {      # make_env EXTRAS, such as '' or 'dev,hf'; with EXP2_ENV=active, the environment that is active already is used as it is
    [ "${EXP2_ENV:-}" = active ] && return
    # Of processes that start together, on several nodes too, one installs and the others wait. The folder .making.0 is the lock; its owner
    # writes to it every few seconds. Where that ends (its machine died), .making.1 is the lock, which again only one of them can make.
    local want extras build lock n=0 i=0 beat seen='' gone=0 since=$SECONDS
    until env_made "$1"; do
        lock=.venv/.making.$n
        if { mkdir -p .venv && mkdir "$lock"; } 2>/dev/null; then
            trap 'rm -rf .venv/.making.*' EXIT   # after an error or a signal, too
            ( while kill -0 $$ && echo $((i+=1)) >"$lock/beat"; do sleep 5; done ) >/dev/null 2>&1 & beat=$!
            env_made "$1" || install_env || exit 1
            { kill "$beat"; wait "$beat"; } 2>/dev/null || true
            rm -rf .venv/.making.*; trap - EXIT
            break
        fi
        beat=$n:$(cat "$lock/beat" 2>/dev/null) || true
        if [ ! -d "$lock" ]; then   # its owner has failed: our turn, if a folder can be made at all
            n=0 gone=$((gone+1))
            [ "$gone" -lt 5 ] || { echo "error: $PWD/.venv cannot be written: look at its owner and at the space left." >&2; exit 1; }
        elif [ "$beat" != "$seen" ]; then
            [ -n "$seen" ] || echo "Another process is making the environment in .venv: waiting for it."
            seen=$beat gone=0 since=$SECONDS
        elif [ $((SECONDS-since)) -ge "${EXP2_STALE:-120}" ]; then n=$((n+1)) since=$SECONDS
        fi
        sleep 1
    done
    . .venv/bin/activate
}

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

make_env() {      # make_env EXTRAS: e.g. make_env '' or make_env 'dev,hf'; with EXP2_ENV=active, the environment that is active already is used as it is
    [ "${EXP2_ENV:-}" = active ] && return
    local want have extras build=cpu; have=$(cat .venv/.made-of 2>/dev/null)
    extras=${have##*\[}; extras=${extras%]}     # those that are there stay
    for x in ${1//,/ }; do [[ ,$extras, == *,$x,* ]] || extras=${extras:+$extras,}$x; done
    # Which PyTorch: with CUDA where there is a GPU, or will be (EXP2_GPU=1, for a login node); an environment with CUDA is never made poorer.
    if [ "${EXP2_GPU:-}" = 1 ] || command -v nvidia-smi >/dev/null || [[ $have == *' cuda ['* ]]; then build=cuda; fi
    want="$(cat pyproject.toml runs/constraints.txt | cksum) $build [$extras]"
    if [ "$have" != "$want" ]; then
        local python; python=$(find_python) || exit 1
        echo "Making the environment in .venv (once; a few minutes)."
        [ -x .venv/bin/python ] || "$python" -m venv .venv || exit 1
        # Without a GPU, PyTorch's own index has a build without CUDA: megabytes in place of gigabytes. To pip, that build is of the same version as the other.
        local index=(); [ $build = cuda ] || index=(--extra-index-url https://download.pytorch.org/whl/cpu)
        if [ $build = cuda ] && .venv/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' 2>/dev/null; then .venv/bin/python -m pip uninstall -qy torch; fi
        .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --retries 1 --timeout 30 ${index[@]+"${index[@]}"} -c runs/constraints.txt torch \
        && .venv/bin/python -m pip install --quiet --disable-pip-version-check -c runs/constraints.txt -e ".${extras:+[$extras]}" \
        && .venv/bin/python -m ipykernel install --sys-prefix --name python3 >/dev/null 2>&1 \
        && echo "$want" > .venv/.made-of || { echo "error: the installation failed: see the messages above." >&2; exit 1; }
    fi
    . .venv/bin/activate
}

#!/bin/sh
# Installs Slimserve into .venv beside this file. "./install.sh dev" adds what the tests need.
# PYTHON names another interpreter; VENV another folder for the environment.
set -eu
cd "$(dirname "$0")"
extras=${1:-}
python=${PYTHON:-python3}
venv=${VENV:-.venv}
cpu_torch="torch==2.13.0+cpu"
cpu_index="https://download.pytorch.org/whl/cpu"

say() { printf '[install] %s\n' "$*"; }
stop() { printf '[install] %s\n' "$*" >&2; exit 1; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    stop "Python 3.11 or newer is needed. Set PYTHON to such an interpreter, for example: PYTHON=python3.12 $0"
if [ ! -x "$venv/bin/python" ]; then
    say "creating $venv"
    "$python" -m venv "$venv" ||
        stop "cannot create a virtual environment. On Debian or Ubuntu: apt-get install python3-venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

has_nvidia_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

install_torch() {
    if "$venv/bin/python" -c 'import torch' 2>/dev/null; then
        say "torch is here already: $("$venv/bin/python" -c 'import torch; print(torch.__version__)')"
    elif has_nvidia_gpu; then
        say "an NVIDIA GPU is here: taking torch with CUDA (several GB)"
        pip install -q "torch>=2.11,<2.15"
    # A CPU build is 190 MB, the default Linux build several GB: look for the small one first.
    elif pip install -q --retries 0 "$cpu_torch" 2>/dev/null; then
        say "no NVIDIA GPU: took $cpu_torch from the configured package index"
    elif pip install -q --retries 0 --timeout 20 --extra-index-url "$cpu_index" "$cpu_torch" 2>/dev/null; then
        say "no NVIDIA GPU: took $cpu_torch from PyTorch's CPU index"
    else
        say "no NVIDIA GPU, but PyTorch's CPU build cannot be reached: taking torch as the package index gives it"
        pip install -q "torch>=2.11,<2.15"
    fi
}

install_torch
if has_nvidia_gpu; then extras="${extras:+$extras,}gpu"; fi
say "installing slimserve${extras:+ with extras: $extras}"
pip install -q -e ".${extras:+[$extras]}"
say "done: $("$venv/bin/slimserve" --version)"

#!/usr/bin/env bash
# Creates .venv with the pinned versions of constraints.txt and installs lorat in it, once.
#   scripts/setup-venv.sh [EXTRA]        EXTRA: "" (to run) or "test"
# torch first, so that nothing else decides which build comes: with an NVIDIA GPU the ordinary (CUDA) build,
# without one a CPU build where there is one. PYTHON names the interpreter (default: the first of python3.13,
# 3.12, 3.11, python3 that is 3.11 to 3.13); VENV the folder.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-}
venv=${VENV:-.venv}
stamp="$venv/.lorat-${extra:-run}"
if [ -f "$stamp" ] && [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints.txt ]; then exit 0; fi

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }
if [ ! -x "$venv/bin/python" ]; then
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if fits "$candidate"; then python=$candidate; break; fi
  done
  if [ -z "${python:-}" ]; then
    echo "lorat needs Python 3.11, 3.12 or 3.13; set PYTHON to one, as in: make ${extra:-demo} PYTHON=python3.12" >&2
    exit 1
  fi
  echo "creating $venv with $("$python" --version)"
  "$python" -m venv "$venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

torch=$(sed -n 's/^torch==//p' constraints.txt)
has_gpu() { [ -e /dev/nvidia0 ] || nvidia-smi >/dev/null 2>&1; }
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  if has_gpu || [ "$(uname)" != Linux ]; then
    echo "installing torch $torch"
    pip install -q "torch==$torch"
  else
    echo "installing torch $torch, CPU build (no NVIDIA GPU here)"
    # a CPU build that pip already knows of; PyTorch's own index of them; at last whatever there is
    pip install -q "torch==$torch+cpu" 2>/dev/null \
      || pip install -q "torch==$torch" --index-url https://download.pytorch.org/whl/cpu \
      || pip install -q "torch==$torch"
  fi
fi
echo "installing lorat${extra:+ with what its $extra needs}"
pip install -q -c constraints.txt -e ".${extra:+[$extra]}"
touch "$stamp"

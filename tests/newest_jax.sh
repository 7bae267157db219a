#!/usr/bin/env bash
# The quick loop on the newest jax: jax 0.11 and newer want a Python of 3.12, and .ci/run may have an older one.
#
#   tests/newest_jax.sh VENV_DIR [PYTEST_OPTION ...]
#
# Needs a Python of 3.12 or newer ($PYTHON, python3 by default) and a package index. Installs into VENV_DIR, which it
# makes; tests that need what the newest releases lack skip and say so. It is no part of .ci/run.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:?usage: tests/newest_jax.sh VENV_DIR [PYTEST_OPTION ...]}
shift
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' || {
    echo "newest_jax.sh: $("$python" --version) is too old; set PYTHON to a Python of 3.12 or newer" >&2
    exit 2
}
"$python" -m venv "$venv"
"$venv/bin/pip" install --quiet -e '.[test]'
"$venv/bin/python" -c 'import jax, sys; print("jax", jax.__version__, "on Python", sys.version.split()[0])'
PYTHONPATH=$PWD "$venv/bin/pytest" -q "$@"

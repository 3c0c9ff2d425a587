#!/bin/sh
# Installs what the tests need, then runs every check: format, lint, types, tests. Arguments go to pytest.
set -eu
cd "$(dirname "$0")"
./install.sh dev
bin=${VENV:-.venv}/bin
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
"$bin/slimserve" pull smollm2-135m
exec "$bin/python" -m pytest "$@"

#!/bin/sh
# Installs Slimserve, fetches a small real model and serves it. Arguments go to "slimserve serve".
set -eu
here=$(dirname "$0")
"$here/install.sh"
exec "${VENV:-$here/.venv}/bin/slimserve" serve "$@"

#!/bin/sh
# Checks the image's Dockerfile, the compose files, the chart and the RayService, with every tool for it. Arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
tools=$PWD/build/tools
if ! command -v helm >/dev/null && [ ! -x "$tools/helm" ]; then "$python" deploy/fetch_helm.py "$tools"; fi
PATH="$tools:$PATH" exec "$python" -m pytest tests/unit/test_deploy.py tests/unit/test_chart.py tests/unit/test_ray_manifests.py "$@"

#!/usr/bin/env bash
# Builds the source distribution, from it the wheel, and uses the wheel in a fresh environment outside the checkout.
# Usage: .ci/wheel_smoke.sh PYTHON    (a python that has `build`)
set -eu
python=$1
outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT

rm -rf build dist
"$python" -m build --outdir dist >"$outside/build.log" 2>&1 || { cat "$outside/build.log" >&2; exit 1; }
ls -l dist

"$python" -m venv "$outside/venv"
echo "Installing the wheel into a fresh environment (minutes: torch is large)"
"$outside/venv/bin/pip" install --quiet --disable-pip-version-check --no-input dist/*.whl
cp .ci/wheel_smoke.py "$outside/"
cd "$outside"
PATH="$outside/venv/bin:$PATH" venv/bin/python wheel_smoke.py

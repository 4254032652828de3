#!/bin/sh
# Try a wheel, or a source distribution, in a new environment: try_wheel.sh PYTHON FILE
# The examples that need nothing but the package run away from this checkout's sources.
set -eu
python=$1 file=$2
here=$(cd "$(dirname "$0")/../.." && pwd)
file=$(cd "$(dirname "$file")" && pwd)/$(basename "$file")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m venv "$scratch/new"
new=$scratch/new/bin
"$new/python" -m pip install --quiet --disable-pip-version-check "$file"
cp "$here/examples/asyncio_app.py" "$here/examples/million_tasks.py" "$here/examples/api_calls.py" "$scratch"
cd "$scratch"
"$new/skyward" --version
"$new/python" asyncio_app.py 50_000
"$new/python" million_tasks.py 20_000
"$new/python" api_calls.py 60

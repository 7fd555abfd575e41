#!/bin/sh
# Runs the tests, in the environment that run.sh makes; arguments are pytest's.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=$(sh "$here/../run.sh" --setup)
"$python" -c 'import hypothesis, pytest, ruff' 2>/dev/null ||
    "$python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
cd "$here/.."
exec "$python" -m pytest "$@"

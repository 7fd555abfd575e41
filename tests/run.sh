#!/bin/sh
# Runs the tests, two at a time, in the environment that run.sh makes; arguments are pytest's.
# 'sh tests/run.sh endurance' runs the long ones alone, which are left out otherwise.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=$(sh "$here/../run.sh" --setup)
"$python" -c 'import hypothesis, imageio_ffmpeg, jax, mypy, pillow_heif, pytest, ray, ruff, selenium, tensorboard, xdist' 2>/dev/null ||
    "$python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
cd "$here/.."
kind='not endurance'
if [ "${1:-}" = endurance ]; then
    kind=$1
    shift
fi
exec "$python" -m pytest -n 2 --dist worksteal --durations=10 -m "$kind" "$@"

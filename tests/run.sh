#!/bin/sh
# Checks style and types, then runs the tests, three at a time, in the environment that run.sh makes.
# With arguments, which are pytest's, it runs those tests alone: 'sh tests/run.sh tests/test_losses.py'.
# 'sh tests/run.sh endurance' runs the long ones alone, which are left out otherwise.
set -u
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
root=$(dirname -- "$here")
python=$(sh "$root/run.sh" --setup) || exit
"$python" - "$here/requirements.txt" "$root"/extras/*.txt <<'END' >/dev/null 2>&1 ||
import sys
from importlib.metadata import version
from packaging.requirements import Requirement
for line in "".join(open(file).read() for file in sys.argv[1:]).splitlines():
    requirement = Requirement(line)
    if not requirement.marker or requirement.marker.evaluate():
        assert requirement.specifier.contains(version(requirement.name))
END
    cat "$here/requirements.txt" "$root"/extras/*.txt |
    "$python" -m pip install --quiet --disable-pip-version-check -r /dev/stdin || exit
# In its own environment the checkout is installed, for benchmarks. One that is active may be shared with other checkouts,
# whose benchmarks would then find this one: there nothing is installed. pytest finds the checkout in any case.
case $python in
    "$root"/.venv/*)
        "$python" -I - "$root/deepstyle.py" <<'END' >/dev/null 2>&1 ||
import sys
from importlib.util import find_spec
sys.exit(find_spec("deepstyle").origin != sys.argv[1])
END
            "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e "$root" || exit
        ;;
esac
cd "$root"
kind='not endurance'
checks=
case ${1:-} in
    '') checks=yes ;;
    endurance)
        kind=$1
        shift
        ;;
esac
passed=0 failed=0
check() {
    if "$python" -m "$@"; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
}
if [ -n "$checks" ]; then
    check ruff check --quiet .
    check ruff format --check --quiet .
    check mypy
fi
# With an arena of memory for each of TensorFlow's threads a worker keeps more than it needs.
export MALLOC_ARENA_MAX=1
# Ray gives its workers a low priority, with which they would get hardly any time beside the other tests.
export RAY_worker_niceness=0
# Three on two cores, since some wait: for Ray, for a browser, for a signal. Tests that share what is slow to start have
# a group, which one of the three runs.
"$python" -m pytest -n 3 --dist loadgroup --durations=10 -m "$kind" "$@"
status=$?
if [ -n "$checks" ]; then
    echo "checks: $passed passed, $failed failed"
    [ $failed -eq 0 ] || exit 1
fi
exit $status

"""The benchmark for GPUs runs without one: a check of itself."""

import json
import os
import subprocess
import sys

from conftest import IMAGES

ON_GPU = IMAGES.parent / "benchmarks" / "on_gpu.py"


def test_the_check_of_a_gpu_agrees_with_the_oracle_and_says_what_time_left_out(tmp_path):
    command = [sys.executable, ON_GPU, "--rows", "32", "--backends", "tensorflow", "no_such_backend"]
    found = {}
    for name, minutes in (("none", "0"), ("all", "9")):
        path = tmp_path / f"{name}.json"
        asked = [*command, "--minutes", minutes, "--json", path]
        ended = subprocess.run([*map(str, asked)], env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}, capture_output=True)
        assert ended.returncode == 0, ended.stderr
        found[name] = json.loads(path.read_text())
        assert found[name]["not_installed"] == ["no_such_backend"]
    # None of the time, and all of it.
    assert found["none"]["rows"] == []
    assert found["none"]["left_out"][0] == "tensorflow exact"
    assert found["all"]["left_out"] == []
    exact, *sizes = found["all"]["rows"]
    assert max(exact["errors"]) < 1e-4
    assert {tuple(row["asked"][:3]) for row in sizes} == {("size", 32, 0)}
    assert sum(row["at_once"] == 2 for row in sizes) == 2
    assert all(row["seconds"] > 0 for row in sizes)

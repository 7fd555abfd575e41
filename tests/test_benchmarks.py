"""The benchmark for GPUs runs without one: a check of itself."""

import json
import subprocess
import sys

import pytest
from conftest import IMAGES, for_scripts

ON_GPU = IMAGES.parent / "benchmarks" / "on_gpu.py"


def check(tmp_path, *flags):
    """What the benchmark writes of TensorFlow and of a backend that is not there."""
    path = tmp_path / "found.json"
    command = [sys.executable, ON_GPU, "--rows", "32", "--backends", "tensorflow", "none", "--json", path, *flags]
    ended = subprocess.run([*map(str, command)], env=for_scripts(TF_CPP_MIN_LOG_LEVEL="3"), capture_output=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(path.read_text())
    assert found["not_installed"] == ["none"]
    return found


def test_the_check_of_a_gpu_says_what_there_was_no_time_for(tmp_path):
    found = check(tmp_path, "--minutes", "0")
    assert found["rows"] == []
    assert found["left_out"][:2] == ["tensorflow exact", "tensorflow size 32 0 scipy"]


@pytest.mark.endurance  # six processes that load TensorFlow and compile
def test_the_check_of_a_gpu_agrees_with_the_oracle(tmp_path):
    found = check(tmp_path, "--minutes", "9")
    assert found["left_out"] == []
    exact, *sizes = found["rows"]
    assert max(exact["errors"]) < 1e-4
    assert {tuple(row["asked"][:3]) for row in sizes} == {("size", 32, 0), ("rounded", 32)}
    assert sum({"seconds_mixed", "seconds_tf32"} <= row.keys() for row in sizes) == 1
    assert sum(row["at_once"] == 2 for row in sizes) == 2
    assert all(row["seconds"] > 0 for row in sizes)

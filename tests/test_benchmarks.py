"""The benchmark for GPUs runs without one: a check of itself."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import IMAGES, for_scripts
from test_objective import pictures

import deepstyle

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
    assert found["left_out"][:2] == ["tensorflow exact", "tensorflow command 32 device full"]


def test_its_two_parts_are_the_whole(tmp_path):
    whole, *parts = (
        check(tmp_path, "--minutes", "0", "--rows", "32", "48", "64", *part)["left_out"]
        for part in ([], ["--part", "1"], ["--part", "2"])
    )
    assert whole == [*parts[0], *parts[1]]
    assert [name for name in parts[1] if " 32" in name] == []


def test_a_part_without_sizes_is_an_error(tmp_path):
    command = [sys.executable, ON_GPU, "--rows", "32", "--part", "2", "--json", tmp_path / "found.json"]
    ended = subprocess.run([*map(str, command)], env=for_scripts(), capture_output=True, text=True)
    assert ended.returncode == 2
    assert "part 2 measures the sizes after the first; give more --rows" in ended.stderr
    assert not (tmp_path / "found.json").exists()


@pytest.mark.endurance  # ten processes that load TensorFlow and compile
def test_the_check_of_a_gpu_agrees_with_the_oracle(tmp_path):
    found = check(tmp_path, "--minutes", "9")
    assert found["left_out"] == []
    rows = {" ".join(map(str, row["asked"])): row for row in found["rows"]}
    assert max(rows["exact"]["errors"]) < 1e-4
    assert {name.split()[0] for name in rows} == {"exact", "command", "size", "rounded", "ways", "shared"}
    assert {"seconds_mixed", "seconds_tf32"} <= rows["rounded 32"].keys()
    assert sum(row["asked"][0] == "shared" for row in found["rows"]) == 2
    assert all(row["until_tenth"] > 0 for name, row in rows.items() if name.startswith("command"))
    assert {name for name in rows if name.startswith("size")} == {"size 32 0 device", "size 32 0 scipy"}
    assert all(row["seconds"] > 0 for row in found["rows"] if row["asked"][0] in ("size", "rounded", "shared"))
    own, other = rows["ways 32 float32"]["ways"]
    assert (own["way"], other["way"]) == ("transposed", "forward")
    assert other["difference"] < 1e-5  # another way to the same, on some machines to the bit
    assert [one["way"] for one in rows["ways 32 bfloat16"]["ways"]] == ["transposed", "forward"]


@pytest.mark.endurance
def test_the_plain_script_that_it_is_raced_against_has_the_same_loss(tmp_path, untrained):
    torch = pytest.importorskip("torch")
    sys.path.insert(0, str(ON_GPU.parent))
    try:
        import plain_pytorch
    finally:
        sys.path.pop(0)
    content, style, x = pictures(40, 48)
    loss = plain_pytorch.loss_of(content, style, untrained)(torch.tensor(np.float32(x)).permute(2, 0, 1)[None])
    assert float(loss) == pytest.approx(deepstyle.Objective(content, style, weights=untrained)(x)[0], rel=1e-5)

"""The same loss, gradient and program on each of Keras's backends; those that are not installed are skipped."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import for_scripts
from test_objective import pictures

import deepstyle
from deepstyle_support.weights import random_weights

SCRIPT = Path(deepstyle.__file__)
EVALUATE = """
import sys
from conftest import FULL, use_network
from test_backends import evaluate

folder, width, *cases = sys.argv[1:]
if width == "full":
    use_network(FULL)
evaluate(folder, cases)
"""
# What differs from one backend to the next: convolutions, their gradient at the border, pooling, and the optimiser's
# vectors; what is compiled for one shape takes JAX three seconds, so it is tried among the endurance tests.
SHORT = ["device ave zeros off", "loss ave edge off"]
LONG = [f"{kind} {tile}" for kind in ("device ave zeros", "loss max zeros", "loss ave edge") for tile in ("off", "112")]


def evaluate(folder, cases):
    """Write to the folder what the backend that is loaded finds, in each case."""
    for case in cases:
        kind, pool_type, padding, tile = case.split()
        content, style, x = pictures(40, 224)
        options = {"weights": random_weights(0), "pool_type": pool_type, "padding": padding, "tile": tile}
        objective = deepstyle.Objective(content, style, **options)
        loss, gradient = objective(x)
        np.savez(f"{folder}/{case}.npz", loss=loss, gradient=gradient)
        if kind == "device":
            points = deepstyle.minimise(objective, deepstyle.State(x), "device", history=3)
            losses = [next(points).evaluation.loss for _ in range(2)]
            np.savez(f"{folder}/{case} losses.npz", losses=losses)


@pytest.mark.parametrize(
    ("backend", "width", "cases"),
    [
        ("torch", "narrow", SHORT),
        pytest.param("torch", "full", LONG, marks=pytest.mark.endurance),
        pytest.param("jax", "full", LONG, marks=pytest.mark.endurance),
    ],
)
def test_loss_gradient_and_the_devices_optimiser_agree_across_backends(tmp_path, backend, width, cases, request):
    if not importlib.util.find_spec(backend):
        pytest.skip(f"{backend} is not installed")
    for name in ("tensorflow", backend):
        (tmp_path / name).mkdir()
    command = [sys.executable, "-c", EVALUATE, str(tmp_path / backend), width, *cases]
    subprocess.run(command, env=for_scripts(KERAS_BACKEND=backend), check=True)
    if width == "full":
        request.getfixturevalue("full_network")
    evaluate(tmp_path / "tensorflow", cases)
    for case in cases:
        expected, got = (np.load(tmp_path / name / f"{case}.npz") for name in ("tensorflow", backend))
        assert got["loss"] == pytest.approx(float(expected["loss"]), rel=1e-5)
        difference = np.linalg.norm(got["gradient"] - expected["gradient"])
        assert difference <= 1e-5 * np.linalg.norm(expected["gradient"])
        if case.startswith("device"):  # twenty evaluations of the device's optimiser
            expected, got = (
                np.load(tmp_path / name / f"{case} losses.npz")["losses"] for name in ("tensorflow", backend)
            )
            assert got[1] < got[0] / 2
            np.testing.assert_allclose(got, expected, rtol=0.02)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_command_runs_on_the_backend(picture_files, tmp_path, backend):
    if not importlib.util.find_spec(backend):
        pytest.skip(f"{backend} is not installed")
    command = [sys.executable, str(SCRIPT), *picture_files, str(tmp_path / "a"), "--weights", "random"]
    command += ["--image_size", "32", "--num_iter", "1", "--tile", "off"]
    ended = subprocess.run(command, env=for_scripts(KERAS_BACKEND=backend), capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"with {backend}\nRANDOM" in ended.stdout
    assert (tmp_path / "a_at_iteration_1.png").exists()


@pytest.mark.parametrize("backend", ["no_such_thing", "torch"])
def test_a_backend_that_is_not_there_is_one_line(picture_files, tmp_path, backend):
    if importlib.util.find_spec(backend):
        pytest.skip(f"{backend} is installed")
    command = [sys.executable, str(SCRIPT), *picture_files, str(tmp_path / "a"), "--weights", "random"]
    ended = subprocess.run(command, env=for_scripts(KERAS_BACKEND=backend), capture_output=True, text=True)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "KERAS_BACKEND" in ended.stderr
    assert backend in ended.stderr
    assert list(tmp_path.glob("a*")) == []


def test_every_weight_may_be_zero(untrained):
    picture = np.zeros((32, 32, 3), np.uint8)
    weights = dict.fromkeys(("content_weight", "style_weight", "total_variation_weight"), 0)
    loss, gradient = deepstyle.Objective(picture, picture, weights=untrained, **weights)(picture)
    assert loss == 0
    assert not gradient.any()


@pytest.mark.endurance
def test_another_type_in_keras_json_changes_nothing(picture_files, tmp_path):
    (tmp_path / "keras.json").write_text('{"floatx": "float64", "backend": "tensorflow"}')
    command = [sys.executable, str(SCRIPT), *picture_files, str(tmp_path / "a"), "--weights", "random"]
    command += ["--image_size", "32", "--num_iter", "1", "--quiet"]
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    ended = subprocess.run(command, env=environment | {"KERAS_HOME": str(tmp_path)}, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_backend_in_keras_json_that_does_not_serve_is_one_line(picture_files, tmp_path):
    (tmp_path / "keras.json").write_text('{"backend": "numpy"}')
    command = [sys.executable, str(SCRIPT), *picture_files, str(tmp_path / "a"), "--weights", "random"]
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    ended = subprocess.run(command, env=environment | {"KERAS_HOME": str(tmp_path)}, capture_output=True, text=True)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "the backend of Keras's keras.json is 'numpy'; it must be one of tensorflow, jax, torch" in ended.stderr
    assert list(tmp_path.glob("a*")) == []

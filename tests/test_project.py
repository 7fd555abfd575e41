"""What is written beside the code agrees with it."""

import ast
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import IMAGES
from PIL import Image

import deepstyle
from deepstyle_app.command import command_line, job_of
from deepstyle_support.messages import as_typed

ROOT = IMAGES.parent
README = (ROOT / "README.md").read_text()
LOOKS = (ROOT / "docs" / "looks.md").read_text()


def test_the_readmes_table_has_every_flag_with_its_default():
    table = dict(re.findall(r"^\| `--(\w+)` \| (.*?) ?\| .*\|$", README, re.MULTILINE))
    defaults = vars(command_line().parse_args(["CONTENT", "STYLE", "PREFIX"]))
    flags = {name: value for name, value in defaults.items() if name not in ("content", "style", "prefix")}
    assert flags.keys() == table.keys()
    for name, value in flags.items():
        assert table[name] == ("" if value is None or name not in vars(deepstyle.Settings()) else as_typed(value))


@pytest.mark.parametrize(("page", "pictures"), [("README.md", 7), ("docs/looks.md", 18)])
def test_the_pictures_that_are_shown_exist(page, pictures):
    shown = re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / page).read_text())
    assert len(shown) >= pictures
    for path in shown:
        Image.open((ROOT / page).parent / path).verify()


def test_the_commands_beside_the_pictures_are_right():
    commands = re.findall(r"^    sh run.sh (.*)$", LOOKS, re.MULTILINE)
    assert len(commands) >= 17
    for command in commands:
        job = job_of(shlex.split(command))
        given = [job.content, *job.style]
        masks = [*job.style_masks, job.content_mask, job.color_mask]
        paths = [ROOT / "images" / name for name in given] + [ROOT / name for name in masks if name]
        assert all(path.exists() for path in paths)
        assert job.settings.image_size == 200
        assert f"](looks/{Path(job.prefix).name}." in LOOKS


def test_requirements_name_every_package_that_the_program_imports():
    # The tests' own requirements bring more, so that a missing line would show on a newcomer's machine only.
    imported = set()
    for path in (ROOT / "deepstyle.py", *ROOT.glob("deepstyle_*/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            imported |= {name.split(".")[0] for name in names}
    own, known = {"deepstyle", "deepstyle_app", "deepstyle_support"}, {"PIL": "pillow"}
    optional = {"jax", "pillow_heif", "ray", "tensorboard", "torch"}
    needed = {known.get(name, name) for name in imported - sys.stdlib_module_names - own} - optional
    named = {re.split("[^a-z0-9]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert needed == named - {"keras"}  # which is imported by its name


# Tests that use each package of requirements.txt, and need but a minute or two together.
WITH_LOWEST = (
    "test_losses.py",
    "test_pictures.py",
    "test_reading.py",
    "test_report.py::test_the_page_has_the_inputs_the_iterations_and_the_losses",
    "test_transparency.py",
    "test_weights.py",
)


@pytest.mark.endurance
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="TensorFlow's lowest version is older than this Python")
def test_the_lowest_versions_that_requirements_allow_are_enough():
    requirements = (ROOT / "requirements.txt").read_text()
    lowest = re.sub(">=([^,]+),.*", r"==\1", requirements)
    assert lowest.count("==") == len(requirements.splitlines())
    files = ROOT / "tests" / "requirements.txt", ROOT / "extras" / "heic.txt", ROOT / "extras" / "mp4.txt"
    of_tests = [line for file in files for line in file.read_text().splitlines()]
    of_tests = [line for line in of_tests if re.match("pytest>|hypothesis|imageio-ffmpeg|pillow-heif", line)]
    with tempfile.TemporaryDirectory() as folder:  # 2 GB, which pytest would keep
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, lowest.split()[-1]]
        if subprocess.run(pip, capture_output=True).returncode:
            pytest.skip("there is no package index")
        Path(folder, "lowest.txt").write_text(lowest)
        subprocess.run([sys.executable, "-m", "venv", f"{folder}/venv"], check=True)
        python = [f"{folder}/venv/bin/python", "-m"]
        subprocess.run([*python, "pip", "install", "--quiet", "-r", f"{folder}/lowest.txt", *of_tests], check=True)
        command = [*python, "pytest", "-q", "-p", "no:cacheprovider", "-m", "not endurance"]
        tests = [f"tests/{name}" for name in WITH_LOWEST]
        ended = subprocess.run([*command, *tests], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


def test_every_shipped_picture_has_its_source():
    table = (IMAGES / "SOURCES.md").read_text()
    for path in (*IMAGES.glob("*.jpg"), *IMAGES.glob("*.png")):
        assert re.search(rf"\| ([^|]+, )?{path.name}(, [^|]+)? \|", table)

"""deepstyle as an installed program: built, installed away from the checkout, and run in other folders."""

import email
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import IMAGES, SMALL
from PIL import Image

import deepstyle
from deepstyle_app.recipe import program

ROOT = IMAGES.parent
SOURCES = ("deepstyle.py", "README.md", "LICENSE", "MANIFEST.in", "pyproject.toml", "requirements.txt")
FOLDERS = ("deepstyle_app", "deepstyle_support", "extras", "tests", "benchmarks")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, f'build_{sys.argv[1]}')(sys.argv[2]))"

pytestmark = pytest.mark.xdist_group("package")  # one of the suite's workers builds and installs, once


def outside(command, folder):
    """The lines that a command prints which runs in this folder, and knows nothing of the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ended = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """(source distribution, wheel), the second made of the first, without a package index."""
    folder = tmp_path_factory.mktemp("a checkout")  # with a space in its path
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    source = folder / outside([sys.executable, "-c", BUILD, "sdist", "."], folder)[-1]
    shutil.unpack_archive(source, folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    return source, unpacked / outside([sys.executable, "-c", BUILD, "wheel", "."], unpacked)[-1]


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """The folder of the commands of an environment that has deepstyle, and of all else what this one has."""
    folder = tmp_path_factory.mktemp("an environment")
    outside([sys.executable, "-m", "venv", "--without-pip", folder], folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Such a file's folders are searched after the environment's own, and what is installed editable there is not found.
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    outside([*pip, "--no-deps", "--no-index", "--ignore-installed", distributions[1]], folder)
    return folder / "bin"


def test_a_wheel_has_the_program_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (metadata,) = (wheel.read(name) for name in wheel.namelist() if name.endswith("/METADATA"))
    kept = [ROOT / "deepstyle.py", *ROOT.glob("deepstyle_*/*.py"), *ROOT.glob("deepstyle_*/*.html")]
    assert found == {path.relative_to(ROOT).as_posix() for path in kept}
    assert {"deepstyle_app/report.html", "deepstyle_app/folder.html", "deepstyle_app/page.html"} <= found
    said = email.message_from_bytes(metadata)
    assert (said["Name"], said["Version"]) == ("deepstyle", deepstyle.__version__)
    assert (said["License-Expression"], said["Requires-Python"]) == ("MIT", "<3.14,>=3.10")


def names_in(*files):
    """What packages the lines of such files of requirements are about."""
    return {re.split("[^a-z0-9-]", line)[0] for file in files for line in file.read_text().splitlines()}


def test_a_wheel_requires_what_the_files_of_requirements_name(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        (metadata,) = (wheel.read(name) for name in wheel.namelist() if name.endswith("/METADATA"))
    required: dict[str, set[str]] = {}
    for line in email.message_from_bytes(metadata).get_all("Requires-Dist", []):
        extra = re.search("extra == ['\"](.*)['\"]", line)
        required.setdefault(extra[1] if extra else "", set()).add(re.split("[^a-z0-9-]", line)[0])
    extras = {path.stem: path for path in (ROOT / "extras").iterdir()}
    assert extras.keys() == {"workers", "heic", "mp4", "tensorboard"}
    assert required == {
        "": names_in(ROOT / "requirements.txt"),
        **{name: names_in(path) for name, path in extras.items()},
        "tests": names_in(ROOT / "tests" / "requirements.txt", *extras.values()),
    }


def test_a_source_distribution_has_no_half_of_the_tests(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in names if name.startswith("tests/")} == {"tests/requirements.txt"}
    assert not {name for name in names if name.startswith(("benchmarks", "images"))}


def test_the_installed_command_paints_in_another_folder(installed, picture_files, tmp_path):
    folder = tmp_path / "some folder"
    folder.mkdir()
    (folder / "deepstyle_app").mkdir()  # a stranger's, which is not imported
    (folder / "deepstyle_app" / "__init__.py").write_text("raise SystemExit('a stranger')")
    command = [installed / "deepstyle", *picture_files, "out/", *SMALL, "--report", "out/report.html"]
    assert outside(command, folder)[0].startswith("painting 32 x 42 pixels")
    pictures = [folder / "out" / f"result_image_at_iteration_{number}.png" for number in (1, 2)]
    assert [Image.open(path).size for path in pictures] == [(42, 32), (42, 32)]
    page = (folder / "out" / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    *_, again = outside([installed / "deepstyle", "--describe", pictures[1]], folder)
    assert shlex.split(again)[:4] == ["deepstyle", *picture_files, "out/"]  # where there is no deepstyle.py
    assert f">deepstyle {picture_files[0]} " in page


def test_the_installed_command_says_its_version(installed, tmp_path):
    assert outside([installed / "deepstyle", "--version"], tmp_path) == [f"deepstyle {deepstyle.__version__}"]


@pytest.mark.parametrize(
    ("run_as", "by", "begins"),
    [
        ("/a folder/bin/deepstyle", "/a folder/bin/python", ["deepstyle"]),
        ("deepstyle.exe", "/a folder/python.exe", ["deepstyle"]),
        ("deepstyle.py", "/usr/bin/python", ["python", "deepstyle.py"]),
        ("/deepstyle/paint.py", "/usr/bin/python", ["python", "deepstyle.py"]),  # a link to it
        ("deepstyle.py", f"{ROOT}/.venv/bin/python", [".venv/bin/python", "deepstyle.py"]),  # which run.sh has made
        ("deepstyle.py", f"{ROOT}/.venv/Scripts/python.exe", [".venv/Scripts/python.exe", "deepstyle.py"]),
    ],
)
def test_a_command_that_is_printed_is_one_that_works_where_it_is_printed(monkeypatch, tmp_path, run_as, by, begins):
    monkeypatch.setattr(sys, "argv", [run_as, "--describe", "a.png"])
    monkeypatch.setattr(sys, "executable", by)
    monkeypatch.setattr(sys, "prefix", str(Path(by).parent.parent))
    monkeypatch.chdir(ROOT)
    assert program() == begins
    monkeypatch.chdir(tmp_path)  # a run of `sh /.../run.sh` in another folder: its pictures are named from there
    assert program() == [f"{ROOT}/{word}" if word.startswith((".venv", "deepstyle.py")) else word for word in begins]


def test_the_installed_program_imports_nothing_of_the_checkout(installed, tmp_path):
    code = (
        "import sys, deepstyle_app.start, deepstyle_app.command, deepstyle_app.report, deepstyle_app.crew;"
        "print(*(module.__file__ for name, module in sys.modules.items() if name.startswith('deepstyle')), sep='\\n')"
    )
    found = [Path(line) for line in outside([installed / "python", "-I", "-c", code], tmp_path)]
    assert len(found) > 20
    (packages,) = installed.parent.glob("lib/python*/site-packages")
    assert [path for path in found if not path.is_relative_to(packages)] == []

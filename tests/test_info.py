"""--info: what the report of a bug needs, whatever is missing or broken."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import IMAGES

import deepstyle
from deepstyle_app import info
from deepstyle_app.command import main
from deepstyle_app.start import without_the_command
from deepstyle_support import limits, system, weights
from deepstyle_support.messages import UserError

ROOT = IMAGES.parent
SCRIPT = ROOT / "deepstyle.py"


def said_on(page):
    """What a page says of each thing, by its name: {name: text in one line}."""
    said = {}
    for line in page.splitlines():
        if name := line[2 : info.INDENT].strip() if line.startswith("  ") else "":
            said[name] = line[info.INDENT :]
        elif line.startswith("  "):
            said[list(said)[-1]] += f" {line.strip()}"
    return said


@pytest.fixture
def at_once(monkeypatch):
    """No process is started: each package works, and there is some device."""
    monkeypatch.setattr(info, "answer_of", lambda code: "3 CPU cores with tensorflow")


def packages_in(*files):
    return {re.split("[^a-z0-9-]", line)[0] for file in files for line in file.read_text().splitlines()}


def test_the_page_has_every_package_of_the_requirements_and_the_extras():
    assert info.NEEDED.keys() == packages_in(ROOT / "requirements.txt")
    assert info.OPTIONAL.keys() == packages_in(*(ROOT / "extras").iterdir()) | {"jax", "torch"}


def test_the_command_prints_a_page_of_80_columns_without_pictures():
    ended = subprocess.run([sys.executable, str(SCRIPT), "--info"], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert max(map(len, ended.stdout.splitlines())) <= info.COLUMNS
    assert ended.stdout.startswith(f"deepstyle {deepstyle.__version__}\n  Python ")
    said = said_on(ended.stdout)
    assert re.fullmatch(
        r"(\d+ CPU cores? with \w+|.* with \w+, [\d.]+ GB of it free); with --precision mixed convolutions in \w+",
        said["device"],
    )
    assert re.fullmatch(r"[\d.]+ GB free of [\d.]+ GB", said["memory"])
    assert said["numpy"] == system.version_of("numpy")
    assert not [line for line in said.values() if "does not load" in line]


def test_help_tells_of_it(capsys):
    assert main(["--help"]) == 0
    assert "--info" in capsys.readouterr().out


def test_who_stops_reading_gets_no_complaint(at_once, monkeypatch, capfd):
    reading, nobody_reads = os.pipe()
    os.close(reading)
    with os.fdopen(nobody_reads, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["--info"]) == 0
    assert capfd.readouterr().err == ""


# What is missing or broken


def test_without_any_package_the_page_is_there_and_names_them(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    python = tmp_path / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    run = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment}
    ended = subprocess.run([python, str(SCRIPT), "--info"], **run)
    assert (ended.returncode, ended.stderr) == (0, "")
    said = said_on(ended.stdout)
    assert said["numpy"] == "absent; 'sh run.sh' brings it"
    assert said["device"].startswith("unknown: this Python has no package ")
    assert said["Python"].startswith(platform.python_version())
    ended = subprocess.run([python, str(SCRIPT), "a", "b", "c"], **run)
    assert ended.returncode == 1
    assert re.fullmatch("deepstyle: error: this Python has no package .*\n", ended.stderr)


def stand_in(folder, name, code, monkeypatch):
    """A package of this name that is found before the real one."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_a_package_that_cannot_be_imported_says_why_in_its_line(tmp_path, monkeypatch):
    stand_in(tmp_path, "h5py", "raise ImportError('libhdf5.so: no such file,\\nor another')", monkeypatch)
    said = info.package("h5py")
    assert said == f"{system.version_of('h5py')}, does not load: ImportError: libhdf5.so: no such file, or another"


def test_a_package_that_ends_python_ends_its_own_process_alone(tmp_path, monkeypatch):
    stand_in(tmp_path, "tensorflow", "import os, signal; os.kill(os.getpid(), signal.SIGILL)", monkeypatch)
    assert info.package("tensorflow") == f"{system.version_of('tensorflow')}, does not load: it ends Python by SIGILL"


def test_a_package_that_never_answers_is_given_up(tmp_path, monkeypatch):
    stand_in(tmp_path, "rich", "import time; time.sleep(60)", monkeypatch)
    monkeypatch.setattr(info, "PATIENCE", 0.5)
    assert info.package("rich").endswith("does not load: nothing came of it in 0.5 seconds")


def test_a_strangers_module_in_the_folder_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "psutil.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.chdir(tmp_path)
    assert info.package("psutil") == system.version_of("psutil")


def test_a_package_that_is_absent_comes_with_the_command_that_brings_it(monkeypatch):
    monkeypatch.setattr(info, "version_of", lambda name: "is not installed")
    assert info.package("pillow-heif") == f"absent; '{sys.executable} -m pip install pillow-heif' brings it"


def test_a_backend_that_cannot_start_is_a_line(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "no_such")
    with pytest.raises(UserError, match="KERAS_BACKEND is 'no_such'; it must be one of tensorflow, jax, torch"):
        info.answer_of(info.DEVICE)


def test_whatever_fails_is_told_in_its_line(at_once, monkeypatch):
    def fail(*given):
        raise OSError("no\nway")

    for name in ("usable_cores", "free_main_memory"):
        monkeypatch.setattr(limits, name, fail)
    for name in ("system", "version", "backend", "weights", "version_of"):
        monkeypatch.setattr(info, name, fail)
    said = said_on(info.page())
    for name in ("system", "cores", "memory", "backend", "vgg16", "numpy"):
        assert said[name] == "unknown: OSError: no way"


def test_where_no_process_can_be_started_the_page_says_so(monkeypatch):
    def fail(*given, **options):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "run", fail)
    said = said_on(info.page())
    assert said["device"].startswith("unknown: no process can be started: BlockingIOError: ")
    assert said["numpy"].startswith(f"{system.version_of('numpy')}, does not load: no process can be started: ")


def test_a_broken_package_that_the_command_needs_ends_it_in_one_line_or_with_the_page(at_once, monkeypatch, capsys):
    broken = ImportError("numpy:\nit was built for another Python")
    monkeypatch.setattr(sys, "argv", ["deepstyle.py", "a", "b", "c"])
    said = "ImportError: numpy: it was built for another Python; --info shows which package is broken"
    assert without_the_command(broken) == f"deepstyle: error: {said}"
    monkeypatch.setattr(sys, "argv", ["deepstyle.py", "--info"])
    assert without_the_command(AttributeError("numpy has no ndarray")) is None  # half removed
    assert capsys.readouterr().out.startswith(f"deepstyle {deepstyle.__version__}\n")


def test_an_error_of_pages_is_shortened():
    (first, *others) = info.lines_of({"numpy": "a word " * 1000})
    assert first.startswith("  numpy            a word")
    assert len(others) < 8
    assert others[-1].endswith("...")


# The processor


@pytest.mark.parametrize(
    ("known", "found"),
    [
        ({"flags": "fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile"}, "avx2, avx512f, avx512_bf16, amx_bf16"),
        ({"flags": "fpu sse4_1"}, "none of avx2, avx512f, avx512_bf16, amx_bf16, bf16"),
        ({"Features": "fp asimd bf16 i8mm"}, "bf16"),
        ({}, "unknown: the system does not say which it has"),
    ],
)
def test_the_processors_units_are_those_that_linux_tells_of(monkeypatch, known, found):
    monkeypatch.setattr(system, "cpuinfo", lambda: known)
    assert info.units() == found


# The weights


def test_without_weights_the_page_says_where_they_are_looked_for(at_once, monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert info.weights("vgg16") == f"none in {tmp_path}/models; the first run that needs them gets them"


def test_weights_are_genuine_or_not_and_nothing_is_moved_or_fetched(monkeypatch, tmp_path, untrained):
    for name in ("set_aside", "fetch_from_keras", "fetch_from_index"):
        monkeypatch.setattr(weights, name, lambda *given: pytest.fail("it only looks"))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / weights.INDEX_FILE
    path.write_bytes(b"an HTML page")
    assert info.weights("vgg16") == f"{path} is of no use: '{path}' is damaged, or no file of VGG16 weights"
    monkeypatch.setattr(weights, "decoded", lambda data, model: untrained)
    assert "is of no use" in info.weights("vgg16")
    monkeypatch.setattr(weights, "TRUNK_SHA256", weights.trunk_digest(untrained))
    assert info.weights("vgg16") == f"{path}, genuine by its SHA-256"
    assert [one.name for one in path.parent.iterdir()] == [path.name]


# Nothing private


def test_the_home_folder_and_the_persons_name_are_not_shown(monkeypatch):
    monkeypatch.setattr(info.getpass, "getuser", lambda: "ann")
    monkeypatch.setenv("HOME", "/home/ann")
    text = "/home/ann/a /home/ann '/home/ann', /home/anna /scratch/ann/keras /data/annals /mnt/home/ann:"
    assert info.impersonal(text) == "~/a ~ '~', /home/anna /scratch/USER/keras /data/annals /mnt/home/USER:"
    monkeypatch.setenv("HOME", "/")  # as in some containers
    assert info.impersonal("/a/b, /") == "/a/b, /"


def test_of_the_environment_only_the_programs_own_is_shown(at_once, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    for name, value in {
        "KERAS_BACKEND": "tensorflow",
        "DEEPSTYLE_PYTHON": "/home/ann/python",
        "RAY_ADDRESS": "ray://secret:1",
        "RAY_AUTH_TOKEN": "secret",
        "HOSTNAME": "secret",
    }.items():
        monkeypatch.setenv(name, value)
    page = info.page()
    said = said_on(page)
    assert (said["KERAS_BACKEND"], said["DEEPSTYLE_PYTHON"], said["RAY_ADDRESS"]) == ("tensorflow", "~/python", "set")
    assert not re.search("secret|/home/ann|RAY_AUTH", page)


def test_without_variables_of_its_own_the_page_says_so(monkeypatch):
    for name in [*os.environ]:
        if name.startswith(("KERAS_", "DEEPSTYLE_", "RAY_")):
            monkeypatch.delenv(name)
    assert "are not set" in str(info.environment())


def test_the_version_is_the_programs(monkeypatch, tmp_path):
    assert info.version() == deepstyle.__version__
    monkeypatch.setattr(info, "FOLDER", Path(tmp_path))
    (tmp_path / "deepstyle.py").touch()
    assert info.version() == "of an unknown version"

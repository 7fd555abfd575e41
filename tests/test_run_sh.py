"""run.sh, with stand-ins for the interpreter where an installation would take minutes."""

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import IMAGES
from PIL import Image

ROOT = IMAGES.parent
# An interpreter that notes what it is asked for; -m venv and -m pip "work" in an instant.
FAKE_PYTHON = """#!/bin/sh
echo "$0 $*" >>"$LOG"
here=$(dirname -- "$0")
case "$1 ${2:-}" in
    "-c "*base_prefix*) echo "${BASE:-base}" ;;
    "-c "*) exit "${UNSUPPORTED:-0}" ;;
    "- "*) [ -e "$here/has_packages" ] ;;
    "-m venv") for last; do :; done; own=$last/${OWN:-bin/python}; mkdir -p "${own%/*}"; cp "$0" "$own" ;;
    "-m pip")
        printf '%s\\n' "${PIP_SAYS:-Collecting pillow}"
        if [ -n "${PIP_WAITS:-}" ]; then : >"$PIP_WAITS"; exec sleep 60; fi
        [ -z "${PIP_FAILS:-}" ] && : >"$here/has_packages" ;;
    *) echo "ran: $*"; exit "${STATUS:-0}" ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A fresh copy of the program, in a folder with a space, and a fake python3 to find in PATH."""
    clone = tmp_path / "my clone"
    for name in ("a.jpg", "b.jpg", "c d.jpg"):
        (tmp_path / name).touch()
    (clone / "images").mkdir(parents=True)
    for name in ("run.sh", "requirements.txt", "deepstyle.py"):
        shutil.copy(ROOT / name, clone)
    for package in ("deepstyle_app", "deepstyle_support"):
        shutil.copytree(ROOT / package, clone / package)
    (clone / "images" / "shipped.jpg").touch()
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return clone


def run(clone, *arguments, folder=None, **environment):
    """(status, stdout, stderr, what the interpreters were asked for); it is called in `folder`, or beside the clone."""
    log = clone.parent / "log"
    log.write_text("")
    environment = {"PATH": f"{clone.parent / 'bin'}:/usr/bin:/bin", "LOG": str(log)} | environment
    command = ["sh", str(clone / "run.sh"), *arguments]
    ended = subprocess.run(command, cwd=folder or clone.parent, env=environment, capture_output=True, text=True)
    return ended.returncode, ended.stdout, ended.stderr, log.read_text()


def test_an_environment_of_windows_is_used_as_well(clone):
    windows = {"OWN": "Scripts/python.exe"}
    assert run(clone, "a.jpg", "b.jpg", **windows)[0] == 0
    status, out, err, _ = run(clone, "a.jpg", "b.jpg", **windows)
    assert status == 0
    assert f"ran: {clone}/deepstyle.py" in out
    assert "installing" not in err
    assert ".venv/Scripts/python.exe" in run(clone, "--setup", **windows)[1]


def test_first_use_installs_and_later_uses_start_at_once(clone):
    status, out, err, log = run(clone, "a.jpg", "b.jpg")
    assert status == 0
    assert err == (
        "run.sh: installing what it needs, once: a few minutes, over 2 GB on the disk\n"
        f"run.sh: installed in {clone}/.venv\n"
    )
    assert "-m pip install" in log
    assert not (clone / ".venv-unfinished").exists()
    assert out == f"ran: {clone}/deepstyle.py a.jpg b.jpg {clone}/result_image/\n"
    status, again, err, log = run(clone, "a.jpg", "b.jpg")
    assert (status, again, err) == (0, out, "")
    assert "-m pip" not in log
    assert "-m venv" not in log


def test_interrupted_installation_is_done_again(clone):
    status, out, err, _ = run(clone, "a.jpg", "b.jpg", PIP_FAILS="1")
    assert (status, out) == (1, "")
    assert "installation failed" in err
    assert (clone / ".venv-unfinished").exists()
    (clone / ".venv" / "bin" / "has_packages").touch()  # as if only the last package were half there
    status, out, err, log = run(clone, "a.jpg", "b.jpg")
    assert status == 0
    assert len(err.splitlines()) == 2  # as the first time
    assert "-m venv --clear" in log
    assert "-m pip install" in log
    assert not (clone / ".venv-unfinished").exists()


def test_active_environment_with_the_packages_is_used(clone, tmp_path):
    (tmp_path / "active" / "bin").mkdir(parents=True)
    shutil.copy(tmp_path / "bin" / "python3", tmp_path / "active" / "bin" / "python")
    (tmp_path / "active" / "bin" / "has_packages").touch()
    _, _, _, log = run(clone, "a.jpg", "b.jpg", VIRTUAL_ENV=str(tmp_path / "active"))
    assert log.splitlines()[-1].startswith(f"{tmp_path}/active/bin/python {clone}/deepstyle.py")
    assert not (clone / ".venv").exists()


def test_active_environment_without_the_packages_is_left_alone(clone, tmp_path):
    (tmp_path / "active" / "bin").mkdir(parents=True)
    shutil.copy(tmp_path / "bin" / "python3", tmp_path / "active" / "bin" / "python")
    _, _, _, log = run(clone, "a.jpg", "b.jpg", VIRTUAL_ENV=str(tmp_path / "active"))
    assert log.splitlines()[-1].startswith(f"{clone}/.venv/bin/python ")
    assert [path.name for path in (tmp_path / "active" / "bin").iterdir()] == ["python"]


def test_deepstyle_python_names_the_interpreter(clone, tmp_path):
    other = tmp_path / "bin" / "my python"
    shutil.copy(tmp_path / "bin" / "python3", other)
    _, _, _, log = run(clone, "a.jpg", "b.jpg", DEEPSTYLE_PYTHON=str(other))
    assert f"{other} -m venv" in log
    status, _, err, _ = run(clone, "a.jpg", "b.jpg", DEEPSTYLE_PYTHON=str(other), UNSUPPORTED="1")
    assert status == 2
    assert "Python 3.10 to 3.13" in err
    status, _, err, _ = run(clone, "a.jpg", "b.jpg", DEEPSTYLE_PYTHON="/no/such/python")
    assert status == 2


def test_a_machine_with_an_nvidia_gpu_gets_cuda(clone, tmp_path):
    run(clone, "a.jpg", "b.jpg")
    assert "[and-cuda]" not in (clone / ".venv" / "requirements.txt").read_text()
    shutil.rmtree(clone / ".venv")
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    run(clone, "a.jpg", "b.jpg")
    installed = (clone / ".venv" / "requirements.txt").read_text().splitlines()
    plain = (ROOT / "requirements.txt").read_text().splitlines()
    assert installed[0].startswith("tensorflow[and-cuda]>=")
    assert installed[1:] == plain[1:]


def test_picture_is_looked_for_as_given_and_then_in_images(clone, tmp_path):
    _, out, _, _ = run(clone, "shipped.jpg", "a.jpg", "out dir")
    assert out == f"ran: {clone}/deepstyle.py {clone}/images/shipped.jpg a.jpg out dir/\n"
    (tmp_path / "shipped.jpg").touch()
    _, out, _, _ = run(clone, "shipped.jpg", "b.jpg", "out dir")
    assert out == f"ran: {clone}/deepstyle.py shipped.jpg b.jpg out dir/\n"


def test_in_the_programs_own_folder_its_files_are_named_as_a_person_would(clone):
    (clone / "own.jpg").touch()
    _, out, _, _ = run(clone, "shipped.jpg", "own.jpg", folder=clone)
    assert out == f"ran: {clone}/deepstyle.py images/shipped.jpg own.jpg result_image/\n"


@pytest.mark.parametrize("given", [("none.jpg", "b.jpg"), ("a.jpg", "none.jpg"), ("a.jpg", "none.jpg", "b.jpg", "out")])
def test_a_picture_that_is_not_there_is_told_whether_or_not_anything_is_installed(clone, given):
    for is_installed in (False, True):
        status, out, err, log = run(clone, *given)
        assert (status, out) == (2, "")
        assert err == "run.sh: there is no picture 'none.jpg', neither as given nor in images/\n"
        assert "-m " not in log
        assert (clone / ".venv").exists() == is_installed
        run(clone, "--setup")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("WARNING: Retrying (Retry(total=0\nERROR: none (from versions: none)", "the package index cannot be reached"),
        ("ERROR: first\nERROR: No space left on device", "ERROR: No space left on device"),
        ("nothing of use", ""),
    ],
)
def test_pip_is_heard_only_if_it_fails(clone, said, told):
    assert said not in run(clone, "--setup", PIP_SAYS=said)[2]
    shutil.rmtree(clone / ".venv")
    status, out, err, _ = run(clone, "--setup", PIP_FAILS="1", PIP_SAYS=said)
    assert (status, out) == (1, "")
    assert err.splitlines()[1:] == [
        f"run.sh: the installation failed: {told}",
        f"run.sh: all that pip said is in {clone}/.venv-unfinished",
        "run.sh: the same command tries it again",
    ]
    assert said in (clone / ".venv-unfinished").read_text()


def test_a_terminal_sees_what_is_being_installed(clone):
    says = "  Downloading https://x.org/a/pillow-12.0-py3.whl (7 MB)\nInstalling collected packages: pillow"
    shown = on_a_terminal(clone, PIP_SAYS=says, TERM="xterm")[1]
    assert (
        "\r\x1b[Krun.sh: fetching pillow (7 MB)\r\x1b[Krun.sh: unpacking, for a minute or two\r\x1b[Krun.sh: inst"
        in shown
    )
    shutil.rmtree(clone / ".venv")
    assert "\x1b" not in on_a_terminal(clone, PIP_SAYS=says, TERM="dumb")[1]


def test_ctrl_c_while_it_installs_is_one_line_and_the_next_run_installs_it(clone, tmp_path):
    status, shown = on_a_terminal(clone, interrupt_at=tmp_path / "pip waits", PIP_WAITS=str(tmp_path / "pip waits"))
    assert status == 130
    assert shown.splitlines()[1:] == ["^Crun.sh: interrupted; the same command installs it again"]
    assert run(clone, "a.jpg", "b.jpg")[0] == 0


def on_a_terminal(clone, interrupt_at=None, **environment):
    """The exit status of run.sh --setup and what a terminal shows of it. Ctrl-C is pressed when a file is there."""
    folder = clone.parent
    environment = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "LOG": str(folder / "log")} | environment
    child, terminal = pty.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that runs the tests in its background ignores it
        os.execve("/bin/sh", ["sh", str(clone / "run.sh"), "--setup"], environment)
    while interrupt_at and not interrupt_at.exists():
        time.sleep(0.01)
    if interrupt_at:
        time.sleep(0.2)  # pip is at it
        os.write(terminal, b"\x03")
    shown = b""
    with contextlib.suppress(OSError):  # at the end, on Linux
        while part := os.read(terminal, 1000):
            shown += part
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shown.decode()


@pytest.mark.parametrize(
    ("arguments", "said"), [(("a.jpg", "b.jpg", ""), "OUTDIR is empty"), (("", "b.jpg"), "there is no picture ''")]
)
def test_an_empty_argument_stands_for_nothing(clone, arguments, said):
    status, out, err, _ = run(clone, *arguments)
    assert said in err
    assert (status, out) == (2, "")


def test_the_content_may_be_a_folder_of_photos(clone, tmp_path):
    (tmp_path / "my photos").mkdir()
    (tmp_path / "my photos").joinpath("a.jpg").touch()
    for given in ("my photos", "my photos/"):
        _, out, _, _ = run(clone, given, "shipped.jpg", "out dir")
        assert out == f"ran: {clone}/deepstyle.py {given} {clone}/images/shipped.jpg out dir/\n"


def test_of_more_than_two_arguments_the_last_is_the_folder(clone):
    _, out, _, _ = run(
        clone, "a.jpg", "shipped.jpg", "c d.jpg", "shipped.jpg", "out dir", "--style_weight", "1", "2", "3"
    )
    shipped = f"{clone}/images/shipped.jpg"
    expected = f"ran: {clone}/deepstyle.py a.jpg {shipped} c d.jpg {shipped} out dir/ --style_weight 1 2 3\n"
    assert out == expected
    status, out, err, log = run(clone, "a.jpg", "b.jpg", "shipped.jpg")
    assert (status, out, log) == (2, "", "")
    assert err == "run.sh: 'shipped.jpg' is a file, not a folder; behind several styles name OUTDIR\n"


def test_flags_and_the_programs_status_are_passed_on(clone):
    status, out, _, _ = run(clone, "a.jpg", "b.jpg", "--num_iter", "3", STATUS="3")
    assert status == 3
    assert out.endswith(f"{clone}/result_image/ --num_iter 3\n")
    status, out, _, _ = run(clone, "a.jpg", "b.jpg", "out", "--quiet", STATUS="2")
    assert status == 2
    assert out.endswith("out/ --quiet\n")


def test_without_arguments_it_says_how_it_is_used(clone):
    status, out, err, log = run(clone)
    assert (status, out, log) == (2, "", "")
    assert err.startswith("usage: sh run.sh CONTENT STYLE [OUTDIR]")


@pytest.mark.parametrize("arguments", [["a"], ["--num_iter", "3"], ["a", "--quiet"]])
def test_too_few_pictures_are_told_in_one_line(clone, arguments):
    status, out, err, log = run(clone, *arguments)
    assert (status, out, log) == (2, "", "")
    assert err.startswith("run.sh: name two pictures, CONTENT and STYLE, ")
    assert len(err.splitlines()) == 1


def test_how_a_picture_was_made_is_asked_of_what_is_there(clone):
    _, out, _, _ = run(clone, "--describe", "out dir/shipped.jpg")
    assert out == f"ran: {clone}/deepstyle.py --describe out dir/shipped.jpg\n"
    assert run(clone, "--describe=a.png")[1] == f"ran: {clone}/deepstyle.py --describe=a.png\n"
    assert run(clone, "--version")[1] == f"ran: {clone}/deepstyle.py --version\n"
    assert not (clone / ".venv").exists()  # without an installation: it is little that was asked for


def test_setup_prints_the_interpreter(clone):
    status, out, _, _ = run(clone, "--setup")
    assert (status, out) == (0, f"{clone}/.venv/bin/python\n")


def test_info_installs_nothing_and_asks_the_interpreter_that_a_run_would_use(clone, tmp_path):
    status, out, err, log = run(clone, "--info")
    assert (status, out, err) == (0, f"ran: {clone}/deepstyle.py --info\n", "")
    assert log.splitlines()[-1].startswith("python3 ") or f"{tmp_path}/bin/python3 {clone}" in log
    assert not (clone / ".venv").exists()
    run(clone, "--setup")
    (clone / ".venv" / "bin" / "has_packages").unlink()  # an installation that failed
    assert run(clone, "--info")[3].splitlines()[-1].startswith(f"{clone}/.venv/bin/python {clone}/deepstyle.py")
    (tmp_path / "active" / "bin").mkdir(parents=True)
    shutil.copy(tmp_path / "bin" / "python3", tmp_path / "active" / "bin" / "python")
    (tmp_path / "active" / "bin" / "has_packages").touch()
    log = run(clone, "--info", VIRTUAL_ENV=str(tmp_path / "active"))[3]
    assert log.splitlines()[-1].startswith(f"{tmp_path}/active/bin/python {clone}/deepstyle.py")


def test_the_whole_program_runs_from_any_folder(clone):
    shutil.copytree(IMAGES, clone / "images", dirs_exist_ok=True)
    small = ["--weights", "random", "--image_size", "32", "--num_iter", "1"]
    arguments = ["rocket.jpg", "composition_viii.jpg", "my out", *small]
    environment = {"HOME": os.environ["HOME"], "DEEPSTYLE_PYTHON": sys.executable}
    status, out, err, _ = run(clone, *arguments, **environment)
    assert (status, err) == (0, "")
    names = sorted(path.name for path in (clone.parent / "my out").iterdir())
    assert names == ["result_image_at_iteration_1.png", "result_image_state.npz"]
    assert names[0] in out
    assert Image.open(clone.parent / "my out" / names[0]).size == (47, 32)
    status, _, err, _ = run(clone, "none.jpg", *arguments[1:], **environment)
    assert status == 2
    assert "none.jpg" in err
    assert not (clone / ".venv").exists()


@pytest.fixture
def among_strangers(tmp_path):
    """A folder that has modules by the names of those that the program needs, and a link to the program."""
    for package in ("deepstyle_app", "deepstyle_support"):
        (tmp_path / package).mkdir()
    for name in ("deepstyle_app/__init__.py", "deepstyle_support/__init__.py", "packaging.py"):
        (tmp_path / name).write_text("raise SystemExit('a stranger')")
    (tmp_path / "paint.py").symlink_to(ROOT / "deepstyle.py")
    return tmp_path


@pytest.mark.parametrize("program", [ROOT / "deepstyle.py", "paint.py"])
@pytest.mark.parametrize("option", [[], ["-P"], ["-I"]])
def test_the_program_finds_its_modules_and_no_others(among_strangers, program, option):
    if option == ["-P"] and sys.version_info < (3, 11):
        pytest.skip("Python has -P since 3.11")
    command = [sys.executable, *option, str(program), "--version"]
    ended = subprocess.run(command, cwd=among_strangers, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("deepstyle ")


@pytest.mark.parametrize("safe", [{}, {"PYTHONSAFEPATH": "1"}])
def test_run_sh_finds_the_packages_and_the_programs_modules_and_no_others(clone, among_strangers, safe):
    status, out, err, log = run(clone, "a.jpg", "b.jpg", "out", VIRTUAL_ENV=sys.prefix, **safe)
    assert (status, out, log) == (2, "", "")  # without an installation
    assert "error: 'a.jpg' is no picture" in err


def test_an_import_of_the_program_changes_no_search_path():
    code = "import sys; before = list(sys.path); import deepstyle; sys.exit(sys.path != before)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("raised", [("pillow>=", "pillow>=13.99.9,!="), ("jinja2", "no-such-package>=1\njinja2")])
def test_what_requirements_raise_is_installed(clone, raised):
    """.venv's interpreter has the packages of the one that runs this."""
    run(clone, "--setup")
    own = clone / ".venv" / "bin" / "python"
    own.write_text(FAKE_PYTHON.replace('[ -e "$here/has_packages" ]', f"exec '{sys.executable}' \"$@\""))
    assert "-m pip" not in run(clone, "--setup")[3]
    requirements = (clone / "requirements.txt").read_text().replace(*raised)
    (clone / "requirements.txt").write_text(requirements)
    status, out, err, log = run(clone, "--setup")
    assert (status, out) == (0, f"{own}\n")
    assert "installing" in err
    assert "-m pip install" in log
    assert (clone / ".venv" / "requirements.txt").read_text() == requirements


def test_the_environment_never_makes_itself_anew(clone):
    run(clone, "--setup")
    (clone / ".venv" / "bin" / "has_packages").unlink()
    own = str(clone / ".venv" / "bin" / "python")
    status, out, _, log = run(clone, "--setup", DEEPSTYLE_PYTHON=own)
    assert (status, out) == (0, f"{own}\n")
    assert "--clear" not in log


def test_a_link_to_run_sh_uses_the_environment_beside_the_file(clone):
    (clone.parent / "links").mkdir()
    (clone.parent / "links" / "paint").symlink_to(clone / "run.sh")
    environment = {"PATH": f"{clone.parent / 'bin'}:/usr/bin:/bin", "LOG": str(clone.parent / "log")}
    command = ["sh", str(clone.parent / "links" / "paint"), "--setup"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.stdout == f"{clone}/.venv/bin/python\n"
    assert not (clone.parent / "links" / ".venv").exists()

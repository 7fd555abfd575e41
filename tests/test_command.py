"""The command line: flags, messages, exit statuses, files."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL
from PIL import Image

import deepstyle

SCRIPT = Path(deepstyle.__file__)


def parse(*flags):
    return deepstyle.command_line().parse_args(["c.png", "s.png", "out", *flags])


def test_defaults_are_the_ones_people_know():
    assert deepstyle.Settings() == deepstyle.Settings(
        image_size=400,
        num_iter=10,
        init_image="content",
        pool_type="ave",
        preserve_color=False,
        min_improvement=0.0,
        content_weight=0.025,
        style_weight=1.0,
        style_scale=1.0,
        total_variation_weight=1e-5,
        rescale_image=False,
        rescale_method="bilinear",
        maintain_aspect_ratio=True,
        content_layer="conv5_2",
        weights=None,
        seed=0,
    )


def test_help_fits_on_two_screens(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert deepstyle.main(["--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) <= 2 * 48


@pytest.mark.parametrize("flag", ["preserve_color", "rescale_image", "maintain_aspect_ratio"])
def test_on_off_flags_take_many_spellings_and_alone_mean_true(flag):
    for text in ("True", "true", "yes", "1"):
        assert getattr(parse(f"--{flag}", text), flag) is True
    for text in ("False", "FALSE", "no", "0"):
        assert getattr(parse(f"--{flag}", text), flag) is False
    assert getattr(parse(f"--{flag}"), flag) is True
    with pytest.raises(deepstyle.UserError, match="maybe"):
        parse(f"--{flag}", "maybe")


def test_help_shows_every_flag_with_its_default(capsys):
    assert deepstyle.main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, default in vars(deepstyle.Settings()).items():
        assert f"--{name} " in shown
        if default is not None:
            after = shown.split(f"--{name} ")[1]
            assert f"({deepstyle.words(default)})" in after.split(" --")[0]


def test_version(capsys):
    assert deepstyle.main(["--version"]) == 0
    assert capsys.readouterr().out == f"deepstyle {deepstyle.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["a.png", "b.png", "c", "--pool_type", "x"]])
def test_nothing_heavy_is_imported_to_answer_help_and_errors(arguments):
    code = (
        "import sys, deepstyle; deepstyle.main(sys.argv[1:]); "
        "print([m for m in ('tensorflow', 'keras', 'scipy', 'rich', 'h5py') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code, *arguments], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert ended.stdout.endswith("[]\n")


def test_a_run_writes_one_picture_per_iteration_and_says_what_it_did(picture_files, tmp_path):
    command = [sys.executable, str(SCRIPT), *picture_files, str(tmp_path / "new folder" / "a"), *SMALL]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0
    assert ended.stderr == ""  # none of TensorFlow's chatter
    first, second, *lines = ended.stdout.splitlines()
    assert re.fullmatch(
        r"painting 32 x 42 pixels on \d+ CPU cores? with tensorflow; RANDOM weights, untrained.*", first
    )
    assert re.fullmatch(r"as a whole, with about [\d.]+ GB of memory of [\d.]+ GB free", second)
    number = r"[-+.e\d]+"
    for n, line in enumerate(lines, 1):
        path = tmp_path / "new folder" / f"a_at_iteration_{n}.png"
        assert Image.open(path).size == (42, 32)
        assert re.fullmatch(
            rf"iteration {n}/2: loss {number} "
            rf"\(content {number}, style {number}, total variation {number}\), "
            rf"improved by {number} %, {number} s, {re.escape(str(path))}",
            line,
        )
    assert len(lines) == 2
    assert len(list((tmp_path / "new folder").iterdir())) == 3  # and the state


def test_quiet_says_nothing_and_makes_the_same_picture(picture_files, tmp_path, capfd):
    for name, flags in (("a", []), ("b", ["--quiet"])):
        assert deepstyle.main([*picture_files, str(tmp_path / name), *SMALL, *flags]) == 0
        assert bool(capfd.readouterr().out) == (name == "a")
    a, b = (np.asarray(Image.open(tmp_path / f"{name}_at_iteration_2.png")) for name in "ab")
    np.testing.assert_array_equal(a, b)


def test_rescaled_run_saves_the_contents_size(picture_files, tmp_path):
    flags = ["--rescale_image", "--preserve_color", "--quiet", "--num_iter", "1"]
    assert deepstyle.main([*picture_files, f"{tmp_path}/", *SMALL, *flags]) == 0
    assert Image.open(tmp_path / "result_image_at_iteration_1.png").size == (64, 48)


def test_early_end_is_said(picture_files, tmp_path, capfd):
    flags = [*SMALL, "--num_iter", "5", "--min_improvement", "99.999"]
    assert deepstyle.main([*picture_files, str(tmp_path / "a"), *flags]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "stopped: the last iteration improved by less than 99.999 %"
    flags = [*SMALL, "--style_weight", "0", "--total_variation_weight", "0"]
    assert deepstyle.main([*picture_files, str(tmp_path / "b"), *flags]) == 0
    assert "the optimiser finds no better picture" in capfd.readouterr().out
    assert (tmp_path / "b_at_iteration_1.png").exists()
    assert deepstyle.main([*picture_files, str(tmp_path / "b"), *flags, "--resume"]) == 0
    assert "the optimiser finds no better picture" in capfd.readouterr().out
    assert not (tmp_path / "b_at_iteration_2.png").exists()


def test_terminal_gets_a_progress_bar(picture_files, tmp_path):
    import pty

    shell, terminal = pty.openpty()
    command = [sys.executable, str(SCRIPT), *picture_files, str(tmp_path / "a"), *SMALL]
    run = subprocess.Popen(
        command, stdout=terminal, stderr=terminal, env={"TERM": "xterm", "COLUMNS": "100", "PATH": ""}
    )
    shown = b""
    while run.poll() is None:
        time.sleep(0.1)
        shown += read_available(shell)
    shown += read_available(shell)
    assert run.returncode == 0
    assert re.search(rb"iteration [12]/2 .*loss [.e+\d]+, .*\d:\d\d:\d\d.* left", shown)
    assert b"improved by" in shown


def read_available(descriptor):
    import os
    import select

    read = b""
    while select.select([descriptor], [], [], 0)[0]:
        read += os.read(descriptor, 65536)
    return read


def test_a_prefix_is_shown_as_it_is(picture_files, tmp_path, capsys):
    assert deepstyle.main([*picture_files, str(tmp_path / ":cat:[red]"), *SMALL]) == 0
    assert f"{tmp_path}/:cat:[red]_at_iteration_2.png" in capsys.readouterr().out


def test_what_windows_does_not_have_is_done_without(picture_files, tmp_path, monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    for name in ("sysconf", "getuid", "fork", "mkfifo", "ttyname", "uname"):
        monkeypatch.delattr(os, name)
    assert deepstyle.main([*picture_files, str(tmp_path / "a"), *SMALL]) == 0
    assert (tmp_path / "a_at_iteration_2.png").exists()


def test_a_prefix_that_ends_in_the_systems_own_separator_is_a_folder(monkeypatch):
    monkeypatch.setattr(os, "sep", "\\")
    assert deepstyle.base_path("out\\").name == "result_image"

"""The command line: flags, messages, exit statuses, files."""

import json
import os
import pathlib
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
from conftest import SMALL, run
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import deepstyle
from deepstyle_app.command import command_line, job_of, main
from deepstyle_app.ownership import base_path
from deepstyle_app.recipe import Recipe
from deepstyle_app.terminal import console_for, getting_ready, progress_bar
from deepstyle_support.engine import Engine
from deepstyle_support.memory import Plan
from deepstyle_support.messages import as_typed, notify

SCRIPT = Path(deepstyle.__file__)


def parse(*flags):
    return command_line().parse_args(["c.png", "s.png", "out", *flags])


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
    assert main(["--help"]) == 0
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
    assert main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, default in vars(deepstyle.Settings()).items():
        assert f"--{name} " in shown
        if default is not None:
            after = shown.split(f"--{name} ")[-1]  # a preset names flags as well, before them
            assert f"({as_typed(default)})" in after.split(" --")[0]


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"deepstyle {deepstyle.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["a.png", "b.png", "c", "--pool_type", "x"]])
def test_nothing_heavy_is_imported_to_answer_help_and_errors(arguments):
    code = (
        "import sys; from deepstyle_app.command import main; main(sys.argv[1:]); "
        "print([m for m in ('tensorflow', 'keras', 'scipy', 'rich', 'h5py') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code, *arguments], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert ended.stdout.endswith("[]\n")


def test_a_run_writes_one_picture_per_iteration_and_says_what_it_did(picture_files, tmp_path):
    command = [sys.executable, str(SCRIPT), *picture_files, str(tmp_path / "new folder" / "a"), *SMALL]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0
    assert ended.stderr == ""  # none of TensorFlow's chatter
    first, weights, second, *lines = ended.stdout.splitlines()
    assert re.fullmatch(r"painting 32 x 42 pixels on \d+ CPU cores? with tensorflow", first)
    assert weights.startswith("RANDOM weights, untrained")
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
        assert main([*picture_files, str(tmp_path / name), *SMALL, *flags]) == 0
        assert bool(capfd.readouterr().out) == (name == "a")
    a, b = (np.asarray(Image.open(tmp_path / f"{name}_at_iteration_2.png")) for name in "ab")
    np.testing.assert_array_equal(a, b)


def test_rescaled_run_saves_the_contents_size(picture_files, tmp_path):
    flags = ["--rescale_image", "--preserve_color", "--quiet", "--num_iter", "1"]
    assert main([*picture_files, f"{tmp_path}/", *SMALL, *flags]) == 0
    assert Image.open(tmp_path / "result_image_at_iteration_1.png").size == (64, 48)


def test_early_end_is_said(picture_files, tmp_path, capfd):
    flags = [*SMALL, "--num_iter", "5", "--min_improvement", "99.999"]
    assert main([*picture_files, str(tmp_path / "a"), *flags]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "stopped: the last iteration improved by less than 99.999 %"
    flags = [*SMALL, "--style_weight", "0", "--total_variation_weight", "0"]
    assert main([*picture_files, str(tmp_path / "b"), *flags]) == 0
    assert "the optimiser finds no better picture" in capfd.readouterr().out
    assert (tmp_path / "b_at_iteration_1.png").exists()
    assert main([*picture_files, str(tmp_path / "b"), *flags, "--resume"]) == 0
    assert "the optimiser finds no better picture" in capfd.readouterr().out
    assert not (tmp_path / "b_at_iteration_2.png").exists()


def test_a_style_weight_that_is_shared_out_is_said(picture_files, tmp_path, capsys):
    content, style = picture_files
    several = [content, style, style, str(tmp_path / "a"), *SMALL]
    assert main([*several, "--style_weight", "2"]) == 0
    assert capsys.readouterr().err == "deepstyle: the --style_weight 2.0 is shared out among 2 styles\n"
    assert main(several) == 0  # nobody has asked for a weight
    assert capsys.readouterr().err == ""


def test_terminal_gets_a_progress_bar(picture_files, tmp_path):
    shell, terminal = pty.openpty()
    environment = {"TERM": "xterm", "COLUMNS": "100", "PATH": ""}
    run = forked.start(*picture_files, tmp_path / "a", *SMALL, env=environment, terminal=terminal)
    shown = b""
    while run.poll() is None:
        time.sleep(0.1)
        shown += read_available(shell)
    shown += read_available(shell)
    assert run.returncode == 0
    assert b"getting ready" in shown
    assert re.search(rb"iteration [12]/2 .*loss [.e+\d]+, .*\d:\d\d:\d\d.* left", shown)
    # A line that is wider than the terminal is said shorter.
    assert re.search(rb"iteration 2/2: loss [.e+\d]+, [.\d]+ s, ", shown)
    assert b"improved by" not in shown


def read_available(descriptor):
    import os
    import select

    read = b""
    while select.select([descriptor], [], [], 0)[0]:
        read += os.read(descriptor, 65536)
    return read


def test_a_prefix_is_shown_as_it_is(picture_files, tmp_path, capsys):
    assert main([*picture_files, str(tmp_path / ":cat:[red]"), *SMALL]) == 0
    assert f"{tmp_path}/:cat:[red]_at_iteration_2.png" in capsys.readouterr().out


def test_what_windows_does_not_have_is_done_without(picture_files, tmp_path, monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    for name in ("sysconf", "getuid", "fork", "mkfifo", "ttyname", "uname"):
        monkeypatch.delattr(os, name)
    assert main([*picture_files, str(tmp_path / "a"), *SMALL]) == 0
    assert (tmp_path / "a_at_iteration_2.png").exists()


def test_a_prefix_that_ends_in_the_systems_own_separator_is_a_folder(monkeypatch):
    monkeypatch.setattr(os, "sep", "\\")
    assert base_path("out\\").name == "result_image"


TERMINALS = (
    "FORCE_COLOR",
    "TTY_INTERACTIVE",
    "TTY_COMPATIBLE",
    "CLICOLOR_FORCE",
    "NO_COLOR",
    "TERM",
    "COLUMNS",
    "LINES",
)


@pytest.fixture
def environment(monkeypatch):
    """Sets what programs take a terminal for, and nothing besides."""

    def only(given):
        for name in TERMINALS:
            monkeypatch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm", **given}.items():
            monkeypatch.setenv(name, value)

    return only


def show_a_bar_and_a_line():
    """What a run shows, on the stdout that there is."""
    console = console_for(quiet=False)
    with progress_bar(console, {(32, 42): 1}, 20) as advance:
        advance((32, 42), 7, 12.5)
        notify("a note")
        console.print("iteration 1/1")


def test_the_time_left_is_that_of_all_sizes(environment, monkeypatch):
    environment({})

    def show_the_end_of_the_first_size():
        with progress_bar(console_for(quiet=False), {(16, 21): 1, (32, 42): 1}, 20) as advance:
            for count in (1, 20):
                advance((16, 21), count, 12.5)
                time.sleep(0.02)

    shown = shown_on_a_terminal(monkeypatch, show_the_end_of_the_first_size)
    assert "16 x 21: iteration 1/1" in shown
    assert re.search(r"0:00:0[1-9]\S* \S*left", shown.rpartition("16 x 21")[2])


FORCED = [{"FORCE_COLOR": "1"}, {"TTY_INTERACTIVE": "1"}, {"TTY_COMPATIBLE": "1"}, {"COLUMNS": "0"}]


@pytest.mark.parametrize("given", [*FORCED, {"FORCE_COLOR": "3", "TTY_INTERACTIVE": "1", "CLICOLOR_FORCE": "1"}])
def test_a_file_gets_the_lines_and_no_escape_codes(given, environment, capfd):
    environment(given)
    show_a_bar_and_a_line()
    assert capfd.readouterr() == ("iteration 1/1\n", "deepstyle: a note\n")


@pytest.mark.parametrize("given", [{}, {"FORCE_COLOR": ""}, {"NO_COLOR": "1"}, {"COLUMNS": "0"}, {"COLUMNS": "\u00b2"}])
def test_a_terminal_gets_a_bar_above_which_the_lines_are(given, environment, monkeypatch):
    environment(given)
    shown = shown_on_a_terminal(monkeypatch, show_a_bar_and_a_line)
    assert "loss 12.5" in shown
    assert "\x1b[" in shown
    assert "iteration 1/1\r\n" in shown
    assert ("\x1b[3" in shown) == ("NO_COLOR" not in given)


@pytest.mark.parametrize("given", [{"TERM": "dumb"}, {"TTY_COMPATIBLE": "0"}, {"TTY_INTERACTIVE": "0"}])
def test_a_terminal_that_cannot_move_its_cursor_gets_the_lines_alone(given, environment, monkeypatch):
    environment(given)
    assert shown_on_a_terminal(monkeypatch, show_a_bar_and_a_line) == "iteration 1/1\r\n"


def test_a_bar_takes_nothing_from_what_is_written_to_stderr(environment, monkeypatch, capfd):
    environment({})
    assert "a note" not in shown_on_a_terminal(monkeypatch, show_a_bar_and_a_line)
    assert capfd.readouterr().err == "deepstyle: a note\n"


def test_nor_does_what_moves_while_libraries_are_loaded(environment, monkeypatch, capfd):
    def load():
        with getting_ready(console_for(quiet=False)):
            print("a library's words", file=sys.stderr)

    environment({})
    shown = shown_on_a_terminal(monkeypatch, load)
    assert "getting ready" in shown
    assert "words" not in shown
    assert capfd.readouterr().err == "a library's words\n"


@pytest.mark.parametrize("given", [{"TERM": "dumb"}, {"TTY_INTERACTIVE": "0"}])
def test_nothing_moves_where_the_cursor_cannot(given, environment, monkeypatch):
    def load():
        with getting_ready(console_for(quiet=False)):
            pass

    environment(given)
    assert shown_on_a_terminal(monkeypatch, load) == ""


def shown_on_a_terminal(monkeypatch, show):
    """What show() writes to a stdout that is a terminal."""
    shell, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        show()
        stdout.flush()
        shown = read_available(shell)
    os.close(shell)
    return shown.decode()


def test_who_stops_reading_gets_no_complaint_and_the_same_status(picture_files):
    reading, nobody_reads = os.pipe()
    os.close(reading)
    gone: dict = {"stdout": nobody_reads, "stderr": subprocess.PIPE}
    Image.open(picture_files[0]).save(picture_files[0], pnginfo=made_somehow())
    commands = [
        (["--help"], gone, 0),
        (["--version"], gone, 0),
        (["--describe", picture_files[0]], gone, 0),
        (["--help"], gone | {"env": os.environ | {"PYTHONUNBUFFERED": "1"}}, 0),
        (["--no_such_flag", "--debug"], {"stdout": subprocess.PIPE, "stderr": nobody_reads}, 2),
    ]
    runs = [subprocess.Popen([sys.executable, str(SCRIPT), *flags], **where) for flags, where, _ in commands]
    os.close(nobody_reads)
    for started, (_, _, status) in zip(runs, commands, strict=True):
        assert [text for text in started.communicate() if text] == []
        assert started.returncode == status


def made_somehow():
    """The text of a picture that says how it was made."""
    recipe = Recipe.of(job_of(["c.png", "s.png", "out"]), Engine(Plan(None, 10), {}))
    text = PngInfo()
    text.add_itxt("Software", "deepstyle")
    text.add_itxt("deepstyle", json.dumps(recipe.as_text() | {"exact": True, "iteration": 1}))
    return text


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--describe", "made.png"]])
def test_an_answer_that_a_full_disk_does_not_take_is_told(tmp_path, monkeypatch, capfd, arguments):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("made.png", pnginfo=made_somehow())
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(arguments) == 1
    assert capfd.readouterr().err == "deepstyle: error: cannot write to stdout: No space left on device\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--describe", "none.png", "--debug"]])
def test_without_stdout_and_stderr_there_is_still_a_status(monkeypatch, arguments):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(arguments) == (2 if "none.png" in arguments else 0)


def test_a_traceback_goes_to_stderr_or_nowhere(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["--no_such_flag", "--debug"]) == 2
    assert capfd.readouterr() == ("", "")


NAMES = ["log", "animation", "report", "tensorboard", "weights", "init_image", "background"]


@pytest.mark.parametrize("flag", [*NAMES, "content_mask", "color_mask", "style_masks", "describe", "tile", "model"])
def test_an_empty_name_is_an_error_and_not_the_same_as_none(picture_files, tmp_path, capsys, flag):
    before = sorted(tmp_path.rglob("*"))
    assert main([*picture_files, str(tmp_path / "a"), *SMALL, f"--{flag}", ""]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"--{flag}" in said or "cannot read the picture ''" in said
    assert "''" in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("image_size", np.int64(32), 32),
        ("seed", np.uint8(3), 3),
        ("content_weight", np.float32(0.5), 0.5),
        ("content_weight", 1, 1.0),
        ("style_weight", np.array([1, 2]), (1.0, 2.0)),
        ("coarse_iter", np.array(3), (3,)),
        ("content_layer", np.str_("block4_conv2"), ("conv4_2",)),
        ("content_layer", np.array(["conv4_2", "conv5_1"]), ("conv4_2", "conv5_1")),
        ("maintain_aspect_ratio", np.bool_(False), False),
        ("maintain_aspect_ratio", "False", False),
        ("rescale_image", 1, True),
        ("preserve_color", np.bool_(True), "luma"),
        ("preserve_color", "no", False),
        ("tile", np.int64(64), "64"),
        ("init_image", pathlib.Path("a.png"), "a.png"),
        ("weights", pathlib.Path("a.h5"), "a.h5"),
        ("model", np.str_("vgg19"), "vgg19"),
    ],
)
def test_settings_are_pythons_own_whatever_they_are_given_as(name, given, kept):
    found = getattr(deepstyle.Settings(**{name: given}), name)
    assert repr(found) == repr(kept)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("image_size", None, "--image_size is None; it must be a whole number"),
        ("image_size", True, "--image_size is True; it must be a whole number"),
        ("image_size", "32", "--image_size is '32'; it must be a whole number"),
        ("image_size", np.float32(32), "it must be a whole number"),
        ("num_iter", 1.5, "--num_iter is 1.5; it must be a whole number"),
        ("seed", [1], "it must be a whole number"),
        ("content_weight", None, "--content_weight is None; it must be a number"),
        ("content_weight", 1j, "it must be a number"),
        ("content_weight", np.float32("nan"), "--content_weight is nan; it must be 0 or more, and finite"),
        ("content_weight", 10**400, "--content_weight is inf"),
        ("style_weight", [[1]], "it must be a number"),
        ("style_weight", [None], "--style_weight is None; it must be a number"),
        ("style_layers", [], "--style_layers names no layer"),
        ("content_layer", None, "--content_layer is None; it must be text"),
        ("content_layer", 5, "--content_layer is 5; it must be text"),
        ("maintain_aspect_ratio", None, "it must be True or False"),
        ("maintain_aspect_ratio", 2, "it must be True or False"),
        ("preserve_color", None, "--preserve_color is 'None'; it must be one of False, luma, match"),
        ("preserve_color", np.zeros(2), "it must be one of False, luma, match"),
        ("model", ["vgg16"], "it must be text"),
        ("init_image", None, "--init_image is None; it must be text"),
        ("background", (255, 0, 0), "it must be text"),
        ("weights", {"conv1_1": np.zeros(999)}, "it must be text"),
        ("tile", None, "--tile is 'None'"),
        ("tile", "9" * 5000, "of up to 9 digits"),
    ],
)
def test_a_setting_of_another_kind_is_refused_by_name(name, given, said):
    with pytest.raises(deepstyle.UserError) as refused:
        deepstyle.Settings(**{name: given})
    assert str(refused.value).startswith(f"--{name}")
    assert said in str(refused.value)


def test_a_package_that_is_missing_is_one_line_whenever_it_is_needed(picture_files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert run(picture_files, tmp_path / "a") == 1
    said = "this Python has no package scipy; 'sh run.sh --setup' makes one that has it, 'pip install .' installs it"
    assert capsys.readouterr().err == f"deepstyle: error: {said}\n"

"""What a run leaves besides its pictures: their text, animations, logs. How colours are kept, what it begins with."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import os
import re
import resource
import shlex
import subprocess
import sys

import forked
import imageio.v3
import numpy as np
import pytest
from conftest import SMALL, describe, for_scripts, pixels, run_quietly, smooth_picture
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import deepstyle
from deepstyle import Pictures, Settings
from deepstyle_app import ownership
from deepstyle_app.command import command_line, job_of, main
from deepstyle_app.outputs import write_animation, write_log
from deepstyle_app.recipe import Recipe
from deepstyle_support.colours import colours, match_colours, with_colours
from deepstyle_support.engine import Engine
from deepstyle_support.images import from_input_space, resize
from deepstyle_support.memory import Plan
from deepstyle_support.pictures import read_start
from deepstyle_support.settings import STYLE_LAYERS


def write_mask(path, size=(48, 64)):
    """Black on the left, white on the right."""
    mask = np.zeros(size, np.uint8)
    mask[:, size[1] // 2 :] = 255
    Image.fromarray(mask).save(path)
    return path


def test_every_saves_each_nth_picture_and_the_last(picture_files, tmp_path):
    assert run_quietly(picture_files, tmp_path / "a", "--num_iter", 5, "--every", 2) == 0
    assert sorted(path.name for path in tmp_path.glob("a_at*")) == [f"a_at_iteration_{n}.png" for n in (2, 4, 5)]
    # An end before --num_iter has a last one, too.
    flags = ["--num_iter", 5, "--every", 4, "--min_improvement", 99.999]
    assert run_quietly(picture_files, tmp_path / "b", *flags) == 0
    assert [path.name for path in tmp_path.glob("b_at*")] == ["b_at_iteration_2.png"]


def test_every_leaves_a_state_to_go_on_from_after_each_iteration(picture_files, tmp_path, monkeypatch):
    saved = []
    savez = np.savez
    monkeypatch.setattr(np, "savez", lambda file, **state: saved.append(state["iteration"]) or savez(file, **state))
    assert run_quietly(picture_files, tmp_path / "a", "--num_iter", 3, "--every", 10) == 0
    assert saved == [1, 2, 3]


@pytest.fixture(autouse=True)
def another_python(monkeypatch, tmp_path):
    """What runs the tests is another Python than that of run.sh."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))


def test_a_picture_says_how_it_was_made_and_the_command_makes_it_again(picture_files, tmp_path, capsys):
    mask = write_mask(tmp_path / "a mask.png")
    flags = ["--style_masks", mask, mask, "--init_image", "noise", "--seed", 3, "--preserve_color", "--scales", 2]
    flags += ["--image_size", 64, "--style_weight", 1, 2, "--tile", 64, "--every", 2, "--content_layer", "conv4_2"]
    flags += ["--coarse_iter", 1]
    assert run_quietly([*picture_files, picture_files[0]], tmp_path / "a", *flags) == 0
    said = describe(tmp_path / "a_at_iteration_2.png", capsys)
    assert f"made with: deepstyle {deepstyle.__version__}" in said
    assert "\niteration: 2\n" in said
    assert re.search(r"\nloss: [\d.]+\n", said)
    for name in ("content picture's", "style 1 picture's", "style 2 picture's", "style mask 2 picture's", "weights'"):
        assert re.search(rf"\nthe {name} SHA-256: [0-9a-f]{{64}}\n", said)
    explained, command = said.splitlines()[-2:]
    assert explained == "this makes it again, as its iteration 2:"
    python, script, *arguments = shlex.split(command)
    assert (python, script) == ("python", "deepstyle.py")
    arguments[arguments.index(str(tmp_path / "a"))] = str(tmp_path / "b")
    assert forked.run(*arguments, "--quiet").returncode == 0
    np.testing.assert_array_equal(pixels(tmp_path / "a_at_iteration_2.png"), pixels(tmp_path / "b_at_iteration_2.png"))


HOSTILE = [
    "-c.png",
    "-",
    "--quiet",
    "-5",
    "a b",
    "it's",
    "$HOME",
    "`id`",
    '"',
    "a\nb",
    "ends\n\n",
    "\n",
    "\t",
    "~",
    "*",
    "None",
]
HOSTILE += ["caf\udce9.png", "-\udcff\n", "100%\\n!\udcff'", "\x1b[31m", "日本.png", "é\u3000é", "\U0001f600"]


def command_in(text, encoding="utf-8"):
    """The command that a picture's text stands for, once it has been through a file."""
    return Recipe.from_text(json.loads(json.dumps(text))).command(dataclasses.asdict(Settings()), encoding)


def commands_of_hostile_names(encoding):
    """For each name the command of a run whose files are all called so."""
    for name in HOSTILE:
        settings = dataclasses.asdict(Settings()) | {"init_image": name, "weights": name}
        text: dict = {"settings": settings, "pictures": [name, name], "prefix": name}
        text |= {"masks": {"content_mask": name, "style_masks": [name, name]}}
        yield command_in(text | {"allow_large": False, "backend": "tensorflow"}, encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_command_runs_in_a_shell_and_means_the_same_files_whatever_they_are_called(encoding):
    to_python = "python() { for a; do printf '%s\\0' \"$a\"; done; printf '\\0'; }\n"
    script = "\n".join([to_python, *commands_of_hostile_names(encoding)]).encode(encoding)
    ran = subprocess.run(["sh"], input=script, capture_output=True, check=True)
    assert ran.stderr == b""
    runs = ran.stdout.split(b"\0\0")[:-1]
    for name, run in zip(HOSTILE, runs, strict=True):
        parsed = command_line().parse_args([os.fsdecode(one) for one in run.split(b"\0")][1:])
        named = [parsed.content, *parsed.style, parsed.prefix, parsed.content_mask, *parsed.style_masks]
        named += [parsed.weights, parsed.init_image]
        assert {os.path.normpath(one) for one in named} == {os.path.normpath(name)}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_command_is_of_letters_that_can_be_copied_from_the_terminal(encoding):
    for command in commands_of_hostile_names(encoding):
        assert command.replace("\n", "").isprintable()
        assert command.encode(encoding).decode(encoding) == command


def test_what_describe_prints_makes_a_picture_of_oddly_named_files_again(picture_files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content, prefix = "-caf\udce9 $1\n.png", "--out\udcff"
    os.rename(picture_files[0], content)
    command = [f"./{content}", "style.png", f"./{prefix}", "--num_iter", "1", *SMALL[:4], f"--content_mask={content}"]
    assert main(command) == 0
    before = pixels(f"./{prefix}_at_iteration_1.png")
    said = describe(f"./{prefix}_at_iteration_1.png", capsys)
    script = "python() { printf '%s\\0' \"$@\"; }\n" + said.splitlines()[-1]
    ran = subprocess.run(["sh"], input=script.encode(), capture_output=True, check=True)
    again = [os.fsdecode(one) for one in ran.stdout.split(b"\0")[1:-1]]
    assert main([*again, "--overwrite"]) == 0
    np.testing.assert_array_equal(pixels(f"./{prefix}_at_iteration_1.png"), before)


def test_describe_writes_no_line_or_escape_code_of_a_name(tmp_path, capsys):
    text = PngInfo()
    text.add_itxt("Software", "deepstyle\x1b[31m\nmade by: someone else")
    text.add_itxt("deepstyle", json.dumps({"command": "python", "exact": True, "iteration": 1, "prefix": "a\nb"}))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=text)
    lines = describe(tmp_path / "a.png", capsys).splitlines()
    assert lines[0] == "made with: deepstyle?[31m?made by: someone else"
    assert "prefix: a?b" in lines


def test_the_command_has_the_plan_that_was_made_and_not_the_memory_it_was_made_for(picture_files):
    engine = Engine(Plan(tile=512, history=7), {})
    recipe = Recipe.of(job_of([*picture_files, "out", "--max_memory", "3", "--allow_large"]), engine)
    assert command_in(recipe.as_text()).endswith(" out --history 7 --tile 512 --allow_large")
    recipe = Recipe.of(job_of([*picture_files, "out", "--min_improvement", "5"]), engine)
    assert "min_improvement" not in command_in(recipe.as_text())  # it made no picture


@pytest.mark.parametrize(
    ("backend", "begins"),
    [("tensorflow", "python deepstyle.py "), ("jax", "env KERAS_BACKEND=jax python deepstyle.py ")],
)
def test_the_command_names_a_backend_that_is_not_the_usual_one(picture_files, backend, begins):
    text = Recipe.of(job_of([*picture_files, "out"]), Engine(Plan(None, 10), {})).as_text() | {"backend": backend}
    assert command_in(text).startswith(begins)


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        (["deepstyle.py"], []),
        (["examples/large_picture.py", "--workers", "1"], []),
        (["examples/large_picture.py", "--workers", "2"], ["--workers", "2"]),
    ],
)
def test_workers_that_were_a_program_of_their_own_are_a_flag_of_the_command(program, flags):
    text = Recipe.of(job_of(["c.png", "s.png", "out"]), Engine(Plan(64, 10), {})).as_text() | {"program": program}
    del text["workers"]
    command = command_in(text)
    assert shlex.split(command) == ["python", "deepstyle.py", "c.png", "s.png", "out", "--tile", "64", *flags]
    assert command_in(Recipe.from_text(text).as_text()) == command


def test_a_picture_that_says_something_else_is_one_line(tmp_path, capsys):
    text = PngInfo()
    text.add_itxt("Software", "deepstyle")
    text.add_itxt("deepstyle", "{}")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=text)
    assert main(["--describe", str(tmp_path / "a.png")]) == 2
    assert "does not say how it was made, or not all of it" in capsys.readouterr().err


def test_a_picture_of_a_resumed_run_does_not_claim_that_its_command_makes_it_again(picture_files, tmp_path, capsys):
    assert run_quietly(picture_files, tmp_path / "a", "--num_iter", 1) == 0
    assert "this makes it again" in describe(tmp_path / "a_at_iteration_1.png", capsys)
    assert run_quietly(picture_files, tmp_path / "a", "--num_iter", 2, "--resume") == 0
    said = describe(tmp_path / "a_at_iteration_2.png", capsys)
    assert "comes close to it, not bit for bit" in said


def is_exact(path):
    return json.loads(Image.open(path).info["deepstyle"])["exact"]


@pytest.mark.parametrize("short", [False, True])
def test_a_run_short_of_memory_on_the_way_is_neither_made_again_nor_gone_on_with_exactly(
    picture_files, tmp_path, monkeypatch, short
):
    Image.fromarray(smooth_picture(1, 32, 180)).save(picture_files[0])  # wide enough for smaller tiles
    compute, calls = deepstyle.TiledLoss.parts_and_gradient, itertools.count(1)

    def run_out_once(*given):
        if next(calls) == 25 and short:  # within the second iteration
            raise MemoryError
        return compute(*given)

    monkeypatch.setattr(deepstyle.TiledLoss, "parts_and_gradient", run_out_once)
    flags = ["--optimizer", "device", "--tile", "off"]
    assert run_quietly(picture_files, tmp_path / "a", *flags) == 0
    with np.load(tmp_path / "a_state.npz") as state:
        assert "by_gradient" in state  # what is known of the curvature is kept all the same
        assert (str(state["way"]) == "") == short
    assert run_quietly(picture_files, tmp_path / "a", *flags, "--num_iter", 3, "--resume") == 0
    with np.load(tmp_path / "a_state.npz") as state:
        assert (str(state["way"]) == "") == short
    exact = [is_exact(tmp_path / f"a_at_iteration_{number}.png") for number in (1, 2, 3)]
    assert exact == [True, not short, not short]


@pytest.mark.parametrize("name", ["style.png", "none.png", "text.png"])
def test_describe_says_in_one_line_if_a_picture_tells_nothing(picture_files, tmp_path, capsys, name):
    (tmp_path / "text.png").write_text("no picture")
    assert main(["--describe", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("deepstyle: error: ")
    assert said.count("\n") == 1
    assert name in said


@pytest.mark.parametrize("kind", ["gif", "webp", "mp4"])
def test_the_animation_begins_with_the_start_and_holds_the_last_picture(picture_files, tmp_path, kind):
    path = tmp_path / "new" / f"a.{kind}"
    assert run_quietly(picture_files, tmp_path / "a", "--num_iter", 3, "--every", 3, "--animation", path) == 0
    frames = imageio.v3.imread(path, index=None if kind == "mp4" else ...)
    start = resize(deepstyle.read_picture(picture_files[0])[0], (32, 42))
    last = pixels(tmp_path / "a_at_iteration_3.png")
    assert frames.shape == (10 if kind == "mp4" else 4, 32, 42, 3)
    for frame, expected in ((frames[0], start), (frames[3], last), (frames[-1], last)):
        # Palettes and video compression change pixels, but not which picture it is.
        assert np.corrcoef(frame.ravel(), expected.ravel())[0, 1] > 0.8
    assert np.any(frames[0] != frames[1])
    if kind != "mp4":
        with Image.open(path) as animation:
            durations = []
            for index in range(animation.n_frames):
                animation.seek(index)
                animation.load()
                durations.append(animation.info["duration"])
        assert durations == [250, 250, 250, 2000]


@pytest.mark.parametrize("kind", ["gif", "webp", "mp4"])
def test_one_picture_is_an_animation_too(tmp_path, kind):
    write_animation(tmp_path / f"a.{kind}", [np.full((32, 40, 3), 99, np.uint8)], "made by a test")
    shown = imageio.v3.imread(tmp_path / f"a.{kind}", index=...)
    assert len(shown) == (7 if kind == "mp4" else 1)  # whose pictures all take as long
    assert np.abs(shown.astype(int) - 99).max() <= 3


def test_a_resumed_runs_animation_has_the_pictures_before(picture_files, tmp_path):
    assert run_quietly(picture_files, tmp_path / "a", "--num_iter", 2) == 0
    path = tmp_path / "a.gif"
    assert run_quietly(picture_files, tmp_path / "a", "--num_iter", 3, "--resume", "--animation", path) == 0
    assert len(imageio.v3.imread(path, index=...)) == 4


def rows_of(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_the_log_has_a_row_of_losses_for_each_iteration(picture_files, tmp_path):
    path = tmp_path / "a.csv"
    assert run_quietly(picture_files, tmp_path / "a", "--log", path) == 0
    rows = rows_of(path)
    assert [row["iteration"] for row in rows] == ["1", "2"]
    names = ["content conv5_2", *(f"style {layer}" for layer in STYLE_LAYERS), "total variation"]
    assert list(rows[0]) == ["rows", "columns", "iteration", "evaluations", "seconds", "loss", *names]
    with np.load(tmp_path / "a_state.npz") as state:
        for row, losses in zip(rows, state["losses"][1:], strict=True):
            assert float(row["loss"]) == losses[0] == sum(float(row[name]) for name in names)
    # A resumed run goes on with it, a new one begins it anew.
    assert run_quietly(picture_files, tmp_path / "a", "--log", path, "--num_iter", 3, "--resume") == 0
    assert [row["iteration"] for row in rows_of(path)] == ["1", "2", "3"]
    assert rows_of(path)[:2] == rows
    assert run_quietly(picture_files, tmp_path / "a", "--log", path, "--num_iter", 1) == 0
    assert [row["iteration"] for row in rows_of(path)] == ["1"]


@contextlib.contextmanager
def full_disk():
    """Within, no file grows beyond 4 bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.csv", lambda path: write_log(path, ["iteration,loss", "1,2.5"])),
        ("a.gif", lambda path: write_animation(path, [smooth_picture(1, 8, 8)], "a run")),
    ],
)
def test_a_log_or_an_animation_that_finds_no_room_leaves_the_one_before(tmp_path, name, write):
    (tmp_path / name).write_bytes(b"before")
    with full_disk(), pytest.raises(deepstyle.UserError, match="cannot write"):
        write(tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"before"
    assert os.listdir(tmp_path) == [name]


COARSE = ["--image_size", 64, "--scales", 2, "--coarse_iter", 3]


def test_a_coarse_size_is_saved_logged_and_shown_like_any(picture_files, tmp_path, capsys):
    log, animation, coarse = tmp_path / "a.csv", tmp_path / "a.gif", "a_at_32x42_iteration"
    flags = [*COARSE, "--log", log, "--animation", animation]
    assert run_quietly(picture_files, tmp_path / "a", *flags) == 0
    sizes = [(row["rows"], row["columns"], row["iteration"]) for row in rows_of(log)]
    assert sizes == [("32", "42", n) for n in "123"] + [("64", "85", n) for n in "12"]
    assert sorted(path.name for path in tmp_path.glob("a_at_32*")) == [f"{coarse}_{n}.png" for n in (1, 2, 3)]
    assert pixels(tmp_path / f"{coarse}_3.png").shape == (32, 42, 3)
    assert imageio.v3.imread(animation, index=...).shape == (6, 64, 85, 3)
    assert "this makes it again, as its iteration 3 at 32 x 42 pixels:" in describe(
        tmp_path / f"{coarse}_3.png", capsys
    )
    # They belong to the run, and go with it.
    assert run_quietly(picture_files, tmp_path / "a", *flags, "--every", 2) == 0
    assert len(list((tmp_path / "a_earlier_1").glob("a_at_32x42_iteration_*.png"))) == 3
    assert sorted(path.name for path in tmp_path.glob("a_at_32*")) == [f"{coarse}_{n}.png" for n in (2, 3)]


def test_log_and_animation_go_on_where_a_run_stopped_at_a_coarse_size(picture_files, tmp_path, monkeypatch):
    flags = [*COARSE, "--log", tmp_path / "a.csv", "--animation", tmp_path / "a.gif"]
    evaluate, calls = deepstyle.Objective.evaluate, []

    def fail(self, x):
        calls.append(x)
        return evaluate(self, x if len(calls) < 50 else np.full_like(x, np.nan))

    with monkeypatch.context() as broken:
        broken.setattr(deepstyle.Objective, "evaluate", fail)
        assert run_quietly(picture_files, tmp_path / "a", *flags) == 1
    assert [row["iteration"] for row in rows_of(tmp_path / "a.csv")] == ["1", "2", "3"]  # the last one in part
    begun = rows_of(tmp_path / "a.csv")
    assert run_quietly(picture_files, tmp_path / "a", *flags, "--resume") == 0
    rows = rows_of(tmp_path / "a.csv")
    assert [(row["rows"], row["iteration"]) for row in rows] == [("32", n) for n in "123"] + [("64", n) for n in "12"]
    assert rows[:2] == begun[:2]
    assert imageio.v3.imread(tmp_path / "a.gif", index=...).shape == (6, 64, 85, 3)


def test_a_log_of_0_2_0_is_gone_on_with(picture_files, tmp_path):
    path = tmp_path / "a.csv"
    assert run_quietly(picture_files, tmp_path / "a", "--log", path, "--num_iter", 1) == 0
    path.write_text("\n".join(line.split(",", 2)[2] for line in path.read_text().splitlines()) + "\n")
    assert run_quietly(picture_files, tmp_path / "a", "--log", path, "--resume") == 0
    assert [(row["rows"], row["columns"], row["iteration"]) for row in rows_of(path)] == [
        ("32", "42", "1"),
        ("32", "42", "2"),
    ]


def test_an_earlier_runs_log_and_animation_are_moved_aside_with_its_pictures(picture_files, tmp_path):
    flags = ["--log", tmp_path / "logs" / "a.csv", "--animation", tmp_path / "a.gif", "--num_iter", 1]
    for _ in range(2):
        assert run_quietly(picture_files, tmp_path / "a", *flags) == 0
    earlier = sorted(path.name for path in (tmp_path / "a_earlier_1").iterdir())
    assert earlier == ["a.csv", "a.gif", "a_at_iteration_1.png", "a_state.npz"]
    assert run_quietly(picture_files, tmp_path / "a", *flags, "--overwrite") == 0
    assert not (tmp_path / "a_earlier_2").exists()


def test_tensorboard_gets_the_losses_and_the_pictures(picture_files, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    assert (
        run_quietly(picture_files, tmp_path / "a", "--tensorboard", tmp_path / "events", "--log", tmp_path / "a.csv")
        == 0
    )
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"tensors": 0})
    events.Reload()
    rows = rows_of(tmp_path / "a.csv")
    for tag, column in (("loss", "loss"), ("style/conv3_1", "style conv3_1"), ("total variation", "total variation")):
        written = events.Tensors(tag)
        assert [event.step for event in written] == [1, 2]
        for event, row in zip(written, rows, strict=True):
            assert tensor_util.make_ndarray(event.tensor_proto) == pytest.approx(float(row[column]), rel=1e-6)
    width, height, png, *_ = events.Tensors("picture")[1].tensor_proto.string_val
    assert (int(width), int(height)) == (42, 32)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), pixels(tmp_path / "a_at_iteration_2.png"))


def test_tensorboard_has_each_coarse_size_in_a_group_of_its_own(picture_files, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run_quietly(picture_files, tmp_path / "a", *COARSE, "--tensorboard", tmp_path / "events") == 0
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"tensors": 0})
    events.Reload()
    for group, iterations, size in (("32x42/", [1, 2, 3], (42, 32)), ("", [1, 2], (85, 64))):
        for tag in ("loss", "style/conv1_1", "picture"):
            assert [event.step for event in events.Tensors(group + tag)] == iterations
        width, height, *_ = events.Tensors(f"{group}picture")[0].tensor_proto.string_val
        assert (int(width), int(height)) == size


def test_tensorboard_goes_on_with_a_resumed_run_and_needs_no_tensorflow(picture_files, tmp_path):
    pytest.importorskip("jax")
    command = [*picture_files, str(tmp_path / "a"), *SMALL, "--tensorboard", str(tmp_path / "events"), "--quiet"]
    script = (
        "import sys, conftest\n"
        "from deepstyle_app.command import main\n"
        "for flags in (['--num_iter', '1'], ['--num_iter', '2', '--resume']):\n"
        "    print(main(sys.argv[1:] + flags), 'tensorflow' in sys.modules)"
    )
    given = {"env": for_scripts(KERAS_BACKEND="jax"), "capture_output": True, "text": True}
    ended = subprocess.run([sys.executable, "-c", script, *command], **given)
    assert (ended.stdout, ended.stderr) == ("0 False\n0 False\n", "")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"tensors": 0})
    events.Reload()
    assert [event.step for event in events.Tensors("loss")] == [1, 2]
    assert [event.step for event in events.Tensors("picture")] == [1, 2]


@pytest.mark.parametrize(
    ("flags", "package"), [(["--animation", "a.mp4"], "imageio-ffmpeg"), (["--tensorboard", "events"], "tensorboard")]
)
def test_a_package_that_is_missing_is_named_before_the_start(
    picture_files, tmp_path, capsys, monkeypatch, flags, package
):
    monkeypatch.setattr(ownership.importlib.util, "find_spec", lambda name: None)
    assert run_quietly(picture_files, tmp_path / "a", *flags) == 2
    assert f"needs the package {package}" in capsys.readouterr().err
    assert not list(tmp_path.glob("a*"))


def test_matched_styles_have_the_contents_mean_and_covariance():
    # In the content red and green go together, in the style green and blue.
    mixed = ([[1, 0.8, 0], [0, 0.3, 0], [0, 0, 0.2]], [[0.2, 0, 0], [0, 1, 0.9], [0, 0, 0.3]])
    content, style = (np.uint8(smooth_picture(n, 60, 50) / 3 @ np.array(mix) + 60) for n, mix in enumerate(mixed, 1))
    matched = match_colours(style, content)
    wanted, got = (picture.reshape(-1, 3).astype(float) for picture in (content, matched))
    np.testing.assert_allclose(got.mean(0), wanted.mean(0), atol=0.5)
    np.testing.assert_allclose(np.cov(got.T), np.cov(wanted.T), atol=0.02 * np.cov(wanted.T).max())
    # It is recoloured, not replaced: what is bright stays bright.
    assert np.corrcoef(matched.sum(2).ravel(), style.sum(2).ravel())[0, 1] > 0.5


def test_a_grey_style_is_not_blown_up_to_noise():
    grey = np.repeat(np.uint8(smooth_picture(2, 40, 40)[..., :1]), 3, axis=2)
    grey[0, 0, 0] += 1  # one pixel with a little colour
    matched = match_colours(grey, smooth_picture(1, 40, 40))
    assert matched.std() < 120
    assert np.abs(matched[0, 0].astype(int) - matched[0, 1]).max() < 60


def test_match_recolours_the_styles_and_leaves_the_result_alone():
    pictures = Pictures(smooth_picture(1, 40, 40), (smooth_picture(2, 40, 40),))
    settings = Settings(image_size=40, preserve_color="match")
    (stage,) = deepstyle.stages_of(pictures, settings)
    np.testing.assert_array_equal(stage.shown().styles[0], match_colours(pictures.styles[0], pictures.content))
    x = deepstyle.to_input_space(pictures.styles[0])
    np.testing.assert_array_equal(deepstyle.finish(x, pictures.content, settings), pictures.styles[0])


def test_luma_is_what_true_means():
    assert Settings(preserve_color=True) == Settings(preserve_color="luma")
    assert command_line().parse_args(["c", "s", "p", "--preserve_color", "luma"]).preserve_color == "luma"


def test_the_contents_colours_are_kept_where_the_color_mask_is():
    content, result = smooth_picture(1, 20, 30), smooth_picture(2, 20, 30)
    mask = np.zeros((20, 30), np.uint8)
    mask[:, 10:20], mask[:, 20:] = 128, 255
    x = deepstyle.to_input_space(result)
    kept = deepstyle.finish(x, content, Settings(preserve_color="luma"))
    picture = deepstyle.finish(x, content, Settings(preserve_color="luma"), mask)
    np.testing.assert_array_equal(picture[:, :10], result[:, :10])
    half = (kept[:, 10:20].astype(float) * 128 + result[:, 10:20].astype(float) * 127) / 255
    np.testing.assert_allclose(picture[:, 10:20], half, atol=0.51)
    np.testing.assert_array_equal(picture[:, 20:], kept[:, 20:])


def start_of(pictures, settings):
    """The picture that the painting begins with, of full size."""
    return from_input_space(deepstyle.stages_of(pictures, settings)[-1].start())


def test_a_run_can_begin_with_grey_or_with_a_picture(picture_files, tmp_path):
    content, _ = deepstyle.read_picture(picture_files[0])
    pictures = Pictures(content, (content,))
    start = start_of(pictures, Settings(init_image="gray", image_size=32))
    grey = np.asarray(Image.fromarray(content).convert("L").resize((42, 32), Image.Resampling.BILINEAR))
    for channel in range(3):
        np.testing.assert_allclose(start[..., channel].astype(int), grey, atol=1)
    settings = Settings(init_image=picture_files[1], image_size=32, weights="random", num_iter=1)
    pictures = Pictures(content, (content,), start=read_start(settings))
    start = start_of(pictures, settings)
    np.testing.assert_array_equal(start, resize(deepstyle.read_picture(picture_files[1])[0], (32, 42)))


def test_recolored_is_the_content_with_the_mixed_colours_of_the_styles():
    content, one, other = (
        smooth_picture(1, 60, 50) // 3 + 80,
        smooth_picture(2, 60, 50) // 4 + 60,
        smooth_picture(3, 60, 50),
    )
    other = other // 4 + 120
    pictures = Pictures(content, (one, other))
    settings = Settings(image_size=60, init_image="recolored", style_weight=(3.0, 1.0))
    start = start_of(pictures, settings).reshape(-1, 3).astype(float)
    mixed = np.concatenate([one.reshape(-1, 3)] * 3 + [other.reshape(-1, 3)]).astype(float)
    np.testing.assert_allclose(start.mean(0), mixed.mean(0), atol=3)  # what is clipped moves it
    np.testing.assert_allclose(np.cov(start.T), np.cov(mixed.T), atol=0.1 * np.cov(mixed.T).max())
    assert np.corrcoef(start.sum(1), content.sum(2).ravel())[0, 1] > 0.5


def test_recolored_gives_each_region_the_colours_of_its_own_style():
    content, one, other = smooth_picture(1, 40, 60), smooth_picture(2, 40, 60) // 2, smooth_picture(3, 40, 60) // 2 + 99
    left, right = np.zeros((2, 40, 60), np.uint8)
    left[:, :20], right[:, 20:40] = 255, 255
    pictures = Pictures(content, (one, other), (left, right))
    start = start_of(pictures, Settings(image_size=40, init_image="recolored"))
    for part, style in ((slice(0, 20), one), (slice(20, 40), other)):
        np.testing.assert_array_equal(start[:, part], match_colours_of_region(content[:, part], style))
    np.testing.assert_array_equal(start[:, 40:], content[:, 40:])  # where no mask is


def match_colours_of_region(region, style):
    """A part of a picture recoloured as a mask does it, which counts all pixels of the part."""
    mask = np.ones((*region.shape[:2], 1))
    return with_colours(region, colours(region, mask), colours(style))


@pytest.mark.parametrize("start", ["gray", "recolored", "style.png"])
def test_the_start_decides_what_is_painted(picture_files, tmp_path, start):
    started = start if start in ("gray", "recolored") else picture_files[1]
    assert run_quietly(picture_files, tmp_path / "a", "--num_iter", 1, "--init_image", started) == 0
    assert run_quietly(picture_files, tmp_path / "b", "--num_iter", 1) == 0
    assert np.any(pixels(tmp_path / "a_at_iteration_1.png") != pixels(tmp_path / "b_at_iteration_1.png"))


def test_stylize_takes_several_styles_and_masks(picture_files, tmp_path):
    mask = write_mask(tmp_path / "mask.png")
    assert (
        run_quietly([*picture_files, picture_files[0]], tmp_path / "a", "--style_masks", mask, mask, "--num_iter", 1)
        == 0
    )
    content, style = (deepstyle.read_picture(path)[0] for path in picture_files)
    options = {"style_masks": [np.asarray(Image.open(mask))] * 2, "weights": "random", "image_size": 32, "num_iter": 1}
    (iteration,) = deepstyle.stylize(content, [style, content], **options)
    np.testing.assert_array_equal(iteration.picture, pixels(tmp_path / "a_at_iteration_1.png"))


def test_resume_refuses_another_mask(picture_files, tmp_path, capsys):
    mask, other = write_mask(tmp_path / "mask.png"), write_mask(tmp_path / "other.png", (10, 10))
    assert run_quietly(picture_files, tmp_path / "a", "--num_iter", 1, "--content_mask", mask) == 0
    assert run_quietly(picture_files, tmp_path / "a", "--resume", "--content_mask", other) == 2
    assert "the content mask picture's SHA-256 was" in capsys.readouterr().err
    assert run_quietly(picture_files, tmp_path / "a", "--resume") == 2
    assert "cannot resume" in capsys.readouterr().err


def test_the_command_has_every_flag_that_is_not_its_default_if_it_is_0_or_false():
    falsy = {"maintain_aspect_ratio": False, "total_variation_weight": 0.0, "content_weight": 0.0}
    job = dataclasses.replace(job_of(["c.png", "s.png", "out"]), settings=Settings(**falsy))
    parsed = job_of(shlex.split(command_in(Recipe.of(job, Engine(Plan(None, 10), {})).as_text()))[2:])
    assert {name: getattr(parsed.settings, name) for name in falsy} == falsy


def test_an_animation_of_a_resumed_run_has_the_pictures_up_to_its_state(picture_files, tmp_path):
    assert run_quietly(picture_files, tmp_path / "a", "--num_iter", 2) == 0
    stale = pixels(tmp_path / "a_at_iteration_1.png")
    Image.fromarray(stale).save(tmp_path / "a_at_iteration_4.png")
    assert (
        run_quietly(picture_files, tmp_path / "a", "--num_iter", 3, "--resume", "--animation", tmp_path / "a.gif") == 0
    )
    assert Image.open(tmp_path / "a.gif").n_frames == 4  # the start, and three


@pytest.mark.parametrize("resumed", [False, True])
def test_what_another_run_wrote_is_neither_moved_nor_written_to(picture_files, tmp_path, capsys, resumed):
    log, events = tmp_path / "a.csv", tmp_path / "events"
    assert run_quietly(picture_files, tmp_path / "a", "--num_iter", 1, "--log", log, "--tensorboard", events) == 0
    before = log.read_bytes()
    assert run_quietly(picture_files, tmp_path / "b", "--num_iter", 1) == 0
    for flags in (["--log", log], ["--tensorboard", events]):
        assert run_quietly(picture_files, tmp_path / "b", *flags, *["--resume", "--num_iter", 2] * resumed) == 2
        assert "is there, and not of a run with this PREFIX" in capsys.readouterr().err
    assert log.read_bytes() == before
    assert not (tmp_path / "b_earlier_1").exists()


def test_an_earlier_runs_events_are_moved_aside(picture_files, tmp_path):
    for _ in range(2):
        assert run_quietly(picture_files, tmp_path / "a", "--num_iter", 1, "--tensorboard", tmp_path / "events") == 0
    assert len(list((tmp_path / "events").iterdir())) == 1
    assert len(list((tmp_path / "a_earlier_1").glob("events*"))) == 1


def test_a_picture_over_pillows_limit_says_how_it_was_made(picture_files, tmp_path, capsys, monkeypatch):
    assert run_quietly(picture_files, tmp_path / "a", "--num_iter", 1) == 0
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "iteration: 1" in describe(tmp_path / "a_at_iteration_1.png", capsys)

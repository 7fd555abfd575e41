"""What is written after the state, and was not: --resume makes up for it, or says that it cannot."""

import contextlib
import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import run, smooth_picture
from PIL import Image

import deepstyle
from deepstyle_app import terminal
from deepstyle_app.command import job_of
from deepstyle_app.files import Outputs
from deepstyle_app.outputs import iterations_in_events, write_animation
from deepstyle_app.ownership import RunFiles
from deepstyle_app.recipe import Recipe, read_text
from deepstyle_app.report import encoded, read_report
from deepstyle_support.engine import Engine
from deepstyle_support.images import resize, to_input_space
from deepstyle_support.memory import Plan
from deepstyle_support.rounding import computed_with

EXTRAS = {"--log": "a.csv", "--tensorboard": "events", "--report": "a.html", "--animation": "a.gif"}
COARSE = ["--image_size", "64", "--scales", "2", "--coarse_iter", "2"]


def extras(folder):
    return [part for flag, name in EXTRAS.items() for part in (flag, str(folder / name))]


def contents(folder):
    """What can be read from the files besides pictures and state, in that order: report, animation, log, events.

    What the first iteration of a coarse size improved is left out: the loss that it began with is not written.
    """
    shown, points = read_report(folder / "a.html")
    with Image.open(folder / "a.gif") as animation:
        frames = animation.n_frames
    rows = list(csv.reader((folder / "a.csv").open()))
    events = set().union(*map(iterations_in_events, (folder / "events").iterdir()))
    improved = [one.improvement if one.number > 1 else 0 for one in shown]
    told = [(one.size, one.number, one.evaluations, one.losses, one.partial) for one in shown]
    ends = {(one.size, one.evaluations): points[one.size, one.evaluations] for one in shown if one.number}
    return (told, improved, ends), frames, rows, events


@pytest.fixture
def stopped_at(monkeypatch):
    """A function that lets the next run be stopped at this evaluation."""
    received: list[int] = []
    monkeypatch.setattr("deepstyle_app.run.signals_as_requests", lambda *given: contextlib.nullcontext(received))
    evaluate, left = deepstyle.Objective.evaluate, [0]

    def count(self, x):
        left[0] -= 1
        received.extend([2] * (left[0] == 0))
        return evaluate(self, x)

    def at(number):
        received.clear()
        left[0] = number

    monkeypatch.setattr(deepstyle.Objective, "evaluate", count)
    return at


@pytest.mark.parametrize("flags", [[], COARSE])
def test_a_run_that_ended_is_given_all_that_it_did_not_write(picture_files, tmp_path, capfd, flags):
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
        assert (
            run(picture_files, tmp_path / name / "a", *flags, *(extras(tmp_path / name) if name == "with" else [])) == 0
        )
    capfd.readouterr()
    own = extras(tmp_path / "without")
    assert run(picture_files, tmp_path / "without" / "a", *flags, *own, "--resume") == 0
    said, told = capfd.readouterr()
    assert said.splitlines() == [f"saved {path}" for path in own[1::2]]
    assert told.count("\n") == 1
    made, meant = contents(tmp_path / "without"), contents(tmp_path / "with")
    for rows in (made[2], meant[2]):
        assert all(row.pop(4) for row in rows)  # the seconds
    assert made == meant
    # Then there is nothing more to make, and it is the run's own.
    before = {path: path.read_bytes() for path in (tmp_path / "without").rglob("*") if path.is_file()}
    assert run(picture_files, tmp_path / "without" / "a", *flags, *own, "--resume") == 0
    assert capfd.readouterr().out == ""
    assert before == {path: path.read_bytes() for path in before}
    assert run(picture_files, tmp_path / "without" / "a", *flags, "--overwrite", "--num_iter", 1) == 0
    assert not list((tmp_path / "without").rglob("a.*"))


def test_each_of_them_alone_is_made_and_stays_the_runs_own(picture_files, tmp_path, capfd):
    assert run(picture_files, tmp_path / "a", "--num_iter", 1) == 0
    for flag, name in EXTRAS.items():
        for said in (f"saved {tmp_path / name}\n", ""):
            capfd.readouterr()
            assert run(picture_files, tmp_path / "a", "--num_iter", 1, flag, tmp_path / name, "--resume") == 0
            assert capfd.readouterr().out == said


@pytest.mark.parametrize("goes_on", [False, True])
def test_what_a_kill_after_the_last_state_left_out_is_made(picture_files, tmp_path, monkeypatch, goes_on):
    with monkeypatch.context() as killed:
        write = Outputs._write_extras
        killed.setattr(Outputs, "_write_extras", lambda self, one, exact: one.number == 1 and write(self, one, exact))
        killed.setattr(Outputs, "finish", lambda self: [])
        assert run(picture_files, tmp_path / "a", *extras(tmp_path)) == 0
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 2
    assert run(picture_files, tmp_path / "a", *extras(tmp_path), "--resume", "--num_iter", 2 + goes_on) == 0
    (shown, _, _), frames, rows, events = contents(tmp_path)
    numbers = [1, 2, 3][: 2 + goes_on]
    assert [one[1] for one in shown] == [0, *numbers]
    assert frames == 1 + len(numbers)
    assert [row[2] for row in rows[1:]] == [str(number) for number in numbers]
    assert events == {("", number) for number in numbers}


def test_an_animation_that_found_no_room_is_made_on_resume(picture_files, tmp_path, capfd, monkeypatch):
    flags = ["--animation", tmp_path / "a.webp"]
    with monkeypatch.context() as full:
        write_whole = "deepstyle_app.outputs.write_whole"
        error = deepstyle.UserError("no room", status=1)
        full.setattr(write_whole, lambda path, write: (_ for _ in ()).throw(error))
        assert run(picture_files, tmp_path / "a", *flags) == 1
    assert "no room; what was saved before is whole" in capfd.readouterr().err
    assert run(picture_files, tmp_path / "a", *flags, "--resume") == 0
    assert Image.open(tmp_path / "a.webp").n_frames == 3


def test_events_that_are_damaged_are_written_anew_from_there(picture_files, tmp_path):
    flags = ["--tensorboard", tmp_path / "events"]
    assert run(picture_files, tmp_path / "a", *flags) == 0
    (damaged,) = (tmp_path / "events").iterdir()
    data = bytearray(damaged.read_bytes())
    at = data.index(b"loss")  # in the first iteration's event
    data[at - 10 : at + 10] = b"\xff" * 20
    damaged.write_bytes(data)
    assert run(picture_files, tmp_path / "a", *flags, "--resume") == 0
    (again,) = {*(tmp_path / "events").iterdir()} - {damaged}
    assert (iterations_in_events(damaged), iterations_in_events(again)) == (set(), {("", 1), ("", 2)})


def test_of_many_iterations_those_that_a_report_does_not_show_are_not_missed(
    picture_files, tmp_path, capfd, monkeypatch
):
    for module in ("files", "report"):
        monkeypatch.setattr(f"deepstyle_app.{module}.MAX_PICTURES", 3)
    flags = ["--report", tmp_path / "a.html", "--every", 9]
    assert run(picture_files, tmp_path / "a", *flags, "--num_iter", 5) == 0
    assert [one.number for one in read_report(tmp_path / "a.html")[0]] == [0, 2, 4, 5]
    assert run(picture_files, tmp_path / "a", *flags, "--num_iter", 6, "--resume") == 0
    assert [one.number for one in read_report(tmp_path / "a.html")[0]] == [0, 2, 4, 6]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("length", [0, 300])
def test_pictures_that_are_damaged_are_told_and_the_last_is_made_again(picture_files, tmp_path, capfd, length):
    assert run(picture_files, tmp_path / "a") == 0
    last = np.asarray(Image.open(tmp_path / "a_at_iteration_2.png")).astype(int)
    for number in (1, 2):
        path = tmp_path / f"a_at_iteration_{number}.png"
        path.write_bytes(path.read_bytes()[:length])
    flags = ["--animation", tmp_path / "a.gif", "--report", tmp_path / "a.html"]
    assert run(picture_files, tmp_path / "a", *flags, "--resume") == 0
    told = capfd.readouterr().err
    for what in ("report", "animation"):
        assert f"the {what} goes on without '{tmp_path}/a_at_iteration_1.png', which is not there" in told
    assert np.abs(np.asarray(Image.open(tmp_path / "a_at_iteration_2.png")) - last).max() <= 1
    assert Image.open(tmp_path / "a.gif").n_frames == 2
    assert [one.number for one in read_report(tmp_path / "a.html")[0]] == [0, 2]


def test_a_part_of_an_iteration_stays_in_all_files_until_it_is_whole(picture_files, tmp_path, stopped_at):
    stopped_at(9)
    assert run(picture_files, tmp_path / "a", *extras(tmp_path)) == 130
    begun = contents(tmp_path)
    assert [(one[1], one[-1]) for one in begun[0][0]] == [(0, False), (1, True)]
    assert not read_text(str(tmp_path / "a_at_iteration_1.png"))["exact"]  # nothing stops it there again
    for name in ("a.csv", "a.html", "a.gif"):
        (tmp_path / name).unlink()
    stopped_at(1)
    assert run(picture_files, tmp_path / "a", *extras(tmp_path), "--resume") == 130
    assert contents(tmp_path) == begun
    stopped_at(0)
    assert run(picture_files, tmp_path / "a", *extras(tmp_path), "--resume", "--num_iter", 1) == 0
    (shown, _, _), frames, rows, _ = contents(tmp_path)
    assert [(one[1], one[-1]) for one in shown] == [(0, False), (1, False)]
    assert (frames, len(rows)) == (2, 2)
    # A kill before the log has the whole iteration leaves the part, which is the run's own as well.
    (tmp_path / "a.csv").write_text("\n".join(map(",".join, begun[2])))
    assert run(picture_files, tmp_path / "a", *extras(tmp_path), "--resume", "--num_iter", 1) == 0
    assert contents(tmp_path)[2] == rows


def test_stopped_at_once_at_a_coarse_size_the_picture_so_far_is_there(picture_files, tmp_path, capfd, stopped_at):
    flags = [*COARSE, "--weights", "random"]
    stopped_at(9)
    assert run(picture_files, tmp_path / "a", *flags) == 130
    before = np.asarray(Image.open(tmp_path / "a_at_iteration_0.png")).astype(int)
    (tmp_path / "a_at_iteration_0.png").unlink()  # as after a kill
    capfd.readouterr()
    stopped_at(1)
    assert run(picture_files, tmp_path / "a", *flags, "--resume") == 130
    assert "stopped before anything new was found; the picture so far is saved, and" in capfd.readouterr().err
    assert np.abs(np.asarray(Image.open(tmp_path / "a_at_iteration_0.png")) - before).max() <= 1


def test_stopped_at_once_the_picture_of_a_part_is_there(picture_files, tmp_path, stopped_at):
    path = tmp_path / "a_at_iteration_1.png"
    stopped_at(9)
    assert run(picture_files, tmp_path / "a") == 130
    before = np.asarray(Image.open(path)).astype(int)
    path.unlink()
    stopped_at(1)
    assert run(picture_files, tmp_path / "a", "--resume") == 130
    assert np.abs(np.asarray(Image.open(path)) - before).max() <= 1


def test_iterations_that_a_coarse_size_never_had_are_not_missed(picture_files, tmp_path, capfd):
    nothing = [part for what in ("content", "style", "total_variation") for part in (f"--{what}_weight", "0")]
    flags = [*COARSE, *nothing, "--animation", tmp_path / "a.gif", "--report", tmp_path / "a.html"]
    assert run(picture_files, tmp_path / "a", *flags) == 0
    assert (tmp_path / "a_at_32x42_iteration_1.png").exists()
    assert run(picture_files, tmp_path / "a", *flags, "--resume") == 0
    assert capfd.readouterr().err == ""


def test_the_picture_so_far_is_that_of_the_state_after_a_kill_too(picture_files, tmp_path, stopped_at):
    flags = [*COARSE, "--weights", "random"]
    stopped_at(9)
    assert run(picture_files, tmp_path / "a", *flags) == 130
    older = (tmp_path / "a_at_iteration_0.png").read_bytes()
    stopped_at(30)
    assert run(picture_files, tmp_path / "a", *flags, "--resume") == 130
    before = np.asarray(Image.open(tmp_path / "a_at_iteration_0.png")).astype(int)
    (tmp_path / "a_at_iteration_0.png").write_bytes(older)  # as if it had been killed
    stopped_at(1)
    assert run(picture_files, tmp_path / "a", *flags, "--resume") == 130
    assert np.abs(np.asarray(Image.open(tmp_path / "a_at_iteration_0.png")) - before).max() <= 1


def state(size, losses, partial=False):
    return deepstyle.State(np.zeros((*size, 3)), (deepstyle.Losses(1.0, 1.0, 1.0, 1.0),) * losses, 20, partial)


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (None, "stopped before anything was found; nothing is saved yet, and the same command begins again"),
        (state((16, 16), 2), "stopped before anything new was found; the picture so far is saved, and"),
        (state((32, 32), 3), "stopped before anything new was found; iteration 2 is saved, and"),
        (state((32, 32), 1, True), "stopped before anything new was found; iteration 1 is saved, and"),
    ],
)
def test_a_stop_says_what_is_saved(before, said):
    assert terminal.describe_stop(None, before, (32, 32)).startswith(said)


@pytest.mark.parametrize("kind", ["gif", "webp", "mp4"])
def test_an_animation_is_of_a_run_that_has_a_state(tmp_path, kind):
    job = job_of(["c.png", "s.png", f"{tmp_path}/a", "--animation", f"{tmp_path}/a.{kind}", "--image_size", "32"])
    pictures = deepstyle.Pictures(smooth_picture(1, 32, 32), (smooth_picture(2, 32, 32),))
    outputs = Outputs(RunFiles.of(job), deepstyle.stages_of(pictures, job.settings), {}, None, pytest.fail)
    outputs.begin(Recipe.of(job, Engine(Plan(None, 10), {})))
    assert outputs.finish() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["gif", "webp", "mp4"])
def test_an_animation_of_one_frame_can_be_made_and_says_whose_it_is(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    write_animation(path, [np.zeros((32, 42, 3), np.uint8)], "deepstyle 0123")
    assert b"deepstyle 0123" in path.read_bytes()


def test_an_animation_that_ffmpeg_does_not_make_is_one_error(tmp_path):
    with pytest.raises(deepstyle.UserError, match="FFmpeg gives nothing") as caught:
        write_animation(tmp_path / "a.mp4", [np.zeros((2, 16386, 3), np.uint8)], "")
    assert caught.value.status == 1


def as_by_an_earlier_version(path: Path):
    with np.load(path) as file:
        held = {name: file[name] for name in file if name not in ("run", "log")}
    np.savez(path, **held)


def test_what_an_earlier_versions_state_does_not_tell_is_said(picture_files, tmp_path, capfd):
    assert run(picture_files, tmp_path / "a", "--num_iter", 1) == 0
    as_by_an_earlier_version(tmp_path / "a_state.npz")
    capfd.readouterr()
    assert run(picture_files, tmp_path / "a", *extras(tmp_path), "--num_iter", 1, "--resume") == 0
    told = "an earlier version wrote the state, which does not tell the losses before at each layer"
    assert capfd.readouterr().err.count(told) == 1
    assert not (tmp_path / "a.csv").exists()
    assert Image.open(tmp_path / "a.gif").n_frames == 2
    assert run(picture_files, tmp_path / "a", *extras(tmp_path), "--resume") == 0
    assert [row.split(",")[2] for row in (tmp_path / "a.csv").read_text().splitlines()] == ["iteration", "2"]
    assert run(picture_files, tmp_path / "a", *extras(tmp_path), "--num_iter", 3, "--resume") == 0
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 3


def test_an_earlier_versions_animation_stays_as_it_is(picture_files, tmp_path):
    assert run(picture_files, tmp_path / "a", "--every", 9, "--animation", tmp_path / "a.gif") == 0
    as_by_an_earlier_version(tmp_path / "a_state.npz")
    assert run(picture_files, tmp_path / "a", "--animation", tmp_path / "a.gif", "--resume") == 0
    assert Image.open(tmp_path / "a.gif").n_frames == 3  # of which one picture was not saved


def test_an_earlier_versions_animation_is_gone_on_with(picture_files, tmp_path):
    assert run(picture_files, tmp_path / "a", "--animation", tmp_path / "a.gif") == 0
    as_by_an_earlier_version(tmp_path / "a_state.npz")
    assert run(picture_files, tmp_path / "a", "--animation", tmp_path / "a.gif", "--resume", "--num_iter", 3) == 0
    assert Image.open(tmp_path / "a.gif").n_frames == 4


# What the version before the command had modules of its own wrote of a run like those above, but with a curvature.
SHAPED_BY = {
    "--image_size": "32",
    "--maintain_aspect_ratio": "True",
    "--init_image": "content",
    "--preserve_color": "False",
    "--rescale_image": "False",
    "--rescale_method": "bilinear",
    "--content_weight": "0.025",
    "--content_layer": "conv5_2",
    "--content_loss_type": "0",
    "--style_weight": "1.0",
    "--style_scale": "1.0",
    "--style_size": "0",
    "--style_fit": "stretch",
    "--style_layers": "conv1_1 conv2_1 conv3_1 conv4_1 conv5_1",
    "--style_layer_weights": "1.0",
    "--total_variation_weight": "1e-05",
    "--model": "vgg16",
    "--pool_type": "ave",
    "--padding": "zeros",
    "--scales": "1",
    "--coarse_iter": "5",
    "--seed": "0",
}
LOSSES = [[900.0, 0.0, 700.0, 200.0], [500.0, 100.0, 300.0, 100.0]]  # at the start, and after the first iteration
COLUMNS = "rows,columns,iteration,evaluations,seconds,loss,content conv5_2,style conv1_1,style conv2_1,style conv3_1,"
LOG = [f"{COLUMNS}style conv4_1,style conv5_1,total variation", "32,42,1,20,1.5,500.0,100.0,60,60,60,60,60,100.0"]
OLD_RUN = "0123456789abcdef0123456789abcdef"
OLD_PAGE = """<!doctype html>
<html lang="en">
<meta name="deepstyle-run" content="{run}">
<figure class="iteration" data-place="0.0" hidden>
<img src="data:image/webp;base64,{picture}" alt="the picture, the start">
</figure>
<figure class="iteration" data-place="100.0">
<img src="data:image/webp;base64,{picture}" alt="the picture, iteration 1 of 1">
</figure>
<script type="application/json" id="saved">{saved}</script>
</html>"""


def digest_of(*held):
    digest = hashlib.sha256()
    for one in held:
        digest.update(one)
    return digest.hexdigest()


def written_by_the_version_before(folder, inputs, weights, computed):
    """Write the state, the log and the report of a first iteration; returns what the state holds.

    computed: all that decides how sums are rounded, in words.
    """
    pictures = [np.asarray(Image.open(path)) for path in inputs]
    start = resize(pictures[0], (32, 42))
    shaped_by = dict(SHAPED_BY)
    for name, picture in zip(("content", "style"), pictures, strict=True):
        shaped_by[f"the {name} picture's SHA-256"] = digest_of(repr(picture.shape).encode(), picture.tobytes())
    shaped_by["the weights' SHA-256"] = digest_of(*(array.tobytes() for pair in weights.values() for array in pair))
    step = np.full((32, 42, 3), 0.001, np.float32)
    state = {
        "x": to_input_space(start).astype(np.float32),
        "losses": np.array(LOSSES),
        "iteration": 1,
        "evaluations": 20,
        "partial": False,
        "shaped_by": json.dumps(shaped_by),
        "extras": json.dumps(["a.csv", "a.html"]),
        "base": str(folder / "a"),
        "run": OLD_RUN,
        "log": np.frombuffer("\n".join(LOG).encode(), np.uint8),
        "way": f"device with 10 corrections, tile None, {computed}",
        "step_0": step,
        "change_0": 1000 * step,
        "by_changes": np.array([[[1e-3]], [[1.0]]]) * step.size,
        "by_gradient": np.zeros((2, 1)),
    }
    np.savez(folder / "a_state.npz", **state)
    (folder / "a.csv").write_text("\n".join([*LOG, ""]))
    shown: list[dict] = [
        {"number": 0, "evaluations": 0, "losses": [], "improvement": 0.0, "seconds": 0.0},
        {"number": 1, "evaluations": 20, "losses": LOSSES[1], "improvement": 44.4, "seconds": 1.5},
    ]
    points = [[32, 42, count, *losses] for count, losses in ((1, LOSSES[0]), (9, [600.0] * 4), (20, LOSSES[1]))]
    shown = [one | {"size": [32, 42], "partial": False, "picture": ""} for one in shown]
    saved = json.dumps({"points": points, "shown": shown})
    (folder / "a.html").write_text(OLD_PAGE.format(run=OLD_RUN, picture=encoded(start, 42), saved=saved))
    return state


@pytest.mark.parametrize("same", [True, False], ids=["computed alike", "computed otherwise"])
def test_what_the_version_before_wrote_is_gone_on_with(picture_files, tmp_path, capfd, untrained, same):
    computed = ", ".join(computed_with("tensorflow", deepstyle.__version__).values())
    state = written_by_the_version_before(tmp_path, picture_files, untrained, computed if same else "elsewhere")
    before = read_report(tmp_path / "a.html")
    assert [one.number for one in before[0]] == [0, 1]
    flags = ["--optimizer", "device", "--log", tmp_path / "a.csv", "--report", tmp_path / "a.html"]
    assert run(picture_files, tmp_path / "a", *flags, "--resume") == 0
    said, told = capfd.readouterr()
    assert said.startswith("going on after iteration 1\n")
    assert told == ""
    shown, points = read_report(tmp_path / "a.html")
    assert [one.number for one in shown] == [0, 1, 2]
    assert shown[:2] == before[0]
    assert {key: points[key] for key in before[1]} | {((32, 42), 20): LOSSES[1]} == before[1]
    rows = (tmp_path / "a.csv").read_text().splitlines()
    assert rows[:2] == LOG
    assert [row.split(",")[2:4] for row in rows[2:]] == [["2", "40"]]
    text = read_text(str(tmp_path / "a_at_iteration_2.png"))
    assert text["exact"] is same
    assert text["the weights' SHA-256"] == json.loads(state["shaped_by"])["the weights' SHA-256"]
    # It is written as that version wrote it, with more besides, and that version can go on with it as well.
    with np.load(tmp_path / "a_state.npz") as now:
        added = {name for name in now if name.startswith(("step_", "change_"))}
        assert {*now} - added - {"in_full", "rounded"} == {*state} - {"step_0", "change_0"}
        assert {"step_0", "change_0"} <= added
        for name in ("shaped_by", "extras", "base", "run"):
            assert str(now[name]) == state[name]
        assert str(now["way"]) == (state["way"] if same else "")
        np.testing.assert_array_equal(now["losses"][:2], LOSSES)

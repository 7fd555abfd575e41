"""Whose file it is: what PREFIX means, what a run may write where, and what of an earlier one is its own."""

import os

import numpy as np
import pytest

from deepstyle import Losses, State
from deepstyle_app.ownership import RunFiles, base_path
from deepstyle_app.state import Record, Saved, write_state
from deepstyle_support.messages import UserError

SAVED = Saved(State(np.zeros((4, 5, 3)), (Losses(1.0, 1.0, 1.0, 1.0),) * 2, 20), {})
ROWS = ["rows,columns,iteration,evaluations,seconds,loss", "4,5,1,9,0.123,7.5", "4,5,1,20,0.456,6.5"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def left(base, record):
    """The files of a run that wrote what the record says."""
    write_state(base.with_name(f"{base.name}_state.npz"), base, SAVED, record)
    return RunFiles(base)


def test_a_prefix_means_the_run_that_there_is_whatever_folder_came_later(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(base_path("a")) == "a"
    os.mkdir("a")
    assert str(base_path("a")) == "a/result_image"
    (tmp_path / "a_state.npz").touch()
    assert str(base_path("a")) == "a"
    assert str(base_path("a/")) == "a/result_image"
    assert str(base_path(".")) == "result_image"


def test_a_prefix_means_the_run_that_has_begun(tmp_path):
    with RunFiles(tmp_path / "a", report=tmp_path / "a" / "a.html").owned():
        assert (tmp_path / "a").is_dir()
        assert base_path(str(tmp_path / "a")) == tmp_path / "a"
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "extras",
    [
        {"log": "x.csv", "tensorboard": "x.csv"},
        {"log": "sub/../x.csv", "tensorboard": "./x.csv"},
        {"log": "link/x.csv", "tensorboard": "x.csv"},
        {"report": "x.html", "log": "x.html/x.csv"},
        {"animation": "x.gif", "tensorboard": "x.gif/events"},
        {"tensorboard": "a_at_iteration_3.png"},
        {"tensorboard": "a_at_32x42_iteration_3.png"},
        {"log": "a_state.npz/x.csv"},
        {"report": "lost.html"},
        {"report": "loop.html"},
        {"log": "lost/x.csv"},
        {"tensorboard": "lost"},
        {"log": "pipe.csv"},
        {"tensorboard": "pipe.csv"},
    ],
)
def test_files_in_each_others_way_are_refused_in_any_spelling(tmp_path, monkeypatch, extras):
    monkeypatch.chdir(tmp_path)
    for link, to in (("link", "."), ("lost.html", "none/x.html"), ("loop.html", "loop.html"), ("lost", "none")):
        (tmp_path / link).symlink_to(to)
    os.mkfifo("pipe.csv")
    before = names(tmp_path)
    with pytest.raises(UserError) as caught:
        RunFiles(base_path("a"), **{name: tmp_path / path for name, path in extras.items()}).check([], (32, 32))
    assert caught.value.status == 2
    assert "no permission" not in str(caught.value)
    assert names(tmp_path) == before


@pytest.mark.parametrize("prefix", ["new/../a", "./new/../a", "there/new/../../a", "new/../"])
def test_a_path_back_from_a_folder_that_is_not_there_is_refused(tmp_path, monkeypatch, prefix):
    monkeypatch.chdir(tmp_path)
    os.mkdir("there")
    with pytest.raises(UserError, match=r"cannot make the folder '.*\.\.': there is no '(there/)?new'"):
        RunFiles(base_path(prefix)).check([], (32, 32))
    RunFiles(base_path("there/../other/a")).check([], (32, 32))


def test_a_prefix_below_a_log_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--log is .* where PREFIX needs another"):
        RunFiles(tmp_path / "x.csv" / "a", log=tmp_path / "x.csv").check([], (32, 32))


@pytest.mark.parametrize(
    "extras",
    [
        {"tensorboard": "."},
        {"tensorboard": "a"},
        {"tensorboard": "events", "log": "events/x.csv", "report": "events/x.html"},
        {"log": "new/x.csv", "report": "new/x.html", "animation": "new/x.gif"},
    ],
)
def test_files_that_are_in_nobodys_way_are_not(tmp_path, monkeypatch, extras):
    monkeypatch.chdir(tmp_path)
    files = RunFiles(base_path("a"), **{name: tmp_path / path for name, path in extras.items()})
    files.check([], (32, 32))
    with files.owned():
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["a_at_iteration_5.png", "a_state.npz"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_neither_moved_nor_read_as_one(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}' is no file; a run with this PREFIX would write there"):
        RunFiles(tmp_path / "a").check([], (32, 32))


@pytest.mark.parametrize(
    ("name", "size", "fits"),
    [
        ("a.webp", (32, 16383), True),
        ("a.webp", (16384, 32), False),
        ("a.gif", (65535, 32), True),
        ("a.gif", (32, 65536), False),
        ("a.mp4", (16384, 32), True),
        ("a.mp4", (32, 16385), False),
        ("a.mp4", (16384, 16384), False),
    ],
)
def test_an_animation_that_would_be_too_large_is_refused_at_the_start(tmp_path, name, size, fits):
    files = RunFiles(tmp_path / "a", animation=tmp_path / name)
    if fits:
        files.check([], size)
    else:
        with pytest.raises(
            UserError, match=rf"a {name[1:]} file has at most .* the pictures have {size[0]} x {size[1]}"
        ):
            files.check([], size)


def test_two_files_of_one_name_are_moved_aside_beside_each_other(tmp_path):
    record = Record(rows=ROWS)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        record.extras.append(tmp_path / folder / "log.csv")
        record.extras[-1].write_text(f"{folder}\n{ROWS[2]}\n")
    assert "moved 3 files" in left(tmp_path / "a", record).clear_the_way(overwrite=False)
    moved = tmp_path / "a_earlier_1"
    assert names(moved) == ["a_state.npz", "log.csv", "log_2.csv"]
    assert [(moved / name).read_text()[:3] for name in ("log.csv", "log_2.csv")] == ["one", "two"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_has_taken_the_place_of_a_runs_file_is_left_alone(tmp_path, overwrite):
    record = Record(rows=ROWS)
    for name, held in (("a.csv", "4,5,1,20,0.9,6.6"), ("a.html", f"deepstyle {Record().run}"), ("a.gif", record.run)):
        record.extras.append(tmp_path / name)
        record.extras[-1].write_text(held)
    files = left(tmp_path / "a", record)
    files.clear_the_way(overwrite)
    assert {"a.csv", "a.html"} <= {*names(tmp_path)}
    assert "a.gif" not in names(tmp_path)


@pytest.mark.parametrize("held", ["", "\n".join(ROWS[:2]), f"{ROWS[0]}\r\n{ROWS[2]}\r\n", "1,20,0.456,6.5"])
def test_a_log_is_a_runs_own_with_any_of_its_rows(tmp_path, held):
    record = Record(rows=ROWS, extras=[tmp_path / "a.csv"])
    record.extras[0].write_text(held)
    files = left(tmp_path / "a", record)
    files.log = tmp_path / "a.csv"
    files.check_extras_are_ours()


def test_what_a_state_does_not_tell_is_known_by_its_path(tmp_path):
    (tmp_path / "a.csv").write_text("mine")
    files = left(tmp_path / "a", Record(run="", extras=[tmp_path / "a.csv"]))
    files.log = tmp_path / "a.csv"
    files.check_extras_are_ours()


def test_a_damaged_state_is_why_nobody_knows_whose_a_file_is(tmp_path):
    (tmp_path / "a.csv").write_text(ROWS[2])
    files = left(tmp_path / "a", Record(rows=ROWS, extras=[tmp_path / "a.csv"]))
    files.log = tmp_path / "a.csv"
    files.check_extras_are_ours()
    files.state_path.write_bytes(files.state_path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"a_state.npz' is damaged, and cannot tell whether '.*a.csv' is of a run"):
        files.check_extras_are_ours()
    files.state_path.unlink()
    with pytest.raises(UserError, match=r"a.csv' is there, and not of a run with this PREFIX"):
        files.check_extras_are_ours()


def test_files_that_cannot_be_moved_are_told_before_any_is(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    record = Record(extras=[tmp_path / "logs" / "a.csv"])
    record.extras[0].touch()
    files = left(tmp_path / "a", record)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "logs")  # root may write everywhere
    with pytest.raises(UserError, match="is an earlier run's, and cannot be moved: no permission in its folder"):
        files.clear_the_way(overwrite=True)
    assert names(tmp_path) == ["a_state.npz", "logs"]

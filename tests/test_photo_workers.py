"""Many pictures by several workers: each is what it would be alone, and what happens to a worker loses nothing."""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import frail
import numpy as np
import psutil
import pytest
from conftest import SMALL, STARTED_FOR, describe, for_scripts, left_of, pixels, smooth_picture, wait_for
from PIL import Image

from deepstyle_app import batch, locks, photo_workers
from deepstyle_app import crew as crews
from deepstyle_app.command import job_of, main
from deepstyle_app.folder import groups_of
from deepstyle_app.photo_workers import PhotoWorker
from deepstyle_app.recipe import program
from deepstyle_app.terminal import SAME_STOP
from deepstyle_support.limits import usable_cores
from deepstyle_support.memory import RAY
from deepstyle_support.messages import UserError

pytestmark = pytest.mark.xdist_group("ray")  # which is started once

LAST = "result_image_at_iteration_2.png"
NAMES = ["a.jpg", "b.jpg", "c.png"]
UNTRAINED = "RANDOM weights, untrained: the picture will be no style transfer"


def save(path, seed=1, rows=48, columns=64):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(smooth_picture(seed, rows, columns)).save(path, format="PNG")


@pytest.fixture
def photos(tmp_path):
    """A folder of three photos, one of another shape, and a style beside it."""
    save(tmp_path / "photos" / "a.jpg", 1)
    save(tmp_path / "photos" / "b.jpg", 3)
    save(tmp_path / "photos" / "c.png", 4, 60, 56)
    save(tmp_path / "style.png", 2, 50, 40)
    return tmp_path / "photos"


def command(content, *flags, out="out", style="style.png"):
    base = content.parent if content.is_dir() else content.parent.parent
    return [str(content), str(base / style), f"{base}/{out}/", *SMALL, "--image_size", "36", *map(str, flags)]


@pytest.fixture(scope="module")
def crew(untrained, tmp_path_factory):
    """Two workers, of which Ray's start and the loading of TensorFlow take most of this file's time."""
    import ray

    pair, folder = crews.Crew(2), tmp_path_factory.mktemp("plans")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv(frail.FOLDER, str(folder))
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setattr(crews, "usable_cores", lambda: 2)
        pair.begin()
        given = 4e9, 1, os.getcwd(), "deepstyle"
        pair.employ(frail.FrailWorker, ray.put(untrained), *given, calls_at_once=2)
    pair.plans = folder
    yield pair
    pair.end()


def all_ready(crew):
    while len(crew.free) < crew.number:
        crew.next_done()


def forget_stops(crew):
    """Let workers that were asked to stop paint again, for which nobody asks them in life."""
    import ray

    ray.get([worker.__ray_call__.remote(lambda itself: itself.received.clear()) for worker in crew.free])


@pytest.fixture
def paint(crew, photos, monkeypatch):
    """The command in this process, for the folder of photos or what else is named, with those workers."""
    all_ready(crew)
    crew.deaths = 0
    forget_stops(crew)
    for left in crew.plans.iterdir():
        left.unlink()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(crews, "usable_cores", lambda: 2)
    monkeypatch.setattr(photo_workers, "crew_for", lambda number: crew)
    monkeypatch.setattr(crew, "begin", lambda: "two workers")
    monkeypatch.setattr(crew, "end", lambda: None)
    return lambda *flags, content=photos, **places: main(command(content, *flags, "--workers", "2", **places))


def journal(crew, photo):
    """The moments of a photo that came, in all workers."""
    lines = (crew.plans / "journal").read_text().splitlines()
    return [line.removeprefix(f"{photo} ") for line in lines if line.startswith(f"{photo} ")]


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def state_of(results):
    with np.load(results / "result_image_state.npz") as state:
        return {name: state[name] for name in ("x", "losses", "iteration", "partial", "evaluations")}


def assert_same(results, alone):
    """All pictures, and the state, are the same bit for bit."""
    assert names(results) == names(alone)
    for picture in results.glob("*.png"):
        np.testing.assert_array_equal(pixels(picture), pixels(alone / picture.name))
    states = state_of(results), state_of(alone)
    for name in states[0]:
        np.testing.assert_array_equal(states[0][name], states[1][name])


def assert_is_whole(results):
    """The state and all pictures up to it can be read, and nothing half-written is left. Returns the iterations."""
    state = state_of(results)
    done = int(state["iteration"]) + int(state["partial"])
    assert done >= 1
    assert np.isfinite(state["x"]).all()
    for number in range(1, done + 1):
        pixels(results / f"result_image_at_iteration_{number}.png")
    assert not list(results.glob(".*"))
    return done


def test_each_photo_gets_the_pictures_that_it_would_get_alone(paint, photos, tmp_path, capfd):
    assert paint() == 0
    out, err = capfd.readouterr()
    assert err == ""
    first, weights, *lines = out.splitlines()
    assert (first, weights) == ("painting 3 photos on two workers", UNTRAINED)
    assert len(lines) == 3
    for number, name in enumerate(NAMES, 1):
        how = rf"{number}/3 {name}: loss \S+, \d+\.\d s, {tmp_path}/out/{name}/{LAST}"
        assert [line for line in lines if re.fullmatch(how, line)]
        assert main(command(photos / name, out=f"alone/{name}")) == 0
        assert_same(tmp_path / "out" / name, tmp_path / "alone" / name)


def test_all_pairs_of_photos_and_styles_are_made_and_a_sheet_of_them_while_it_goes_on(
    paint, photos, tmp_path, capfd, monkeypatch
):
    save(tmp_path / "styles" / "wave.png", 2, 50, 40)
    save(tmp_path / "styles" / "dots.png", 4, 44, 60)
    (tmp_path / "styles" / "notes.txt").write_text("no picture")
    (photos / "c.png").unlink()
    written, write = [], batch.write_index

    def write_index(path, title, cards, *said):
        write(path, title, cards, *said)
        written.append(sum(card is not None for card in cards.values()))

    monkeypatch.setattr(batch, "write_index", write_index)
    assert paint("--report", "sheet.html", style="styles") == 1
    fails, counted, failed = capfd.readouterr().err.splitlines()
    assert fails.startswith("deepstyle: notes.txt fails: ")
    assert counted == "deepstyle: 4 of 6 pictures are done; the same command with --resume does what is not"
    assert failed.startswith("deepstyle: failed: notes.txt: ")
    assert written == [2, 3, 4, 5, 6]  # with the two that had failed before
    pairs = [(photo, style) for photo in NAMES[:2] for style in ("dots.png", "wave.png")]
    page = (tmp_path / "out" / "sheet.html").read_text()
    assert "4 of 6 pictures done, 2 failed" in page
    for photo, style in pairs:
        assert f'href="{photo}/{style}/sheet.html"' in page
        assert (tmp_path / "out" / photo / style / LAST).exists()
    pair = tmp_path / "out" / "b.jpg" / "wave.png" / LAST
    # Its report says the command by the name that it has here.
    assert re.search(rf">deepstyle {photos}/b.jpg ", (pair.parent / "sheet.html").read_text())
    assert main(command(photos / "b.jpg", out="alone", style="styles/wave.png")) == 0
    np.testing.assert_array_equal(pixels(pair), pixels(tmp_path / "alone" / LAST))


def test_a_photo_that_fails_and_one_whose_disk_is_full_stop_no_other_and_stand_on_the_sheet(
    paint, crew, photos, tmp_path, capfd
):
    (photos / "notes.txt").write_text("no picture")
    (photos / "cut.png").write_bytes((photos / "a.jpg").read_bytes()[:400])
    save(photos / "tall.png", 1, 400, 9)
    (crew.plans / "b.jpg saving 2").write_text("full disk")
    assert paint("--report", "sheet.html") == 1
    err = capfd.readouterr().err
    at_the_end = err.split("2 of 6 photos are done; the same command with --resume does what is not\n")[1]
    failed = {line.split(": ")[2]: line for line in at_the_end.splitlines()}
    assert list(failed) == ["b.jpg", "cut.png", "notes.txt", "tall.png"]
    full = failed["b.jpg"]
    assert f"cannot write '{tmp_path}/out/b.jpg/result_image_state.npz': File too large; what was saved before" in full
    assert full.endswith("make room, and the same command with --resume goes on from there")
    assert assert_is_whole(tmp_path / "out" / "b.jpg") == 1
    page = (tmp_path / "out" / "sheet.html").read_text()
    assert "make room" in page
    assert "2 of 6 photos done, 4 failed" in page
    for name in ("notes.txt", "cut.png", "tall.png"):
        (photos / name).unlink()
    assert paint("--resume", "--report", "sheet.html") == 0
    assert journal(crew, "b.jpg") == ["begins", "saving 1", "saved 1", "saving 2", "begins", "saving 2", "saved 2"]
    assert journal(crew, "a.jpg").count("saved 2") == 1
    out, err = capfd.readouterr()
    assert [line.split(", ")[1] for line in out.splitlines()[1:]].count("done before") == 2
    assert err == ""


def test_what_cannot_be_read_any_more_when_its_turn_comes_is_a_failure_and_stands_on_the_sheet(
    paint, photos, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(batch.Batch, "check_results", lambda *given: 1 / 0)
    assert paint("--report", "sheet.html") == 1
    assert capfd.readouterr().err.count("fails: ZeroDivisionError") == 3
    assert (tmp_path / "out" / "sheet.html").read_text().count("ZeroDivisionError") == 3


def test_a_picture_whose_worker_dies_is_taken_over_once_from_what_it_saved_itself(paint, crew, photos, tmp_path, capfd):
    # The first worker of b.jpg dies before it begins: what is there then is an earlier command's.
    assert main(command(photos / "b.jpg", "--num_iter", "1", out="out/b.jpg")) == 0
    capfd.readouterr()
    others = " ".join(f"{tmp_path}/out/{name}/{LAST}" for name in ("a.jpg", "c.png"))
    # The second death is what comes last, so that nothing else puts it on the sheet.
    for moment, what in {"a.jpg saved 1": "", "b.jpg begins": "", "b.jpg saving 2": others}.items():
        (crew.plans / moment).write_text(f"death {what}")
    assert paint("--report", "sheet.html") == 1
    out, err = capfd.readouterr()
    taken = [f"deepstyle: {which}: its worker died; another one takes it over" for which in ("1/3 a.jpg", "2/3 b.jpg")]
    why = "two workers have died of it; --debug without --workers may show why"
    *during, counted, failed = err.splitlines()
    assert sorted(during) == [*taken, f"deepstyle: b.jpg fails: {why}"]  # and nothing of Ray's
    assert counted == "deepstyle: 2 of 3 photos are done; the same command with --resume does what is not"
    assert failed == f"deepstyle: failed: b.jpg: {why}"
    assert sorted(line.split(": ")[0] for line in out.splitlines()[2:]) == ["1/3 a.jpg", "3/3 c.png"]
    assert journal(crew, "a.jpg") == ["begins", "saving 1", "saved 1", "begins", "saving 2", "saved 2"]
    assert journal(crew, "b.jpg") == ["begins", "begins", "saving 1", "saved 1", "saving 2"]
    assert names(tmp_path / "out" / "b.jpg" / "result_image_earlier_1") == [
        "result_image_at_iteration_1.png",
        "result_image_state.npz",
    ]
    assert state_of(tmp_path / "out" / "b.jpg")["iteration"] == 1
    assert why in (tmp_path / "out" / "sheet.html").read_text()
    assert paint("--resume", "--report", "sheet.html") == 0
    assert journal(crew, "b.jpg")[5:] == ["begins", "saving 2", "saved 2"]
    assert all(assert_is_whole(tmp_path / "out" / name) == 2 for name in NAMES)


def test_what_a_worker_that_died_had_begun_to_replace_is_replaced_and_not_moved_aside(paint, crew, tmp_path, capfd):
    assert paint() == 0
    (crew.plans / "a.jpg saving 1").write_text("death")
    capfd.readouterr()
    assert paint("--overwrite") == 0
    assert "1/3 a.jpg: its worker died" in capfd.readouterr().err
    assert names(tmp_path / "out" / "a.jpg") == names(tmp_path / "out" / "b.jpg")


def test_without_any_worker_left_it_is_one_line_and_what_was_saved_is_whole(paint, crew, tmp_path, monkeypatch, capfd):
    import ray

    start, next_done = crew.start, crew.next_done

    def still_born():
        worker = start()
        ray.kill(worker)
        return worker

    def die_when_both_have_saved(seconds):
        paths = [tmp_path / "out" / name / "result_image_state.npz" for name in NAMES[:2]]
        if all(path.exists() for path in paths) and crew.start == start:
            for worker in [*crew.free, *(worker for worker, _ in crew.busy.values())]:
                ray.kill(worker)
            crew.start = still_born
        return next_done(seconds)

    monkeypatch.setattr(crew, "next_done", die_when_both_have_saved)
    try:
        assert paint("--num_iter", "100000", "--every", "10") == 1
    finally:
        monkeypatch.undo()
        crew.start, crew.deaths = start, 0
        while len(crew.busy) + len(crew.free) < crew.number:
            crew.add()
    *taken, error = capfd.readouterr().err.splitlines()
    assert all("its worker died; another one takes it over" in line for line in taken)
    assert re.fullmatch(r"deepstyle: error: no worker is left: 7 died one after another; .*", error)
    for name in NAMES[:2]:
        assert state_of(tmp_path / "out" / name)["iteration"] >= 1
    assert names(tmp_path / "out") == NAMES[:2]


@pytest.fixture
def heeded():
    """SIGINT and SIGTERM as at a terminal, whoever runs the tests."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("moment", ["saving 1", "saved 2"])
@pytest.mark.parametrize(("sent", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stop_saves_the_pictures_that_are_painted_and_any_number_of_workers_goes_on(
    heeded, paint, crew, photos, tmp_path, monkeypatch, capfd, sent, status, moment
):
    other = tmp_path / "out" / "a.jpg" / "result_image_state.npz"
    (crew.plans / f"b.jpg {moment}").write_text(f"{sent} {os.getpid()} {other}")
    assert paint("--num_iter", "100000", "--every", "10") == status
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 2  # that it begins
    *said, counted = err.splitlines()
    assert counted == "deepstyle: 0 of 3 photos are done; the same command with --resume does what is not"
    assert sorted(line.split(": ")[1] for line in said) == ["1/3 a.jpg", "2/3 b.jpg"]
    assert names(tmp_path / "out") == NAMES[:2]
    for name in NAMES[:2]:
        part = state_of(tmp_path / "out" / name)
        number = part["iteration"] + part["partial"]
        pixels(tmp_path / "out" / name / f"result_image_at_iteration_{number}.png")
        kind = r" within iteration \d+; its picture so far" if part["partial"] else rf"; iteration {number}"
        assert re.search(rf"{name}: stopped{kind} is saved, and the same command with --resume goes on", err)
        assert not list((tmp_path / "out" / name).glob(".*"))
    goal = max(int(state_of(tmp_path / "out" / name)["iteration"]) for name in NAMES[:2]) + 1
    flags = ["--num_iter", goal, "--every", "10", "--resume"]
    crew_of_three = command(photos, *flags, "--workers", "3")
    assert main(crew_of_three) == 2
    assert capfd.readouterr().err == "deepstyle: error: --workers is 3; this machine has 2 CPU cores for them\n"
    forget_stops(crew)
    assert paint(*flags) == 0
    assert capfd.readouterr().err == ""
    moments = [line for line in (crew.plans / "journal").read_text().splitlines() if "saved" in line]
    for name in NAMES:
        state = state_of(tmp_path / "out" / name)
        assert (state["iteration"], state["partial"]) == (goal, False)
        # A part of an iteration has its number, and was gone on with.
        assert len({one for one in moments if one.startswith(name)}) == goal
    for workers in ("1", "2"):
        assert (paint if workers == "2" else lambda *given: main(command(photos, *given)))(*flags) == 0
        lines = capfd.readouterr().out.splitlines()[2:]
        assert [line.split(", ")[1] for line in lines] == ["done before"] * 3
    assert [line for line in (crew.plans / "journal").read_text().splitlines() if "saved" in line] == moments


def test_a_picture_whose_worker_dies_of_the_stop_is_said_and_nobody_takes_it_over(paint, crew, tmp_path, capfd):
    state = tmp_path / "out" / "a.jpg" / "result_image_state.npz"
    (crew.plans / "b.jpg saved 1").write_text(f"SIGTERM {os.getpid()} {state} death")
    assert paint("--num_iter", "100000", "--every", "10") == 143
    err = capfd.readouterr().err
    assert "deepstyle: 1/3 a.jpg: stopped" in err
    assert "deepstyle: 2/3 b.jpg: its worker died; --resume goes on from what it has saved\n" in err
    assert "another one" not in err


def test_of_two_commands_at_once_the_second_is_refused_before_ray_is_started(paint, crew, tmp_path, monkeypatch, capfd):
    (tmp_path / "out").mkdir()
    with locks.lock_of(tmp_path / "out" / "photos"), monkeypatch.context() as patch:
        patch.setattr(crew, "begin", lambda: pytest.fail("Ray was started"))
        assert paint() == 2
    err = capfd.readouterr().err
    assert err.startswith("deepstyle: error: another run is writing ")
    assert err.count("\n") == 1
    assert names(tmp_path / "out") == []
    (tmp_path / "out" / "a.jpg").mkdir()
    with locks.lock_of(tmp_path / "out" / "a.jpg" / "result_image"):
        assert paint() == 1
    assert "failed: a.jpg: another run is writing" in capfd.readouterr().err
    assert all((tmp_path / "out" / name / LAST).exists() for name in NAMES[1:])


def test_what_there_is_to_say_comes_through_and_nothing_else_and_with_quiet_only_errors(
    paint, crew, photos, tmp_path, capfd
):
    (photos / "notes.txt").write_text("no picture")
    (crew.plans / "a.jpg saving 1").write_text("warning")  # of a library's: nobody is told it without workers
    assert paint("--num_iter", "1") == 1
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 5
    assert [line.split(":")[0] for line in err.splitlines()] == ["deepstyle"] * 3
    assert "programmers" not in err
    assert paint("--num_iter", "1") == 1
    lines = capfd.readouterr().out.splitlines()
    assert f"moved 2 files of an earlier run to {tmp_path}/out/a.jpg/result_image_earlier_1" in lines
    assert paint("--num_iter", "1", "--quiet") == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.split(": ")[1] for line in err.splitlines()] == [
        "notes.txt fails",
        "3 of 4 photos are done; the same command with --resume does what is not",
        "failed",
    ]


def test_there_are_no_more_workers_than_pictures_and_no_more_than_cores(paint, crew, photos, monkeypatch, capfd):
    asked = []
    monkeypatch.setattr(photo_workers, "crew_for", lambda number: asked.append(number) or crew)
    monkeypatch.setattr(crews, "usable_cores", lambda: 4)
    (photos / "c.png").unlink()
    assert main(command(photos, "--num_iter", "1", "--workers", "4")) == 0
    assert main(command(photos, "--num_iter", "1", "--workers", "5")) == 2
    assert "--workers is 5; this machine has 4 CPU cores for them" in capfd.readouterr().err
    assert asked == [2]


def test_one_process_does_not_load_ray_and_without_ray_it_is_one_line(photos, tmp_path, monkeypatch, capfd):
    code = "import sys; from deepstyle_app.command import main; print(main(sys.argv[1:]), 'ray' in sys.modules)"
    ended = forked.run(*command(photos, "--num_iter", "1", "--workers", "1"), code=code)
    assert ended.stdout.splitlines()[-1] == "0 False"
    find = crews.importlib.util.find_spec
    monkeypatch.setattr(crews, "usable_cores", lambda: 2)
    monkeypatch.setattr(crews.importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    assert main(command(photos, "--workers", "2", out="none")) == 2
    err = capfd.readouterr().err
    assert re.fullmatch("deepstyle: error: --workers needs the package ray; .* -m pip install ray' brings it\n", err)
    assert not (tmp_path / "none").exists()


class Employer:
    """In a crew's place: keeps what its workers are given."""

    number, threads, busy = 2, 3, ()

    def employ(self, kind, *given, calls_at_once):
        self.kind, self.given, self.calls_at_once = kind, given, calls_at_once

    def is_working(self):
        return False


@pytest.mark.parametrize(("address", "share"), [(None, (4e9 - RAY) / 2), ("192.0.2.1:6379", None)])
def test_each_worker_gets_its_share_of_what_is_free_here_and_on_a_cluster_of_its_machine(
    photos, tmp_path, monkeypatch, address, share
):
    import ray

    monkeypatch.setenv("RAY_ADDRESS", address or "")
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr("deepstyle_support.limits.psutil.virtual_memory", lambda: SimpleNamespace(available=50e9))
    job = job_of(command(photos, "--max_memory", "4", "--workers", "2"))
    groups, tasks = groups_of(job)
    employer = Employer()
    photo_workers.Sharing(job, employer, groups, tasks, {}).run([signal.SIGTERM])
    assert (employer.kind, employer.calls_at_once) == (PhotoWorker, 2)
    assert employer.given == ({}, share, 3, os.getcwd(), sys.argv[0])
    monkeypatch.setattr(photo_workers, "usable_cores", lambda: 7)
    monkeypatch.setattr(sys, "argv", [""])
    worker = PhotoWorker(*employer.given)
    assert worker._free(job) == (share or 4e9 / 2, 0)
    # It is asked once: later the worker itself has taken some.
    monkeypatch.setattr("deepstyle_support.limits.psutil.virtual_memory", lambda: SimpleNamespace(available=1))
    assert worker._free(job) == (share or 4e9 / 2, 0)
    assert PhotoWorker(*employer.given)._free(job) == (1 if share else 1 / 2, 0)


def test_a_share_of_too_little_memory_is_none_and_says_so(paint, photos, monkeypatch, capfd):
    employer = Employer()
    job = job_of(command(photos, "--max_memory", "0.3", "--workers", "2"))
    groups, tasks = groups_of(job)
    import ray

    monkeypatch.setattr(ray, "put", lambda value: value)
    photo_workers.Sharing(job, employer, groups, tasks, {}).run([signal.SIGTERM])
    monkeypatch.setattr(sys, "argv", [""])
    worker = PhotoWorker(*employer.given)
    assert worker._free(job)[0] == 0
    outcome = worker.paint(groups[0].tasks[0].job, "1/3 a.jpg: ", groups[0].read_others())
    assert "0.0 GB are free" in outcome.failure


def test_a_machine_without_the_commands_folder_is_said(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [""])
    job = job_of(command(photos, "--workers", "2"))
    groups, _ = groups_of(job)
    outcome = PhotoWorker({}, None, 1, f"{tmp_path}/none", "deepstyle").paint(groups[0].tasks[0].job, "", {})
    assert outcome.failure == f"a worker's machine has no folder '{tmp_path}/none': No such file or directory"
    assert (outcome.ending, outcome.out, outcome.err) == (None, "", "")


# ------------------------------------------------------------------------------ with a Ray and workers of their own


def start(photos, *flags, narrow=False, out="out", **variables):
    """The command in a process group of its own, where the photos' folder is; narrow: with the tests' network."""
    program = frail.__file__ if narrow else str(forked.SCRIPT)
    inputs = [photos.name, "style.png", out, *SMALL, "--image_size", "36", "--workers", "2"]
    environment = {name: value for name, value in for_scripts(**variables).items() if name != "RAY_ADDRESS"} | variables
    environment |= {STARTED_FOR: str(photos), frail.FOLDER: str(photos.parent)}
    return subprocess.Popen(
        [sys.executable, program, *inputs, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
        cwd=photos.parent,
    )


needs_two_cores = pytest.mark.skipif(usable_cores() < 2, reason="two workers need two cores")


@needs_two_cores
def test_the_command_itself_paints_what_one_process_would_and_a_stop_leaves_no_process(
    full_network, photos, tmp_path, capfd
):
    process = start(photos, "--num_iter", "100000", "--report", "report.html")
    firsts = [tmp_path / "out" / name / "result_image_at_iteration_1.png" for name in NAMES[:2]]
    for first in firsts:
        wait_for(first, process)
    for _ in range(2):  # to the group, as `timeout` and a terminal send it
        os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert re.fullmatch(
        rf"painting 3 photos on 2 workers with \d+ CPU cores? each of this machine, .*\n{UNTRAINED}\n", out
    )
    *said, counted = err.splitlines()
    assert counted == "deepstyle: 0 of 3 photos are done; the same command with --resume does what is not"
    assert sorted(line.split(": stopped")[0] for line in said) == ["deepstyle: 1/3 a.jpg", "deepstyle: 2/3 b.jpg"]
    assert left_of(photos, process) == []
    for name, first in zip(NAMES, firsts, strict=False):
        assert_is_whole(first.parent)
        assert main(command(photos / name, "--num_iter", "1", out=f"alone/{name}")) == 0
        np.testing.assert_array_equal(pixels(first), pixels(tmp_path / "alone" / name / first.name))
        said = describe(first, capfd)
        assert "\nexact: True\n" in said
        command_again = f"{shlex.join(program())} photos/{name} style.png out/{name}/ "
        assert said.splitlines()[-1].startswith(command_again)


@needs_two_cores
@pytest.mark.endurance
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
def test_a_stop_while_workers_get_ready_is_one_line_and_no_process_is_left(photos, tmp_path, sent):
    process = start(photos)
    assert process.stdout.readline().startswith("painting 3 photos on 2 workers")
    os.killpg(process.pid, sent)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + sent
    assert err == "deepstyle: 0 of 3 photos are done; the same command with --resume does what is not\n"
    assert left_of(photos, process) == []
    assert names(tmp_path) == ["photos", "style.png"]


@pytest.mark.endurance
@needs_two_cores
@pytest.mark.parametrize("seconds", [0.7, 1.5, 2.5, 3.5])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
def test_a_stop_at_any_moment_of_the_start_is_said_by_the_program_alone(photos, tmp_path, sent, seconds):
    process = start(photos)
    time.sleep(seconds)
    os.killpg(process.pid, sent)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (128 + sent, -sent)  # before it has begun, Python ends as ever
    assert all(line.startswith("deepstyle: ") for line in err.splitlines())
    assert left_of(photos, process) == []
    assert not list((tmp_path / "out").rglob(".*"))


@pytest.mark.endurance
@needs_two_cores
def test_the_second_ctrl_c_and_a_kill_leave_no_process_and_resume_goes_on(photos, tmp_path, capfd):
    for stop, number in (("the second Ctrl-C", 13), ("a kill", 17)):
        (tmp_path / f"a.jpg saving {number}").write_text("sleep")
        process = start(photos, "--num_iter", "100000", "--every", "10", "--overwrite", narrow=True)
        journal, awaited = tmp_path / "journal", {f"a.jpg saving {number}", "b.jpg saved 20"}
        while not (journal.exists() and awaited <= {*journal.read_text().splitlines()}):
            assert process.poll() is None
            time.sleep(0.1)
        if stop == "a kill":
            process.kill()
        else:
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(2 * SAME_STOP)
        process.communicate(timeout=10)
        assert process.returncode == (130 if stop == "the second Ctrl-C" else -signal.SIGKILL)
        # After a kill Ray's own agents look for its server for a minute before they end.
        assert left_of(photos, process, 90 if stop == "a kill" else 20) == []
        journal.unlink()
    done = max(int(state_of(tmp_path / "out" / name)["iteration"]) for name in NAMES[:2]) + 1
    process = start(photos, "--num_iter", done, "--every", "10", "--resume", narrow=True)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert all(state_of(tmp_path / "out" / name)["iteration"] == done for name in NAMES)


@pytest.fixture
def cluster(tmp_path):
    """The address of a cluster of this machine's, that was started elsewhere than the command."""
    import ray

    (tmp_path / "elsewhere").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = f"cluster of {tmp_path}"
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", STARTED_FOR: ours, frail.FOLDER: str(tmp_path)}
    flags = ["--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
    # Ray's own client server does not start from a folder with a space, and with --block all end with it.
    link = tmp_path / "elsewhere" / "environment"
    link.symlink_to(sys.prefix)
    python = link / Path(sys.executable).relative_to(sys.prefix)
    program = [str(python), "-c", "from ray.scripts.scripts import main; main()", "start"]
    with (tmp_path / "elsewhere" / "log").open("w") as log:
        process = subprocess.Popen(
            [*program, *flags, "--disable-usage-stats"],
            env=environment,
            cwd=tmp_path / "elsewhere",
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"{ray.util.get_node_ip_address()}:{port}"
    try:
        end = time.monotonic() + 60
        while "Ray runtime started" not in (tmp_path / "elsewhere" / "log").read_text():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        yield address
    finally:
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if process.pid == os.getpgid(one.pid) or one.environ().get(STARTED_FOR) == ours:
                    one.kill()
        process.wait()


@pytest.mark.endurance
def test_a_cluster_that_is_there_paints_a_folder_wherever_it_was_started(cluster, photos, tmp_path):
    flags = "--report", "report.html"
    process = start(photos, *flags, narrow=True, RAY_ADDRESS=cluster, RAY_AUTH_MODE="disabled")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    first, _, *lines = out.splitlines()
    assert first.startswith("painting 3 photos on 2 workers with 1 CPU core each of 1 machine, with ")
    assert sorted(line.split(": loss ")[0] for line in lines) == ["1/3 a.jpg", "2/3 b.jpg", "3/3 c.png"]
    assert left_of(photos, process) == []
    for name in NAMES:
        assert main(command(photos / name, out=f"alone/{name}")) == 0
        np.testing.assert_array_equal(pixels(tmp_path / "out" / name / LAST), pixels(tmp_path / "alone" / name / LAST))


def test_what_ray_has_to_say_of_the_clusters_that_it_finds_is_not_shown(monkeypatch, capfd):
    from ray._private import services

    def find(address):
        os.write(2, b"Found multiple active Ray instances")
        return "127.0.0.1:1"

    monkeypatch.setattr(services, "canonicalize_bootstrap_address_or_die", find)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(UserError, match="nobody answers at"):
        crews.Crew(2).begin()
    assert capfd.readouterr().err == ""

"""What happens to long jobs: signals, kills, full disks, many iterations. Nothing is lost, no file is half there."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
from conftest import SMALL, all_threads, evaluation_of, wait_for
from PIL import Image

import deepstyle
from deepstyle_app import files
from deepstyle_app.command import main
from deepstyle_app.terminal import SAME_STOP
from deepstyle_support.backend import import_keras
from deepstyle_support.engine import Engine
from deepstyle_support.messages import UserError

ROOT = Path(deepstyle.__file__).parent
ENDLESS = [*SMALL, "--num_iter", "100000"]


def start(picture_files, prefix, *flags, **options):
    """The command as a process that is under way."""
    return forked.start(*picture_files, prefix, *flags, **options)


def picture(prefix, number):
    return Path(f"{prefix}_at_iteration_{number}.png")


def saved_numbers(prefix):
    found = (re.fullmatch(rf"{prefix.name}_at_iteration_(\d+)\.png", path.name) for path in prefix.parent.iterdir())
    return sorted(int(match[1]) for match in found if match)


def assert_all_files_are_whole(prefix):
    """Every picture and the state can be read; the pictures are numbered without a gap. Returns how many."""
    numbers = saved_numbers(prefix)
    assert numbers == list(range(1, len(numbers) + 1))
    for number in numbers:
        with Image.open(picture(prefix, number)) as opened:
            opened.load()
    state = Path(f"{prefix}_state.npz")
    if state.exists():
        with np.load(state) as opened:
            # A kill may come between a picture and its state.
            assert len(numbers) - 1 <= opened["iteration"] + opened["partial"] <= len(numbers)
            assert np.isfinite(opened["x"]).all()
    return len(numbers)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_what_there_is_and_resume_goes_on(picture_files, tmp_path, number, status):
    prefix = tmp_path / "a"
    run = start(picture_files, prefix, *ENDLESS)
    wait_for(picture(prefix, 2), run)
    run.send_signal(number)
    out, err = run.communicate(timeout=30)
    assert run.returncode == status
    done = assert_all_files_are_whole(prefix)
    assert re.fullmatch(
        rf"deepstyle: stopped(; iteration {done} is saved| within iteration {done}; its picture so far is saved"
        rf"| before anything new was found; iteration {done} is saved), "
        r"and the same command with --resume goes on from there\n",
        err,
    )
    assert out.splitlines()[-1].startswith(f"iteration {done}/")
    with np.load(f"{prefix}_state.npz") as state:
        finished = done - int(state["partial"])
        assert state["iteration"] == finished
    again = start(picture_files, prefix, *SMALL, "--num_iter", str(done + 2), "--resume")
    out, err = again.communicate(timeout=60)
    assert (again.returncode, err) == (0, "")
    assert out.startswith(f"going on after iteration {finished}\n")
    assert assert_all_files_are_whole(prefix) == done + 2


def test_a_signal_to_run_sh_reaches_the_program(picture_files, tmp_path):
    out = tmp_path / "out"
    command = ["sh", str(ROOT / "run.sh"), *picture_files, str(out), *ENDLESS]
    environment = os.environ | {"DEEPSTYLE_PYTHON": sys.executable}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(out / "result_image_at_iteration_1.png", run)
    run.terminate()
    _, err = run.communicate(timeout=30)
    assert run.returncode == 143
    assert "--resume" in err


SLOW = """
import sys, time, deepstyle
from deepstyle_app.command import main
evaluate = deepstyle.Objective.evaluate
deepstyle.Objective.evaluate = lambda *given: time.sleep(2) or evaluate(*given)
sys.exit(main(sys.argv[1:]))
"""


def test_the_second_ctrl_c_leaves_at_once(picture_files, tmp_path):
    prefix = tmp_path / "a"
    run = start(picture_files, prefix, *ENDLESS, code=SLOW)
    assert run.stdout.readline().startswith("painting")
    time.sleep(1)  # now it is within its first evaluation
    for _ in range(2):
        run.send_signal(signal.SIGINT)
        time.sleep(2 * SAME_STOP)
    _, err = run.communicate(timeout=30)
    assert (run.returncode, err) == (130, "")  # nothing is said of a picture that was saved first
    assert_all_files_are_whole(prefix)


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.endurance)])
def test_a_kill_at_any_moment_leaves_whole_files_and_resume_works(picture_files, tmp_path, kills):
    chance, done = random.Random(0), 0
    for attempt in range(kills):
        if attempt % 10 == 0:  # another picture, or the optimiser comes to an end by itself
            prefix, done = tmp_path / str(attempt), 0
        run = start(picture_files, prefix, *ENDLESS, "--resume")
        if attempt % 5:  # while it paints and saves
            wait_for(picture(prefix, done + 1), run)
            time.sleep(chance.uniform(0, 0.5))
        else:  # anywhere, before it paints as well
            time.sleep(chance.uniform(0, 1.5))
        run.kill()
        run.communicate()
        now = assert_all_files_are_whole(prefix)
        assert now >= done
        done = now
        if attempt % 10 == 9 or attempt == kills - 1:
            assert done >= (attempt % 10 + 1) * 3 // 4
    run = start(picture_files, prefix, *SMALL, "--num_iter", str(done + 1), "--resume")
    _out, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (0, "")
    assert_all_files_are_whole(prefix)
    assert saved_numbers(prefix)[-1] == done + 1


def test_a_disk_that_fills_during_a_run_is_said_and_resume_works_once_there_is_room(picture_files, tmp_path):
    prefix = tmp_path / "a"
    run = start(picture_files, prefix, *ENDLESS)
    wait_for(picture(prefix, 3), run)
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (1000, 1000))  # no file may grow beyond this now
    _, err = run.communicate(timeout=30)
    assert run.returncode == 1
    assert err.startswith(f"deepstyle: error: cannot write '{prefix}_")
    assert "File too large" in err
    assert err.count("\n") == 1
    done = assert_all_files_are_whole(prefix)
    assert done >= 3
    assert not list(tmp_path.glob(".*"))  # and nothing half-written is left about
    again = start(picture_files, prefix, *SMALL, "--num_iter", str(done + 2), "--resume")
    _, err = again.communicate(timeout=60)
    assert (again.returncode, err) == (0, "")
    assert assert_all_files_are_whole(prefix) == done + 2


def test_a_run_that_goes_wrong_keeps_the_last_good_picture(picture_files, tmp_path, monkeypatch, capfd):
    evaluate, calls = deepstyle.Objective.evaluate, []

    def fail_at_last(self, x):
        calls.append(x)
        return evaluate(self, x if len(calls) < 30 else np.full_like(x, np.nan))

    monkeypatch.setattr(deepstyle.Objective, "evaluate", fail_at_last)
    prefix = tmp_path / "a"
    assert main([*picture_files, str(prefix), *ENDLESS]) == 1
    assert "loss is no longer finite" in capfd.readouterr().err
    assert assert_all_files_are_whole(prefix) == 2  # after 20 evaluations, and what the other nine brought
    with np.load(f"{prefix}_state.npz") as state:
        assert (state["iteration"], state["partial"], state["evaluations"]) == (1, True, 29)
        assert np.all(np.diff(state["losses"][:, 0]) < 0)


@pytest.mark.parametrize("iterations", [40, pytest.param(100, marks=pytest.mark.endurance)])
def test_many_iterations_need_no_more_memory_or_files_than_twenty(picture_files, tmp_path, iterations):
    prefix = tmp_path / "a"

    def sample(run):
        """The least memory of some moments, for within an evaluation buffers come and go; and the open files."""
        memory = []
        for _ in range(iterations // 2):
            status = Path(f"/proc/{run.pid}/status").read_text()
            memory.append(int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]))
            time.sleep(0.02)
        return min(memory), len(os.listdir(f"/proc/{run.pid}/fd"))

    run = start(picture_files, prefix, *SMALL, "--num_iter", str(iterations), "--quiet")
    wait_for(picture(prefix, 20), run)
    memory, files = sample(run)
    wait_for(picture(prefix, iterations * 3 // 4), run)
    memory_at_the_end, files_at_the_end = sample(run)
    assert run.wait(timeout=60) == 0
    run.communicate()
    assert memory_at_the_end <= 1.02 * memory
    assert files_at_the_end <= files + 2  # a picture may just be open for writing
    assert assert_all_files_are_whole(prefix) == iterations


@pytest.mark.endurance
@pytest.mark.parametrize("flags", [[], ["--init_image", "noise", "--pool_type", "max", "--seed", "5"]])
def test_the_same_command_gives_the_same_pictures_bit_for_bit(picture_files, tmp_path, flags):
    files = []
    for _ in range(2):
        command = [*picture_files, tmp_path / "out", *SMALL, "--image_size", "80", "--num_iter", "1", *flags]
        run = forked.cold_start(*command, "--overwrite", env=all_threads())
        assert run.communicate(timeout=120)[1] == ""
        files.append([picture(tmp_path / "out", 1).read_bytes()])
    assert files[0] == files[1]


def failing_at(monkeypatch, number):
    """Let the loss be no longer finite at this evaluation of the next run."""
    evaluate, calls = deepstyle.Objective.evaluate, []

    def fail(self, x):
        calls.append(x)
        return evaluate(self, x if len(calls) < number else np.full_like(x, np.nan))

    monkeypatch.setattr(deepstyle.Objective, "evaluate", fail)


def test_a_run_that_goes_wrong_between_saved_pictures_leaves_its_last_one(picture_files, tmp_path, monkeypatch):
    failing_at(monkeypatch, 50)
    assert main([*picture_files, str(tmp_path / "a"), *SMALL, "--num_iter", "9", "--every", "10"]) == 1
    assert saved_numbers(tmp_path / "a") == [3]


def test_a_picture_that_is_missing_is_written_from_the_state(picture_files, tmp_path, capfd):
    command = [*picture_files, str(tmp_path / "a"), *SMALL]
    assert main(command) == 0
    before = np.asarray(Image.open(picture(tmp_path / "a", 2))).astype(int)
    picture(tmp_path / "a", 2).unlink()
    assert main([*command, "--resume"]) == 0
    assert "nothing to do" in capfd.readouterr().err
    assert np.abs(np.asarray(Image.open(picture(tmp_path / "a", 2))) - before).max() <= 1  # from float32


def test_a_run_that_ends_in_a_coarse_size_goes_on_there(picture_files, tmp_path, monkeypatch, capfd):
    command = [*picture_files, str(tmp_path / "a"), *SMALL, "--image_size", "64", "--scales", "2", "--num_iter", "3"]
    command += ["--coarse_iter", "2"]
    with monkeypatch.context() as broken:
        failing_at(broken, 30)
        assert main(command) == 1
    assert saved_numbers(tmp_path / "a") == [0]
    assert Image.open(picture(tmp_path / "a", 0)).size == (85, 64)
    with np.load(tmp_path / "a_state.npz") as state:
        assert state["x"].shape == (32, 42, 3)
        assert (state["iteration"], state["partial"]) == (1, True)
    capfd.readouterr()
    assert main([*command, "--resume"]) == 0
    said = capfd.readouterr().out
    assert said.startswith("going on after iteration 1 at 32 x 42\n")
    assert "\n32 x 42: iteration 2/2: " in said
    assert saved_numbers(tmp_path / "a") == [1, 2, 3]


def test_a_hangup_saves_what_there_is_unless_it_was_ignored_at_the_start(picture_files, tmp_path):
    prefix = tmp_path / "a"
    run = start(picture_files, prefix, *ENDLESS)
    wait_for(picture(prefix, 1), run)
    run.send_signal(signal.SIGHUP)
    run.communicate(timeout=30)
    assert run.returncode == 128 + signal.SIGHUP
    # As nohup does it, and a shell's script with what it runs in the background.
    run = start(picture_files, tmp_path / "b", *ENDLESS, ignored=[signal.SIGHUP, signal.SIGINT])
    wait_for(picture(tmp_path / "b", 1), run)
    run.send_signal(signal.SIGHUP)
    run.send_signal(signal.SIGINT)
    wait_for(picture(tmp_path / "b", 4), run)
    run.kill()
    run.communicate()


def test_one_run_owns_a_prefix_and_a_killed_one_holds_nobody_up(picture_files, tmp_path, capfd):
    prefix = tmp_path / "a"
    run = start(picture_files, prefix, *ENDLESS)
    wait_for(picture(prefix, 1), run)
    assert main([*picture_files, str(prefix), *SMALL, "--overwrite"]) == 2
    assert f"another run is writing '{prefix}'" in capfd.readouterr().err
    run.kill()
    run.communicate()
    assert main([*picture_files, str(prefix), *SMALL, "--overwrite"]) == 0
    assert saved_numbers(prefix) == [1, 2]
    assert not list(tmp_path.glob(".a*"))


@pytest.mark.parametrize("closed", [[1], [2], [1, 2]], ids=["no stdout", "no stderr", "neither"])
def test_what_the_shell_has_closed_silences_the_program_and_nothing_else(picture_files, tmp_path, closed):
    ended = forked.run(*picture_files, "out/", *SMALL, cwd=tmp_path, closed=closed)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert bool(ended.stdout) == (1 not in closed)
    assert (tmp_path / "out" / "result_image_at_iteration_2.png").exists()


def test_who_reads_no_further_silences_the_program_and_nothing_else(picture_files, tmp_path):
    run = start(picture_files, "out/", *SMALL, "--image_size", "128", cwd=tmp_path)
    assert run.stdout.readline().startswith("painting ")
    run.close_stdout()
    assert run.wait(timeout=60) == 0
    assert (tmp_path / "out" / "result_image_at_iteration_2.png").exists()
    assert run.communicate()[1] == ""


def test_letters_that_the_locale_has_not_are_shown_otherwise(picture_files, tmp_path):
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [*picture_files, "é/", *SMALL, "--num_iter", "1"]
    run = forked.cold_start(*command, cwd=tmp_path, env=environment)
    assert run.communicate(timeout=120)[1] == ""
    assert run.returncode == 0
    assert (tmp_path / "é" / "result_image_at_iteration_1.png").exists()


@pytest.mark.parametrize("ending", ["", "1 / 0"])
def test_a_script_that_leaves_the_generator_as_it_is_ends(ending):
    lines = [
        "import deepstyle, numpy as np",
        "picture = np.full((40, 40, 3), 99, np.uint8)",
        "picture[:20] = 1",
        "painting = deepstyle.stylize(picture, picture[::-1], weights='random', image_size=32)",
        "print(next(painting).number)",
    ]
    ended = forked.run(code="\n".join([*lines, ending]), timeout=60)
    assert ended.stdout == "1\n"
    assert ("ZeroDivisionError" in ended.stderr) == bool(ending)


class Valley:
    """In an objective's place: a long valley that takes hundreds of evaluations; of these one raises `error`."""

    def __init__(self, monkeypatch, fails_at=0, error=None):
        self.calls, self.fails_at, self.error = 0, fails_at, error
        monkeypatch.setattr(deepstyle.Objective, "at", lambda stage, engine, watch: self.of(stage))
        monkeypatch.setattr(deepstyle.Objective, "evaluate", lambda itself, x: self.evaluate(x))
        # These take longer than all the rest.
        for module in ("run", "folder"):
            monkeypatch.setattr(f"deepstyle_app.{module}.load_weights", lambda *given: ({}, "no network"))
        for name in ("deepstyle_app.folder", "deepstyle_support.engine"):
            monkeypatch.setattr(f"{name}.describe_device", lambda: "none")

    def of(self, stage):
        objective = object.__new__(deepstyle.Objective)
        objective.size = stage.size
        return objective

    def evaluate(self, x):
        self.calls += 1
        if self.calls == self.fails_at:
            raise self.error
        array = np.asarray(x, np.float64)
        steepness = np.geomspace(1, 1e4, array.size).reshape(array.shape)
        loss, gradient = float(np.sum(steepness * array**2)), 2 * steepness * array
        is_array = isinstance(x, np.ndarray)
        return evaluation_of(loss, gradient if is_array else import_keras().ops.convert_to_tensor(gradient, "float32"))


ERRORS = (MemoryError("on purpose"), UserError("on purpose", 1), RuntimeError("on purpose"), KeyboardInterrupt())
FULL, COARSE = ("--image_size", "32"), ("--image_size", "64", "--scales", "2", "--coarse_iter", "1")


def assert_is_told(error, status, said):
    """The reason is told, and nothing else but that a photo of a folder has none."""
    interrupted = isinstance(error, KeyboardInterrupt)
    assert status == (130 if interrupted else 1)
    assert "interrupted; the same command begins again" in said if interrupted else "on purpose" in said
    assert "besides" not in said


@pytest.mark.parametrize(
    ("optimizer", "sizes", "folder"),
    [("scipy", FULL, False), ("scipy", COARSE, True), ("device", FULL, True), ("device", COARSE, False)],
    ids=["SciPy's", "SciPy's, coarse sizes, a folder", "on the device, a folder", "on the device, coarse sizes"],
)
def test_whichever_evaluation_fails_the_run_says_why_and_goes_on_from_there(
    tmp_path, picture_files, monkeypatch, capfd, optimizer, sizes, folder
):
    content, style = picture_files
    if folder:
        (tmp_path / "photos").mkdir()
        content = shutil.move(content, tmp_path / "photos" / "a.png")
    prefix = tmp_path / "out" / "a.png" / "result_image" if folder else tmp_path / "out" / "result_image"
    command = [str(tmp_path / "photos") if folder else content, style, f"{tmp_path}/out/", "--optimizer", optimizer]
    command += ["--num_iter", "2", "--min_improvement", "1e-9", *sizes]
    monkeypatch.setattr(deepstyle, "EVALUATIONS_PER_ITERATION", 5)  # for there is a run and another for each
    evaluations = Valley(monkeypatch)
    assert main(command) == 0
    for fails_at in range(1, evaluations.calls + 1):
        shutil.rmtree(tmp_path / "out")
        error = ERRORS[fails_at % len(ERRORS)]
        Valley(monkeypatch, fails_at, error)
        capfd.readouterr()
        assert_is_told(error, main(command), capfd.readouterr().err)
        assert Path(f"{prefix}_state.npz").exists() == (fails_at > 1)
        if fails_at > 1:
            with np.load(f"{prefix}_state.npz") as state:
                number = state["iteration"] + state["partial"] if state["x"].shape[0] == int(sizes[1]) else 0
            assert picture(prefix, number).exists()
        Valley(monkeypatch)
        assert main([*command, "--resume"]) == 0
        with np.load(f"{prefix}_state.npz") as state:
            assert (state["iteration"], state["partial"]) == (2, False)
        assert saved_numbers(prefix) == [1, 2]


@pytest.mark.parametrize("fails_at", [1, 2, 20, 30])
@pytest.mark.parametrize("optimizer", ["scipy", "device"])
def test_a_loss_that_is_no_longer_finite_in_the_last_iteration_is_told(
    picture_files, tmp_path, monkeypatch, capfd, fails_at, optimizer
):
    failing_at(monkeypatch, fails_at)
    flags = ["--num_iter", "2" if fails_at > 20 else "1", "--optimizer", optimizer, "--animation", f"{tmp_path}/a.gif"]
    assert main([*picture_files, str(tmp_path / "a"), *SMALL, *flags]) == 1
    err = capfd.readouterr().err
    assert re.fullmatch("deepstyle: error: the .* loss is no longer finite; lower its weight\n", err)
    assert (tmp_path / "a_state.npz").exists() == (tmp_path / "a.gif").exists() == (fails_at > 1)


@pytest.mark.parametrize("kind", ["gif", "webp", "mp4"])
def test_a_run_that_fails_at_its_beginning_leaves_nothing_in_the_way_of_the_next(
    picture_files, tmp_path, monkeypatch, capfd, kind
):
    command = [*picture_files, str(tmp_path / "a"), "--num_iter", "1", *FULL, "--animation", f"{tmp_path}/a.{kind}"]
    Valley(monkeypatch, 1, UserError("on purpose", 1))
    assert main(command) == 1
    assert capfd.readouterr().err == "deepstyle: error: on purpose\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["content.png", "style.png"]
    Valley(monkeypatch)
    assert main(command) == 0
    assert (tmp_path / f"a.{kind}").exists()


def stopping_at(monkeypatch, number, sent=signal.SIGTERM):
    """Let a signal arrive at this evaluation of the next run."""
    valley = Valley(monkeypatch)
    evaluate = valley.evaluate

    def stop(x):
        if valley.calls + 1 == number:
            os.kill(os.getpid(), sent)
        return evaluate(x)

    valley.evaluate = stop


@pytest.mark.parametrize("optimizer", ["scipy", "device"])
def test_a_run_that_is_stopped_again_before_anything_is_new_says_so_and_keeps_its_animation(
    picture_files, tmp_path, monkeypatch, capfd, optimizer
):
    command = [*picture_files, str(tmp_path / "a"), *FULL, "--animation", f"{tmp_path}/a.gif", "--optimizer", optimizer]
    stopping_at(monkeypatch, 5)
    assert main(command) == 143
    before = (tmp_path / "a.gif").read_bytes()
    capfd.readouterr()
    stopping_at(monkeypatch, 1)
    assert main([*command, "--resume"]) == 143
    assert capfd.readouterr().err.startswith("deepstyle: stopped before anything new was found; iteration 1 is saved")
    assert (tmp_path / "a.gif").read_bytes() == before


def full_disk(*given):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["write_animation", "write_whole", "Outputs._write_state"])
def test_what_fails_on_top_of_a_failure_is_told_and_hides_nothing(picture_files, tmp_path, monkeypatch, capfd, name):
    command = [*picture_files, str(tmp_path / "a"), *FULL, "--num_iter", "1", "--animation", f"{tmp_path}/a.gif"]
    Valley(monkeypatch, 9, UserError("on purpose", 1))
    monkeypatch.setattr(f"deepstyle_app.files.{name}", full_disk)
    assert main(command) == 1
    *besides, last = capfd.readouterr().err.splitlines()
    assert last == "deepstyle: error: on purpose"
    assert besides == ["deepstyle: besides, OSError: [Errno 28] No space left on device"]


def test_what_fails_behind_a_stop_is_told_beside_it(picture_files, tmp_path, monkeypatch, capfd):
    stopping_at(monkeypatch, 9)
    monkeypatch.setattr(files, "write_animation", full_disk)
    assert main([*picture_files, str(tmp_path / "a"), *FULL, "--animation", f"{tmp_path}/a.gif"]) == 143
    besides, stopped = capfd.readouterr().err.splitlines()
    assert besides == "deepstyle: besides, OSError: [Errno 28] No space left on device"
    assert stopped.startswith("deepstyle: stopped within iteration 1; its picture so far is saved")


def test_an_animation_that_fails_at_the_end_of_a_good_run_is_an_error(picture_files, tmp_path, monkeypatch, capfd):
    Valley(monkeypatch)
    monkeypatch.setattr(files, "write_animation", full_disk)
    command = [*picture_files, str(tmp_path / "a"), *FULL, "--num_iter", "1", "--animation", f"{tmp_path}/a.gif"]
    assert main(command) == 1
    assert "No space left" in capfd.readouterr().err


# One stop: `timeout` sends its signal twice, and a logout two kinds.
SENT = [
    [signal.SIGTERM, signal.SIGTERM],
    [signal.SIGTERM, signal.SIGHUP, signal.SIGCONT],
    [signal.SIGHUP, signal.SIGTERM, signal.SIGINT],
    [signal.SIGINT, signal.SIGINT],
    [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTERM],
]


@pytest.mark.parametrize("sent", SENT, ids=lambda sent: " ".join(number.name for number in sent))
def test_a_stop_may_arrive_as_several_signals(heeded, picture_files, tmp_path, monkeypatch, capfd, sent):
    valley = Valley(monkeypatch)
    evaluate = valley.evaluate

    def stop(x):
        if valley.calls == 8:
            for number in sent:
                os.kill(os.getpid(), number)
        return evaluate(x)

    valley.evaluate = stop
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("it left at once"))
    assert main([*picture_files, str(tmp_path / "a"), *FULL, "--optimizer", "device"]) == 128 + sent[0]
    assert capfd.readouterr().err.startswith("deepstyle: stopped within iteration 1; its picture so far is saved, ")
    assert not list(tmp_path.glob(".*"))
    assert [signal.getsignal(number) for number in heeded] == [*heeded.values()]


@pytest.fixture
def heeded():
    """SIGINT, SIGTERM and SIGHUP as at a terminal, whoever runs the tests; each with its handler."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    yield dict.fromkeys(before, signal.SIG_DFL)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_late_signal_of_a_stop_changes_nothing_more(picture_files, tmp_path):
    run = start(picture_files, tmp_path / "a", *ENDLESS)
    wait_for(picture(tmp_path / "a", 1), run)
    run.send_signal(signal.SIGTERM)
    # Its words are the last that it does; Python's own end takes longer.
    assert run.stderr.readline().startswith("deepstyle: stopped")
    for number in (signal.SIGHUP, signal.SIGTERM):
        run.send_signal(number)
    run.communicate(timeout=30)
    assert run.returncode == 143


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(heeded, picture_files, tmp_path, monkeypatch, ignored):
    signal.signal(ignored, signal.SIG_IGN)
    stopping_at(monkeypatch, 5, ignored)
    assert main([*picture_files, str(tmp_path / "a"), *FULL, "--num_iter", "1"]) == 0
    assert signal.getsignal(ignored) == signal.SIG_IGN


def test_a_stop_before_the_painting_touches_nothing(heeded, picture_files, tmp_path, monkeypatch, capfd):
    Valley(monkeypatch)
    monkeypatch.setattr(Engine, "start", lambda engine: os.kill(os.getpid(), signal.SIGTERM))
    before = sorted(tmp_path.iterdir())
    assert main([*picture_files, str(tmp_path / "a"), *FULL]) == 143
    assert capfd.readouterr().err == "deepstyle: stopped before the painting began\n"
    assert sorted(tmp_path.iterdir()) == before


def test_ctrl_c_while_the_program_is_loaded_is_one_line(picture_files, tmp_path):
    script = "raise KeyboardInterrupt"
    (tmp_path / "numpy.py").write_text(script)  # as if it came while NumPy is imported
    run = forked.cold_start(*picture_files, "a", cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert run.communicate(timeout=60) == ("", "deepstyle: interrupted before the painting began\n")
    assert run.returncode == 130

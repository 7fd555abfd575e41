"""One picture on several workers: what they compute is the same, and what happens to them loses nothing."""

import inspect
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import IMAGES, SMALL, STARTED_FOR, describe, left_of, run, smooth_picture, wait_for

import deepstyle
from deepstyle_app import crew as crews
from deepstyle_app import tile_workers
from deepstyle_app.recipe import program
from deepstyle_app.terminal import stopping
from deepstyle_app.tile_workers import TileWorker, WorkersEngine
from deepstyle_support import engine as engines
from deepstyle_support import memory
from deepstyle_support.images import to_input_space
from deepstyle_support.limits import usable_cores
from deepstyle_support.memory import Plan, plan_memory, shared_tile
from deepstyle_support.messages import UserError
from deepstyle_support.pictures import Pictures
from deepstyle_support.settings import Settings
from deepstyle_support.tiles import tiles_of

pytestmark = pytest.mark.xdist_group("ray")  # which is started once


@pytest.fixture(scope="module")
def workers(untrained, tmp_path_factory):
    """Two workers, of which Ray's start and the loading of TensorFlow take most of this file's time.

    Their interpreter is in a folder that a shell has to be told of in quotes.
    """
    import ray

    pair = crews.Crew(2)
    link = tmp_path_factory.mktemp("a clone") / "it's $HOME (1)"
    link.symlink_to(sys.prefix)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(sys, "executable", str(link / Path(sys.executable).relative_to(sys.prefix)))
        patch.setattr(crews, "usable_cores", lambda: 2)
        pair.begin()
        pair.employ(TileWorker, ray.put(untrained), "zeros")
    yield pair
    pair.end()


def both(workers, untrained, rows, columns, styles=1, alpha=None, masks=None, **options):
    """The objective in this process and with workers, and a picture to try them on.

    masks: style_masks and content_mask, as the objective takes them.
    """
    content, *shown = (smooth_picture(seed, rows, columns) for seed in range(1, 2 + styles))
    x = to_input_space(content) + np.random.default_rng(3).normal(0, 20, content.shape)
    content = content if alpha is None else np.dstack([content, alpha])
    masks, settings = masks or {}, Settings(tile="48", **options)
    here = deepstyle.Objective(content, shown, **masks, **vars(settings) | {"weights": untrained})
    stage = deepstyle.Stage(Pictures(content, tuple(shown), **masks), settings, here.size, here.size, 1)
    engine = WorkersEngine(workers, Plan(settings.tile_pixels, settings.history), untrained, settings)
    return here, deepstyle.Objective.at(stage, engine, deepstyle.Watch()), x


def all_ready(workers):
    while len(workers.free) < workers.number:
        workers.next_done()


def region(rows, columns):
    mask = np.zeros((rows, columns), np.uint8)
    mask[: rows // 2] = 255
    return mask


@pytest.mark.parametrize(
    ("rows", "columns", "options"),
    [
        (96, 48, {}),
        (103, 45, {"pool_type": "max", "content_layer": ("conv4_2", "conv5_2")}),
        (
            96,
            48,
            {
                "styles": 2,
                "masks": {"style_masks": [region(96, 48), 255 - region(96, 48)], "content_mask": region(96, 48)},
                "style_weight": (1.0, 2.0),
            },
        ),
        (75, 52, {"alpha": region(75, 52)}),
    ],
    ids=["whole tiles", "an odd size", "styles and masks", "alpha"],
)
def test_loss_and_gradient_are_those_of_one_process(workers, untrained, rows, columns, options):
    here, shared, x = both(workers, untrained, rows, columns, **options)
    expected, got = here.evaluate(x), shared.evaluate(x)
    assert len(shared._tiles(shared.size, ["conv5_2"])) >= 2
    assert got.loss == pytest.approx(expected.loss, rel=1e-6)
    assert got.parts == pytest.approx(expected.parts, rel=1e-5)
    assert np.linalg.norm(got.gradient - expected.gradient) <= 1e-5 * np.linalg.norm(expected.gradient)


def test_with_rounded_factors_workers_do_as_one_process(workers, untrained, monkeypatch):
    for module in (engines, tile_workers):
        monkeypatch.setattr(module, "fastest_factors", lambda: "bfloat16")
    here, shared, x = both(workers, untrained, 96, 48, precision="mixed")
    expected, got = here.evaluate(x), shared.evaluate(x)
    assert not (expected.in_full or got.in_full)
    assert got.loss == pytest.approx(expected.loss, rel=1e-6)
    assert np.linalg.norm(got.gradient - expected.gradient) <= 1e-5 * np.linalg.norm(expected.gradient)
    here.go_on_in_full()
    assert here.evaluate(x).loss != expected.loss


@pytest.mark.parametrize("elsewhere", [True, False])
def test_workers_with_other_devices_are_asked_what_these_multiply_fastest(workers, untrained, monkeypatch, elsewhere):
    monkeypatch.setattr(tile_workers, "fastest_factors", lambda: "what is here")
    monkeypatch.setattr(workers, "on_gpus", elsewhere)
    engine = WorkersEngine(workers, Plan(48, 10), untrained, Settings())
    assert (engine.fastest_factors() == "what is here") != elsewhere


def test_it_makes_no_difference_which_worker_computes_what(workers, untrained):
    _, shared, x = both(workers, untrained, 96, 48)
    all_ready(workers)
    by_two = shared.evaluate(x)
    resting = workers.free.pop()
    by_one = shared.evaluate(x)
    workers.free.append(resting)
    assert by_one.parts == by_two.parts
    assert np.array_equal(by_one.gradient, by_two.gradient)


def test_no_signal_that_asks_to_stop_reaches_rays_processes(workers):
    raylet = next(child for child in psutil.Process().children() if child.name() == "raylet")
    blocked = int(re.search(r"SigBlk:\s+(\w+)", Path(f"/proc/{raylet.pid}/status").read_text())[1], 16)
    for number in stopping():
        assert blocked >> (number - 1) & 1
        assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize(
    ("processes", "said"),
    [
        ([], "the workers' processes end as soon as they start: bash: no such file; Ray's logs are in "),
        (["a worker that loads its backend"], "no worker is ready after 300 seconds; is there room for one?"),
    ],
)
@pytest.mark.parametrize("seconds", [None, 0.2], ids=["waiting", "looking now and then"])
def test_workers_that_do_not_come_are_told_of_as_what_they_are(tmp_path, monkeypatch, processes, said, seconds):
    import ray

    clock = [1000.0]

    def wait(refs, num_returns, timeout):
        clock[0] += timeout
        return [], refs

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(crews.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(crews, "worker_processes", lambda: processes)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "raylet.err").write_text("a warning\nbash: no such file\n\n")
    none_comes = crews.Crew(2)
    none_comes.logs, none_comes.busy = tmp_path, {"starting": ("a worker", None)}
    with pytest.raises(UserError) as raised:
        while True:
            none_comes.next_done(seconds)
    assert str(raised.value).startswith(said)
    assert clock[0] - 1000 == pytest.approx(300 if processes else 15, abs=crews.LOOK + 0.2)


def test_workers_that_are_ready_are_seen(workers):
    all_ready(workers)
    assert len(crews.worker_processes()) >= workers.number


def test_x_is_sent_once_for_both_passes_and_anew_for_another_evaluation(workers, untrained, monkeypatch):
    import ray

    _, shared, x = both(workers, untrained, 96, 48)
    sent, put = [], ray.put
    monkeypatch.setattr(ray, "put", lambda value: sent.append(value) or put(value))
    first = shared.evaluate(x)
    x += 1
    second = shared.evaluate(x)
    assert [getattr(value, "dtype", None) for value in sent].count(np.float32) == 2
    assert sum(isinstance(value, deepstyle.TiledLoss) for value in sent) == 1
    assert first.loss != second.loss


def test_a_worker_that_is_killed_is_replaced_and_its_tile_computed_again(workers, untrained, monkeypatch):
    import ray

    _, shared, x = both(workers, untrained, 96, 96)
    all_ready(workers)
    expected = shared.evaluate(x)
    for worker in workers.free:
        worker.pid = ray.get(worker.__ray_call__.remote(lambda itself: os.getpid()))
    before, next_done = set(workers.free), workers.next_done
    killed: list[int] = []

    def kill_while_it_computes():
        if not killed and len(workers.busy) == 2:
            worker, (_, number) = next(iter(workers.busy.values()))
            os.kill(worker.pid, signal.SIGKILL)
            killed.append(number)
        return next_done()

    monkeypatch.setattr(workers, "next_done", kill_while_it_computes)
    got = shared.evaluate(x)
    assert len(killed) == 1
    assert got.parts == expected.parts
    assert np.array_equal(got.gradient, expected.gradient)
    monkeypatch.undo()
    all_ready(workers)
    assert len(before & set(workers.free)) == 1


def test_what_a_worker_raises_is_raised_here_and_it_goes_on_working(workers, untrained):
    _, shared, x = both(workers, untrained, 96, 48)
    with pytest.raises(UserError, match="loss is no longer finite; lower its weight"):
        shared.evaluate(np.full_like(x, np.nan))
    tiles = shared._tiles(shared.size, ["conv5_2"])

    def fails(tiled, network, tile):
        raise ZeroDivisionError("of a worker")

    for _ in range(workers.number + 1):
        with pytest.raises(ZeroDivisionError, match="of a worker"):
            list(shared.engine._map(tiles, fails, shared.tiled))
    assert np.isfinite(shared.evaluate(x).loss)


def start(picture_files, prefix, *flags, address=None):
    """The command with two workers, in a process group of its own; address: of a cluster."""
    program = IMAGES.parent / "deepstyle.py"
    command = [sys.executable, str(program), *picture_files, str(prefix), *SMALL, "--workers", "2", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_ADDRESS": address} if address else {}
    environment[STARTED_FOR] = str(prefix)
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )


def state_of(prefix):
    with np.load(f"{prefix}_state.npz") as state:
        return int(state["iteration"]), bool(state["partial"])


@pytest.mark.endurance
@pytest.mark.skipif(usable_cores() < 2, reason="two workers need two cores")
def test_a_run_goes_on_with_another_number_of_workers_and_a_stop_saves_the_picture(
    full_network, picture_files, tmp_path, capfd
):
    prefix = tmp_path / "a"
    assert run(picture_files, prefix, "--num_iter", "1") == 0
    process = start(picture_files, prefix, "--num_iter", "100000", "--resume")
    wait_for(Path(f"{prefix}_at_iteration_2.png"), process)
    for _ in range(2):  # to the group, as `timeout` and a terminal send it: Ray's processes are in it
        os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    first, second, _, third, *iterations = out.splitlines()
    assert first == "going on after iteration 1"
    assert second.startswith("painting 32 x 42 pixels on 2 workers with 1 CPU core each of this machine, with ")
    assert third.startswith("in tiles of at most 32 pixels, ")
    assert all(line.startswith("iteration ") for line in iterations)  # nothing of Ray's
    assert re.fullmatch(r"deepstyle: stopped.*, and the same command with --resume goes on from there\n", err)
    assert left_of(prefix, process) == []
    done, partial = state_of(prefix)
    assert done >= 2
    assert Path(f"{prefix}_at_iteration_{done + partial}.png").exists()
    capfd.readouterr()
    assert run(picture_files, prefix, "--num_iter", done + 1, "--resume") == 0
    assert capfd.readouterr().out.startswith(f"going on after iteration {done}\n")
    by_two, by_one = (describe(f"{prefix}_at_iteration_{number}.png", capfd) for number in (2, done + 1))
    begins = re.escape(shlex.join(program()))
    assert re.search(rf"\n{begins} \S+ \S+ \S+ .*--tile 32 --workers 2\n", by_two)
    assert "--workers" not in by_one
    assert "comes close to it" in by_two  # what a run that went on would be by other processes' rounding is not known


@pytest.mark.skipif(usable_cores() < 2, reason="two workers need two cores")
@pytest.mark.endurance  # test_photo_workers has the short form
def test_ctrl_c_while_workers_get_ready_is_one_line_and_no_process_is_left(picture_files, tmp_path):
    prefix = tmp_path / "a"
    process = start(picture_files, prefix)
    assert process.stdout.readline().startswith("painting 32 x 42 pixels on 2 workers")
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.startswith("deepstyle: stopped")
    assert err.count("\n") == 1
    assert left_of(prefix, process) == []


def test_a_cluster_that_is_not_there_is_one_line_and_soon(picture_files, tmp_path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # so that nobody else can
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        process = start(picture_files, tmp_path / "a", address=address)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.startswith(f"deepstyle: error: Ray cannot start: nobody answers at {address}, which RAY_ADDRESS names: ")
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.endurance  # Ray waits for its answer
def test_what_is_no_cluster_is_one_line_and_soon(picture_files, tmp_path):
    with socket.socket() as silent:
        silent.bind(("", 0))
        silent.listen()
        process = start(picture_files, tmp_path / "a", address=f"127.0.0.1:{silent.getsockname()[1]}")
        out, err = process.communicate(timeout=40)
    assert process.returncode == 1
    assert re.fullmatch("deepstyle: error: Ray cannot start: .*cluster.*\n", err)
    assert out == ""


@pytest.fixture
def run_shared(workers, monkeypatch):
    """conftest's run, with those workers that are there already."""
    monkeypatch.setattr(tile_workers, "crew_for", lambda number: workers)
    monkeypatch.setattr(workers, "begin", lambda: "workers")
    monkeypatch.setattr(workers, "end", lambda: None)
    return lambda *arguments: run(*arguments, "--workers", "2")


def test_a_run_without_any_worker_left_ends_with_its_last_picture_and_state(
    workers, run_shared, picture_files, tmp_path, monkeypatch, capfd
):
    import ray

    prefix, start = tmp_path / "a", workers.start

    def still_born():
        worker = start()
        ray.kill(worker)
        return worker

    next_done = workers.next_done

    def die_in_the_second_iteration():
        if Path(f"{prefix}_at_iteration_1.png").exists() and workers.start == start:
            for worker in [*workers.free, *(worker for worker, *_ in workers.busy.values())]:
                ray.kill(worker)
            workers.start = still_born
        return next_done()

    monkeypatch.setattr(workers, "next_done", die_in_the_second_iteration)
    try:
        assert run_shared(picture_files, prefix, "--tile", "32") == 1
    finally:
        monkeypatch.undo()
        workers.start, workers.deaths = start, 0
        while len(workers.busy) + len(workers.free) < workers.number:
            workers.add()
    told = capfd.readouterr().err
    assert re.fullmatch(r"deepstyle: error: no worker is left: 7 died one after another; .*\n", told)
    done, partial = state_of(prefix)
    assert done >= 1
    assert Path(f"{prefix}_at_iteration_{done + partial}.png").exists()
    with np.load(f"{prefix}_state.npz") as state:
        assert np.isfinite(state["x"]).all()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--workers", "0"], "--workers is 0; it must be 1 or more"),
        (["--workers", "-1"], "--workers is -1; it must be 1 or more"),
        (["--workers", "1000000"], "--workers is 1000000; this machine has 2 CPU cores for them"),
        (["--workers", "two"], "argument --workers: expected a whole number, not 'two' (see --help)"),
        (["--tile", "off"], "--tile is off; 2 workers need tiles to share"),
        (["--image_size", "31"], "pixels, but needs at least 32 on each side"),
    ],
)
def test_what_is_wrong_is_said_before_ray_is_started(picture_files, tmp_path, monkeypatch, capfd, flags, said):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(crews, "usable_cores", lambda: 2)
    monkeypatch.setattr(crews.Crew, "begin", lambda self: pytest.fail("Ray was started"))
    assert run(picture_files, tmp_path / "out" / "a", "--workers", "2", *flags) == 2
    told = capfd.readouterr().err
    assert told.startswith("deepstyle: error: ")
    assert said in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_workers_find_the_modules_that_this_process_finds(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    assert crews.environment(1)["env_vars"]["PYTHONPATH"].split(os.pathsep)[-1] == "/somewhere/else"


def test_a_run_of_workers_that_is_not_stopped_is_made_again_by_its_command(run_shared, picture_files, tmp_path, capsys):
    flags = "--image_size", "64", "--tile", "64", "--num_iter", "1", "--scales", "2", "--coarse_iter", "1"
    assert run_shared(picture_files, tmp_path / "a", *flags) == 0
    said = describe(tmp_path / "a_at_iteration_1.png", capsys)
    assert "\nexact: True\n" in said
    assert "\nthis makes it again, as its iteration 1:\n" in said
    assert said.endswith(" --tile 64 --workers 2\n")


def test_workers_that_were_only_starting_when_ray_was_shut_down_are_ended(tmp_path, monkeypatch):
    import ray

    raylet = tmp_path / "raylet"
    raylet.symlink_to(shutil.which("sleep"))
    node = subprocess.Popen([raylet, "60"])
    ours, another = (
        subprocess.Popen(["sleep", "60"], env=os.environ | {"RAY_RAYLET_PID": str(pid)}) for pid in (node.pid, 1)
    )
    crew = crews.Crew(2)
    crew.began = True
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    try:
        assert node.pid in [process.pid for process in crews.raylets_and_theirs()]
        # Not those of the workers that other tests of this file share, which are this process's too.
        monkeypatch.setattr(crews, "raylets_and_theirs", lambda: [psutil.Process(node.pid)])
        crew.end()
        assert node.wait(timeout=5) == ours.wait(timeout=5) == -signal.SIGKILL
        assert another.poll() is None
    finally:
        for process in (node, ours, another):
            process.kill()
            process.wait()


def test_rays_processes_are_not_asked_to_end_by_a_signal_that_they_do_not_get(monkeypatch):
    import ray
    from ray._private import node, worker

    given: list[dict] = []
    assert "allow_graceful" in inspect.signature(node.Node.kill_all_processes).parameters
    monkeypatch.setattr(node.Node, "kill_all_processes", lambda self, **options: given.append(options))
    monkeypatch.setattr(worker, "_global_node", object.__new__(node.Node))
    monkeypatch.setattr(ray, "shutdown", lambda: worker._global_node.kill_all_processes(allow_graceful=True, wait=True))
    monkeypatch.setattr(crews, "raylets_and_theirs", list)
    crew = crews.Crew(2)
    crew.began = True
    crew.end()
    assert given == [{"allow_graceful": False, "wait": True}]


def test_without_ray_it_says_what_brings_it(picture_files, tmp_path, monkeypatch, capfd):
    find = crews.importlib.util.find_spec
    monkeypatch.setattr(crews, "usable_cores", lambda: 2)
    monkeypatch.setattr(crews.importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    assert run(picture_files, tmp_path / "a", "--workers", "2") == 2
    assert "--workers needs the package ray; " in (told := capfd.readouterr().err)
    assert "-m pip install ray' brings it\n" in told
    assert run(picture_files, tmp_path / "a") == 0  # nobody else needs it


def test_each_worker_has_as_many_cores_as_leave_room_for_all_and_a_gpu_where_there_are_any():
    machines = [{"CPU": 16.0}, {"CPU": 8.0}]
    assert [crews.threads_each(n, machines) for n in (1, 2, 3, 4, 24)] == [16, 8, 8, 5, 1]
    with pytest.raises(UserError, match="--workers is 25; Ray has 24 CPU cores for them"):
        crews.threads_each(25, machines)
    machines = [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 64.0}, {"CPU": 4.0, "GPU": 4.0}]
    assert [crews.threads_each(n, machines) for n in (1, 2, 3, 6)] == [16, 8, 4, 1]
    with pytest.raises(UserError, match="--workers is 7; Ray has 6 GPUs for them"):
        crews.threads_each(7, machines)


@pytest.mark.parametrize("size", [(1024, 1024), (4096, 2731), (480, 640)])
@pytest.mark.parametrize("workers", [1, 2, 5, 16])
def test_there_is_a_tile_for_each_worker_and_none_is_larger_than_memory_allows(size, workers):
    for at_most in (None, 512, 300):
        tile = shared_tile(size, at_most, workers, "vgg16", kept=False)
        assert tile <= (at_most or max(size) + 15)
        assert len(tiles_of(size, tile, 96)) >= workers
        # What the plan chose is what the objective takes, and so is what --describe says.
        assert shared_tile(size, tile, workers, "vgg16", kept=True) == tile
        assert shared_tile(size, tile, workers, "vgg16", kept=False) == tile


def test_a_tile_that_was_asked_for_is_kept_unless_it_leaves_a_worker_without():
    assert shared_tile((1024, 1024), 256, 2, "vgg16", kept=True) == 256
    assert shared_tile((1024, 1024), 1024, 4, "vgg16", kept=True) == 512
    assert shared_tile((32, 32), 64, 100, "vgg16", kept=True) == 16


def test_the_plan_counts_every_worker(monkeypatch):
    size, settings = (1024, 1024), Settings(tile="512")
    monkeypatch.setattr(memory, "free_memory", lambda cap: (100e9, 0))
    one, two, four = (plan_memory(size, settings, workers=workers).needed for workers in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one))
    needed = memory.needed_memory(size, 512, 10, settings)
    assert two > 2 * needed.computing + needed.vectors + needed.rest
    monkeypatch.setattr(memory, "free_memory", lambda cap: (two, 0))
    assert plan_memory(size, Settings(tile="512", history=10), workers=2).tile == 512
    with pytest.raises(UserError, match="GB of memory"):
        plan_memory(size, settings, workers=40)
    monkeypatch.setattr(memory, "free_memory", lambda cap: (100e9, 8e9))  # each has a GPU of its own
    assert plan_memory(size, settings, workers=40).tile == 512


def test_why_ray_does_not_start_is_said_with_its_cause_in_one_line():
    failure = ConnectionError("Failed to connect to Ray cluster\nat 192.0.2.2:6379")
    assert crews.why_not(failure) == "Failed to connect to Ray cluster at 192.0.2.2:6379"
    failure.__cause__ = RuntimeError(
        "Traceback:\n  File ...\nAuthenticationError: the token is missing. Note: a page of it\n\n"
    )
    assert crews.why_not(failure).endswith(" at 192.0.2.2:6379; AuthenticationError: the token is missing")
    assert crews.why_not(OSError()) == "OSError"

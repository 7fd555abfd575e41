"""A run of one photo, from what is read to what is saved."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from deepstyle import (
    Evaluation,
    Iteration,
    Stage,
    Watch,
    __version__,
    check_agreement,
    has_enough,
    paint,
    planned,
    saved_size,
    stages_of,
)
from deepstyle_support.backend import import_keras
from deepstyle_support.cache import Cache
from deepstyle_support.convolution import FULL
from deepstyle_support.engine import Engine
from deepstyle_support.lbfgs import curvature_bytes
from deepstyle_support.memory import plan_memory
from deepstyle_support.messages import notify, printable
from deepstyle_support.pictures import Pictures
from deepstyle_support.rounding import computed_with
from deepstyle_support.settings import EVALUATIONS_PER_ITERATION, Settings
from deepstyle_support.weights import Weights, load_weights, trunk_digest

from .files import Outputs
from .inputs import read_inputs
from .job import Job
from .ownership import RunFiles
from .recipe import Recipe
from .saving import save_all
from .state import Saved, read_state
from .terminal import (
    console_for,
    describe_iteration,
    describe_stop,
    getting_ready,
    progress_bar,
    signals_as_requests,
    where_it_goes_on,
)

if TYPE_CHECKING:
    from .tile_workers import TileWorkers


class Ending(NamedTuple):
    """How the run of one photo ended."""

    status: int  # the command's
    painted: bool  # or all was done before
    loss: float | None = None  # the latest
    picture: Path | None = None  # the last that is saved


@dataclasses.dataclass(frozen=True)
class Shared:
    """What the runs of a folder's photos have in common."""

    others: dict[str, Any]  # all pictures but the content, from read_others
    free: tuple[float, float]  # from free_memory: TensorFlow takes a GPU's with the first photo, and keeps it
    weights: Weights
    cache: Cache
    received: list[int]  # signals


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A job that is read, planned and checked, and has touched nothing yet."""

    job: Job
    pictures: Pictures
    stages: list[Stage]
    files: RunFiles
    engine: Engine
    shaped_by: dict[str, str]  # all that decides the pictures, in words
    source: str  # of the weights, in words

    @property
    def bytes_of_curvature(self) -> int:
        """What of the optimiser's curvature is written at the end of the run; SciPy's is not known."""
        return bytes_of_curvature(self.stages[-1], self.engine.plan.history)

    @property
    def factors(self) -> str:
        """The type that convolutions' factors are rounded to; float32 if they are not."""
        return self.engine.factors(self.job.settings.precision)

    def way(self) -> str:
        """What must be the same for a run that goes on to make the same pictures, bit for bit, beside what shapes them.

        Empty if that cannot be known.
        """
        if not self.engine.rounds_as_this_process:
            return ""
        plan, computed = self.engine.plan, computed_with(import_keras().backend.backend(), __version__).values()
        optimizer = self.job.settings.optimizer
        rounded = f"{self.factors} for {self.stages[-1].full_from} evaluations, " if self.factors != FULL else ""
        return f"{optimizer} with {plan.history} corrections, tile {plan.tile}, {rounded}{', '.join(computed)}"


def prepare(job: Job, shared: Shared | None) -> Prepared:
    """Read, plan and check all that a job needs. Raises UserError, and nothing is touched yet."""
    settings = job.settings
    pictures = read_inputs(job, shared.others if shared else None)
    stages, files = stages_of(pictures, settings), RunFiles.of(job)
    workers = workers_of(job)
    make_plan = workers.plan if workers else functools.partial(plan_memory, found=shared.free if shared else None)
    plan = planned(pictures, settings, make_plan, files.bytes_kept)
    check_agreement(pictures, settings)  # after the plan, as in `stylize`
    files.check(job.inputs(), saved_size(pictures, settings), bytes_of_curvature(stages[-1], plan.history))
    files.check_extras_are_ours()
    if shared:
        weights, source = shared.weights, ""
    else:
        weights, source = load_weights(settings.weights, settings.seed, settings.model, job.quiet)
    engine: Engine = (
        workers.engine(plan, weights, settings)
        if workers
        else Engine(plan, weights, settings.padding, shared.cache if shared else None)
    )
    return Prepared(job, pictures, stages, files, engine, what_shapes(pictures, settings, weights), source)


def workers_of(job: Job) -> "TileWorkers | None":
    """The workers that are to share the picture's tiles, if there are to be any. Raises UserError if it cannot be."""
    if job.workers == 1:
        return None
    from .tile_workers import TileWorkers  # only now: nobody else needs Ray

    return TileWorkers(job)


def bytes_of_curvature(full: Stage, history: int) -> int:
    """What of the optimiser's curvature is written when a run ends; of SciPy's none is known."""
    return curvature_bytes(full.size, history) if full.settings.optimizer == "device" else 0


def what_shapes(pictures: Pictures, settings: Settings, weights: Weights) -> dict[str, str]:
    """All that decides a run's pictures, in words; runs of which it differs are not to be mixed."""
    shapes = settings.decisive() | pictures.digests() | {"the weights' SHA-256": trunk_digest(weights)}
    if pictures.start is not None:
        del shapes["--init_image"]  # it is known by its digest, whatever path it has
    return shapes


class Painting(Watch):
    """The painting of a photo as the person sees it: a bar while it goes on, and each iteration saved and shown.

    name: of the photo, of many; then there are only the bar and what is out of the ordinary to see. received: the
    signals that ask it to stop, as they come.
    """

    def __init__(self, prepared: Prepared, outputs: Outputs, received: list[int], name: str, is_shown: bool):
        self.prepared, self.outputs, self.received, self.name = prepared, outputs, received, name
        self.console = console_for(prepared.job.quiet)
        self.is_shown = is_shown
        self.way, before = prepared.way(), outputs.before
        self.is_exact = before is None or (before.way != "" and before.way == self.way)
        self.totals = {stage.size: stage.iterations for stage in prepared.stages}
        self.advance: Callable[[tuple[int, int], int, float], None] = lambda size, count, loss: None

    def run(self) -> Iteration | None:
        """Paint until the end, or until a stop is asked for; returns the last iteration, if there was any."""
        prepared, before = self.prepared, self.outputs.before
        with progress_bar(self.console, self.totals, EVALUATIONS_PER_ITERATION, self.name) as self.advance:
            state = before.state if before else None
            iterations = paint(prepared.pictures, prepared.job.settings, prepared.engine, state, self)
            return save_all(iterations, self.save, self.outputs.finish, self.show, self.should_stop)

    def evaluated(self, size: tuple[int, int], count: int, evaluation: Evaluation) -> None:
        self.advance(size, count, evaluation.loss)
        self.outputs.add_evaluation(size, count, evaluation.losses)

    def should_stop(self) -> bool:
        return bool(self.received)

    def smaller_tiles(self, tile: int) -> None:
        self.is_exact = False
        self.console.print(f"{self.name}out of memory: trying again in tiles of at most {tile} pixels")

    def goes_on_in_full(self, size: tuple[int, int]) -> None:
        stage = self.prepared.stages[-1]
        # The command that makes the pictures again does not end early, and so knows nothing of this.
        self.is_exact &= size != stage.size or not stage.settings.min_improvement
        where = "" if size == stage.size else f"{size[0]} x {size[1]}: "
        self.show(f"{where}from here on convolutions in {FULL}")

    def save(self, iteration: Iteration) -> None:
        """Save and show an iteration."""
        total = self.totals[iteration.state.size]
        exact = self.is_exact and not iteration.state.partial
        path = self.outputs.save(iteration, iteration.number == total, exact, self.way if self.is_exact else "")
        width = self.console.width if self.console.is_terminal else math.inf
        self.show(describe_iteration(iteration, total, path, width))

    def show(self, line: str) -> None:
        if self.is_shown:
            self.console.print(line)


def run(job: Job, shared: Shared | None = None, name: str = "") -> Ending:
    """One photo: check everything, paint, show and save each iteration.

    Of a folder's, by its name, there are only the bar and what is moved aside to see.
    """
    prepared = prepare(job, shared)
    files, engine = prepared.files, prepared.engine
    console, show_note = console_for(job.quiet), (lambda line: None) if job.quiet else notify
    with (
        signals_as_requests(shared.received if shared else None) as received,
        files.owned() as note,
        contextlib.closing(engine),
    ):
        if note and not shared:
            show_note(note)
        defaults = Settings().decisive()
        before = read_state(files.state_path, prepared.shaped_by, defaults) if job.resume else None
        outputs = Outputs(files, prepared.stages, prepared.shaped_by, before, show_note)
        if before and (nothing := why_nothing_to_do(before, prepared)):
            return end_at_once(prepared, outputs, nothing if not shared else "")
        with getting_ready(console):
            device = "" if received else engine.start()
        if received:
            notify(f"{name}stopped before the painting began")
            return Ending(128 + received[0], painted=False)
        if not before and (moved := files.clear_the_way(job.overwrite)):
            console.print(printable(moved) if shared else moved)
        painting = Painting(prepared, outputs, received, name, is_shown=not shared)
        show_beginning(prepared, before, device, painting.show)
        recipe = Recipe.of(job, engine, "CPU" if engine.is_repeatable() else device)
        outputs.begin(recipe, prepared.bytes_of_curvature > 0, painting.is_exact)
        last = painting.run()
        state = before.state if before else None
        if received:
            notify(name + describe_stop(last, state, prepared.stages[-1].size))
            return Ending(128 + received[0], painted=True)
    full = state if state and state.size == prepared.stages[-1].size else None
    done = full.iteration if full else 0
    if early := why_early(last, done, job.settings):
        painting.show(early)
    if last:
        return Ending(0, True, last.loss, files.latest_picture(0 if last.is_coarse else last.number))
    return Ending(0, True, full.losses[-1].total if full else None, files.latest_picture(done))


def show_beginning(prepared: Prepared, before: Saved | None, device: str, show: Callable[[str], None]) -> None:
    """Show what is going to be painted, and how."""
    settings, plan = prepared.job.settings, prepared.engine.plan
    *coarser, full = prepared.stages
    rows, columns = full.size
    if prepared.job.resume:
        show(where_it_goes_on(before.state if before else None, full.size))
    rounds_no_more = before and before.state.in_full and before.state.size == full.size
    how = describe_precision(settings.precision, FULL if rounds_no_more else prepared.factors)
    show(f"painting {rows} x {columns} pixels on {device}{how}")
    if prepared.source:
        show(prepared.source)
    show(plan.describe(settings.history))
    if settings.optimizer == "device" and not prepared.bytes_of_curvature:
        show("what L-BFGS learns would be gigabytes and is not kept: after --resume it is learnt again")
    if coarser and not (before and before.state.size == full.size):
        sizes = (f"{stage.size[0]} x {stage.size[1]}" for stage in coarser)
        show("first " + ", then ".join(sizes) + " pixels")


def describe_precision(precision: str, factors: str) -> str:
    """How convolutions are computed, in words that follow the device's; nothing if it goes without saying."""
    return f", convolutions in {factors}" if factors != FULL or precision == "mixed" else ""


def end_at_once(prepared: Prepared, outputs: Outputs, why: str) -> Ending:
    """End a run that has nothing left to paint; what is missing of it is written."""
    assert outputs.before
    job, state = prepared.job, outputs.before.state
    if outputs.is_behind():
        outputs.begin(Recipe.of(job, prepared.engine, "another device"))
    paths = outputs.finish()
    if why and not job.quiet:
        console = console_for(job.quiet)
        for path in paths:
            console.print(f"saved {path}")
        notify(f"nothing to do: {why}")
    return Ending(0, False, state.losses[-1].total, prepared.files.latest_picture(state.iteration))


def why_nothing_to_do(before: Saved, prepared: Prepared) -> str:
    """Why a run that goes on from this state has nothing left to do, in words; empty if it has."""
    state, settings = before.state, prepared.job.settings
    if state.size != prepared.stages[-1].size:
        return ""
    if state.iteration >= settings.num_iter:
        return f"iteration {state.iteration} is done; a larger --num_iter goes on from there"
    if has_enough(state, settings) and (state.in_full or prepared.factors == FULL):
        least = f"the last iteration improved by less than {settings.min_improvement} %"
        return f"{least}; a smaller --min_improvement goes on from there"
    return ""


def why_early(last: Iteration | None, done: int, settings: Settings) -> str:
    """Why a run that nobody stopped has ended before its time, in words; empty if it has not.

    last: its last iteration, if it had any; done: iterations in full size before.
    """
    number = last.number if last and not last.is_coarse else done
    if last and not last.state.partial:
        if number >= settings.num_iter:
            return ""
        if has_enough(last.state, settings):
            return f"stopped: the last iteration improved by less than {settings.min_improvement} %"
    return "stopped: the optimiser finds no better picture than the last"

"""A run: one photo, or a folder of them, from what is read to what is saved."""

class Shared(NamedTuple):
    """What the runs of a folder's photos have in common."""

    beside: dict[str, Any]  # all pictures but the content, from read_beside
    free: tuple[float, float]  # from free_memory: TensorFlow takes a GPU's with the first photo, and keeps it
    weights: Weights
    reuse: Reuse
    received: list[int]  # signals


class Computing(NamedTuple):
    """How a run computes: in this process, or as another program has it that is this one in all else."""

    plan: Callable[[tuple[int, int], Settings, Held, tuple[float, float] | None], Plan] = plan_memory
    device: Callable[[], str] = describe_device  # in words; it must be there before anything is moved
    make: Callable[..., Objective] = Objective
    program: tuple[str, ...] = ("deepstyle.py",)  # and flags of its own, for the command that makes the picture again
    end: Callable[[], None] = lambda: None  # lets go of what `device` has begun
    repeatable: Callable[[], bool] = on_cpu  # whether sums are rounded alike from run to run, on the same machine


HERE = Computing()


def run(
    arguments: argparse.Namespace,
    settings: Settings,
    shared: Shared | None = None,
    name: str = "",
    computing: Computing = HERE,
) -> Ending:
    """One photo: check everything, paint, show and save each iteration.

    Of a folder's, by its name, there are only the bar and what is moved aside to see.
    """
    pictures = read_inputs(arguments, settings, shared.beside if shared else None)
    *coarser, size = picture_sizes(pictures.content.shape, settings)
    outputs = outputs_of(arguments)
    totals = iterations_at_sizes([*coarser, size], settings)
    plan = planned(pictures, settings, computing.plan, shared.free if shared else None, outputs)
    outputs.keeps = kept_bytes(size, plan.history) if settings.optimizer == "device" else 0
    check_agreement(pictures, settings)  # after the plan, as in `stylize`
    outputs.check(input_paths(arguments, settings), saved_size(pictures, settings))
    outputs.check_extras_are_ours()
    named = settings.weights, settings.seed, settings.model, arguments.quiet
    weights, source = (shared.weights, "") if shared else load_weights(*named)
    console = console_for(arguments.quiet)
    show: Callable[[str], None] = (lambda line: None) if shared else console.print
    shapes, defaults = what_shapes(pictures, settings, weights), Settings().decisive()

    def begin(state: State | None, device: str) -> None:
        device = "CPU" if computing.repeatable() else device
        outputs.made = how_it_is_made(arguments, settings, plan, computing.program, device)
        outputs.begin(
            lambda: shown_picture(start_picture(pictures, size, settings), size, pictures, settings),
            totals,
            state,
            pictures.named(),
            dataclasses.asdict(Settings()),
        )

    with (
        signals_as_wishes(shared.received if shared else None) as received,
        outputs.owned() as note,
        contextlib.ExitStack() as at_the_end,
    ):
        at_the_end.callback(computing.end)
        if note and not shared:
            outputs.note(note)
        state = read_state(outputs.state_path, shapes, defaults) if arguments.resume else None
        full = state if state and state.size == size else None
        done = full.iteration if full else 0
        if state:
            outputs.expect(state, not full, lambda: shown_picture(state.x, size, pictures, settings))
        if full and (nothing := why_nothing_to_do(full, settings)):
            if outputs.is_behind(full):
                begin(full, "another device")
            for path in outputs.finish():
                show(f"saved {path}")
            if not (arguments.quiet or shared):
                tell(f"nothing to do: {nothing}")
            return Ending(0, False, float(full.losses[-1][0]), outputs.latest_picture(done))
        device = computing.device()
        if received:
            tell(f"{name}stopped before the painting began")
            return Ending(128 + received[0], False)
        if not state and (moved := outputs.clear_the_way(arguments.overwrite)):
            console.print(printable(moved) if shared else moved)
        if arguments.resume:
            show(where_it_goes_on(state, size))
        show(f"painting {size[0]} x {size[1]} pixels on {device}; {source}")
        show(plan.in_words(settings.history))
        if settings.optimizer == "device" and not outputs.keeps:
            show("what L-BFGS learns would be gigabytes and is not kept: after --resume it is learnt again")
        if coarser and not full:
            show("first " + ", then ".join(f"{rows} x {columns}" for rows, columns in coarser) + " pixels")

        def on_smaller_tiles(tile: int) -> None:
            console.print(f"{name}out of memory: trying again in tiles of at most {tile} pixels")

        begin(state, device)
        with progress_bar(console, totals, EVALUATIONS_PER_ITERATION, name) as advance:

            def on_evaluation(size: tuple[int, int], count: int, evaluation: Evaluation) -> None:
                advance(size, count, evaluation.loss)
                outputs.add_evaluation(size, count, loss_row(evaluation))

            reuse = shared.reuse if shared else None
            watch = on_evaluation, lambda: bool(received), on_smaller_tiles
            iterations = paint(pictures, settings, weights, plan, state, *watch, reuse, computing.make)
            last = save_all(iterations, outputs, totals, show, lambda: bool(received))
        if received:
            tell(name + describe_stop(last, state, size))
            return Ending(128 + received[0], True)
    if early := why_early(last, done, settings):
        show(early)
    if last:
        return Ending(0, True, last.loss, outputs.latest_picture(0 if last.coarse else last.number))
    return Ending(0, True, float(full.losses[-1][0]) if full else None, outputs.latest_picture(done))


def why_nothing_to_do(state: State, settings: Settings) -> str:
    """Why a run that goes on from this state, of full size, has nothing left to do, in words; empty if it has."""
    if state.iteration >= settings.num_iter:
        return f"{state.iteration} iterations are done; a larger --num_iter goes on from there"
    ended = state.iteration and not state.partial
    if ended and is_enough(state.iteration, improvement_of(*state.losses[-2:, 0]), settings):
        least = f"the last iteration improved by less than {settings.min_improvement} %"
        return f"{least}; a smaller --min_improvement goes on from there"
    return ""


def why_early(last: Iteration | None, done: int, settings: Settings) -> str:
    """Why a run that nobody stopped has ended before its time, in words; empty if it has not.

    last: its last iteration, if it had any; done: iterations in full size before.
    """
    number = last.number if last and not last.coarse else done
    if last and not last.state.partial:
        if number >= settings.num_iter:
            return ""
        if is_enough(number, last.improvement, settings):
            return f"stopped: the last iteration improved by less than {settings.min_improvement} %"
    return "stopped: the optimiser finds no better picture than the last"


def run_folder(arguments: argparse.Namespace, settings: Settings) -> int:
    """A run of each photo of a folder, one after another. Returns the exit status.

    What is wrong with all of them is raised before anything is created; what is wrong with one is told, and at the end
    once more, and stops no other.
    """
    free = free_memory(settings.max_memory)
    batch, beside = check_folder(arguments, settings, free)
    for photo in batch.photos:
        with batch.failures(photo):
            photo.check()
            picture_sizes(shape_of(str(photo.path), arguments.allow_large), settings)
    if not batch.left():
        return batch.end()
    weights, source = load_weights(settings.weights, settings.seed, settings.model, arguments.quiet)
    batch.show(f"painting {counted(len(batch.left()), 'photo')} on {describe_device()}; {source}")
    with signals_as_wishes() as received, batch.owned(arguments.report) as note:
        if note and not arguments.quiet:
            tell(note)
        shared = Shared(beside, free, weights, Reuse(), received)
        for photo in batch.left():
            if not received:
                with batch.failures(photo), batch.line_for(photo) as name:
                    photo.ending = run(arguments_for(photo, arguments), settings, shared, name)
                if arguments.report:
                    batch.write_page(arguments.report, arguments.content, arguments.style)
        return batch.end(128 + received[0] if received else 0)


def check_folder(
    arguments: argparse.Namespace, settings: Settings, free: tuple[float, float]
) -> tuple[Batch, dict[str, Any]]:
    """The photos, and the pictures that all share. Raises UserError for what is wrong whatever the photo."""
    folder, results = Path(arguments.content), base_path(os.path.join(arguments.prefix, "")).parent
    batch = Batch(photos_in(folder, results), results, console_for(arguments.quiet).print, arguments.debug)
    common = arguments_for(Photo(folder, results), arguments)
    outputs_of(common).check(input_paths(common, settings), (SMALLEST, SMALLEST))
    if arguments.report:
        batch.check_page(arguments.report)
    beside = read_beside(arguments, settings)
    # What a square photo would be refused for is no photo's fault, but that it is too large.
    square = Pictures(np.zeros((SMALLEST, SMALLEST, 3), np.uint8), **beside)
    with contextlib.suppress(TooLarge):
        planned(square, settings, free=free)
        check_agreement(square, settings)
    if not arguments.quiet and (passed_over := folders_in(folder, results)):
        tell(f"folders in '{folder}' are not looked into: {words(passed_over)}")
    return batch, beside


MASKS = ("style_masks", "content_mask", "color_mask")


def how_it_is_made(
    arguments: argparse.Namespace,
    settings: Settings,
    plan: Plan,
    program: tuple[str, ...] = HERE.program,
    device: str = "CPU",
) -> dict[str, Any]:
    """All that a picture's text says of its command: with the plan as it was, however much memory there is later.

    It does not end early: a run that was gone on with may have made pictures that come after such an end.
    """
    planned = {"tile": str(plan.tile or "off"), "history": plan.history, "max_memory": 0.0, "min_improvement": 0.0}
    return {
        "version": __version__,
        "program": program,
        "settings": dataclasses.asdict(settings) | planned,
        "pictures": [arguments.content, *arguments.style],
        "prefix": arguments.prefix,
        "masks": {name: getattr(arguments, name) for name in MASKS if getattr(arguments, name)},
        "allow_large": arguments.allow_large,
        "backend": (backend := import_keras().backend.backend()),
        "device": device,
        "computed with": computed_with(backend, __version__),
    }


def way_of_computing(settings: Settings, plan: Plan) -> str:
    """What must be the same for a run that goes on to make the same pictures, bit for bit, beside what shapes them."""
    computed = computed_with(import_keras().backend.backend(), __version__).values()
    return f"{settings.optimizer} with {plan.history} corrections, tile {plan.tile}, {', '.join(computed)}"


def what_shapes(pictures: Pictures, settings: Settings, weights: Weights) -> dict[str, str]:
    """All that decides a run's pictures, in words; runs of which it differs are not to be mixed."""
    shapes = settings.decisive() | pictures.digests() | {"the weights' SHA-256": trunk_digest(weights)}
    if pictures.start is not None:
        del shapes["--init_image"]  # it is known by its digest, whatever path it has
    return shapes

#!/usr/bin/env python3
"""Paint a list of pictures on all machines of a Ray cluster, or on this one alone.

    python examples/many_pictures.py jobs.txt results --image_size 400 --workers 2

A line of jobs.txt is "CONTENT STYLE", paths that each machine can read, in quotes if there are spaces in them; the last
picture of line n becomes results/n.png, and one that is there already is left as it is. A job that fails is reported at
the end, and does not stop the others. Needs the package ray. On a cluster that is running, set RAY_ADDRESS=auto; it
decides how many jobs run at a time, each with as many cores as it would have here.
"""

import argparse
import importlib.util
import os
import shlex
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER))
from deepstyle_app.command import Parser  # noqa: E402, it is not installed but lies above
from deepstyle_app.workers import start_ray  # noqa: E402
from deepstyle_support.limits import usable_cores  # noqa: E402
from deepstyle_support.messages import UserError, printable, say, tell  # noqa: E402
from deepstyle_support.settings import Settings  # noqa: E402


def paint(content: str, style: str, out: str, threads: int, options: dict) -> str:
    """One job, in a process of its own: `out` is its last picture. Returns why there is none, in words.

    It raises nothing: Ray's text of an error cannot have a name that is no UTF-8, and the worker would die of it.
    """
    os.environ["TF_NUM_INTRAOP_THREADS"] = str(threads)
    sys.path.insert(0, str(FOLDER))
    from PIL import Image

    import deepstyle
    from deepstyle_support.disk import write_whole
    from deepstyle_support.messages import UserError
    from deepstyle_support.profiles import png_tags

    try:
        pictures = (deepstyle.read_picture(path)[0] for path in (content, style))
        picture = None
        for iteration in deepstyle.stylize(*pictures, **options):
            picture = Image.fromarray(iteration.picture)
        if not picture:
            return "the optimiser finds no better picture than the content"
        write_whole(Path(out), lambda file: picture.save(file, format="PNG", pnginfo=png_tags()))
        return ""
    except Exception as error:
        return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def jobs_in(path: Path, results: Path) -> tuple[list[tuple[str, str, str, str]], list[str]]:
    """(line, content, style, picture to make) of each line whose picture is not there; and what is wrong with others.

    A name in the list may be no text in any encoding, as on the disk. Raises UserError if the list cannot be read.
    """
    try:
        lines = path.read_text("utf-8-sig", "surrogateescape").split("\n")
    except FileNotFoundError as error:
        raise UserError(f"there is no file '{path}'") from error
    except OSError as error:
        raise UserError(f"cannot read the list '{path}': {error.strerror}") from error
    jobs, wrong = [], []
    for number, line in enumerate(lines, 1):
        out = os.path.abspath(results / f"{number}.png")
        if line.strip() and not os.path.exists(out):
            try:
                content, style = map(os.path.abspath, shlex.split(line))
                jobs.append((line, content, style, out))
            except ValueError:
                wrong.append(f"line {number}, '{line}': it must be CONTENT STYLE")
    return jobs, wrong


def paint_all(jobs: list[tuple[str, str, str, str]], threads: int, workers: int, options: dict) -> int:
    """Paint them all, and say how each ended. Returns how many failed. Raises UserError if Ray cannot start."""
    start_ray(threads * workers)
    import ray

    failed = 0
    try:
        task = ray.remote(num_cpus=threads, max_calls=1, max_retries=1)(paint)
        running = {task.remote(*paths, threads, options): (line, paths[-1]) for line, *paths in jobs}  # type: ignore[call-arg]
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            line, out = running.pop(done)
            try:
                failure = ray.get(done)
            except ray.exceptions.RayError as error:  # of a worker that died
                failure = str(error)
            if failure:
                failed += 1
                tell(printable(f"failed: {line}: {' '.join(failure.split())}"))
            else:
                say(out)
    finally:
        ray.shutdown()
    return failed


def command_line() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", type=Path, help="a text file, a line per picture: CONTENT STYLE")
    parser.add_argument("results", type=Path, help="the folder for the pictures")
    parser.add_argument("--workers", type=int, default=1, help="jobs at a time on this machine, which share its cores")
    parser.add_argument("--image_size", type=int, default=400)
    parser.add_argument("--num_iter", type=int, default=10)
    parser.add_argument("--weights")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """All of the list. Returns how many lines failed. Raises UserError for what is wrong before any is begun."""
    options = {name: getattr(arguments, name) for name in ("image_size", "num_iter", "weights")}
    Settings(**options)
    if arguments.workers < 1:
        raise UserError("--workers must be 1 or more")
    if os.path.exists(arguments.results) and not os.path.isdir(arguments.results):
        raise UserError(f"'{arguments.results}' is no folder")
    jobs, wrong = jobs_in(arguments.jobs, arguments.results)
    if not importlib.util.find_spec("ray"):
        raise UserError(f"this needs the package ray; '{sys.executable} -m pip install ray' brings it")
    try:
        arguments.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder '{arguments.results}': {error.strerror}") from error
    for line in wrong:
        tell(printable(f"failed: {line}"))
    threads = max(1, usable_cores() // arguments.workers)
    return len(wrong) + (paint_all(jobs, threads, arguments.workers, options) if jobs else 0)


def main(argv: list[str] | None = None) -> int:
    try:
        return 1 if run(command_line().parse_args(argv)) else 0
    except KeyboardInterrupt:
        tell("interrupted; the same command paints what is not there yet")
        return 130
    except UserError as error:
        tell(f"error: {error}")
        sys.exit(error.status)


if __name__ == "__main__":
    sys.exit(main())

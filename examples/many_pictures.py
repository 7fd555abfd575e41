#!/usr/bin/env python3
"""Paint a list of pictures on all machines of a Ray cluster, or on this one alone.

    python examples/many_pictures.py jobs.txt results --image_size 400 --workers 2

A line of jobs.txt is "CONTENT STYLE", paths that each machine can read, in quotes if there are spaces in them; the last
picture of line n becomes results/n.png, and one that is there already is left as it is. A job that fails is reported at
the end, and does not stop the others. Needs the package ray. On a cluster that is running, set RAY_ADDRESS=auto; it
decides how many jobs run at a time, each with as many cores as it would have here.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

import ray

FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER))
from deepstyle_support.limits import usable_cores  # noqa: E402


def paint(content: str, style: str, out: str, threads: int, options: dict) -> str:
    """One job, in a process of its own: `out` is its last picture, and is returned."""
    os.environ["TF_NUM_INTRAOP_THREADS"] = str(threads)
    sys.path.insert(0, str(FOLDER))
    from PIL import Image

    import deepstyle
    from deepstyle_support.disk import write_whole
    from deepstyle_support.profiles import png_tags

    pictures = (deepstyle.read_picture(path)[0] for path in (content, style))
    *_, last = deepstyle.stylize(*pictures, **options)
    write_whole(Path(out), lambda file: Image.fromarray(last.picture).save(file, format="PNG", pnginfo=png_tags()))
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", type=Path, help="a text file, a line per picture: CONTENT STYLE")
    parser.add_argument("results", type=Path, help="the folder for the pictures")
    parser.add_argument("--workers", type=int, default=1, help="jobs at a time on this machine, which share its cores")
    parser.add_argument("--image_size", type=int, default=400)
    parser.add_argument("--num_iter", type=int, default=10)
    parser.add_argument("--weights")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        parser.error("--workers must be 1 or more")
    if not arguments.jobs.is_file():
        parser.error(f"there is no file '{arguments.jobs}'")
    if arguments.results.exists() and not arguments.results.is_dir():
        parser.error(f"'{arguments.results}' is no folder")
    arguments.results.mkdir(parents=True, exist_ok=True)
    options = {name: getattr(arguments, name) for name in ("image_size", "num_iter", "weights")}
    threads = max(1, usable_cores() // arguments.workers)
    here = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": threads * arguments.workers, "include_dashboard": False}
    jobs, failed = [], 0
    for number, line in enumerate(arguments.jobs.read_text().splitlines(), 1):
        out = (arguments.results / f"{number}.png").resolve()
        if line.strip() and not out.exists():
            try:
                content, style = (str(Path(path).resolve()) for path in shlex.split(line))
                jobs.append((line, content, style, str(out)))
            except ValueError:
                failed += 1
                print(f"failed: line {number}, '{line}': it must be CONTENT STYLE", file=sys.stderr)
    with ray.init(**here):
        task = ray.remote(num_cpus=threads, max_calls=1, max_retries=1)(paint)
        running = {task.remote(*paths, threads, options): line for line, *paths in jobs}  # type: ignore[call-arg]
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            line = running.pop(done)
            try:
                print(ray.get(done), flush=True)
            except ray.exceptions.RayError as error:  # also of a worker that died
                failed += 1
                print(f"failed: {line}: {getattr(error, 'cause', None) or error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""What a run writes besides its pictures and state: the log, TensorBoard's events, the animation."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .disk import write_whole
from .profiles import srgb_profile
from .records import Iteration
from .transparency import laid_on

Log = Callable[[Iteration], None]


def csv_log(path: Path) -> Log:
    """A function that writes a row of losses for an iteration to the file, behind those of the iterations before it."""

    def log(iteration: Iteration) -> None:
        rows, columns = iteration.state.size
        row: dict[str, float] = {"rows": rows, "columns": columns, "iteration": iteration.number}
        row |= {"evaluations": iteration.evaluations, "seconds": iteration.seconds}
        row |= {"loss": iteration.loss, **iteration.parts}
        there = path.read_text(errors="replace").splitlines() if path.exists() else []
        if there and there[0].startswith("iteration,"):  # 0.2.0 logged the last size only, and did not say which
            there = [f"{rows},{columns},{line}" for line in there]
        matches = [(re.match(r"(\d+),\d+,(\d+),", line), line) for line in there]
        before = [
            line for found, line in matches if found and (int(found[1]), int(found[2])) < (rows, row["iteration"])
        ]
        lines = [",".join(row), *before, ",".join(map(str, row.values())), ""]
        write_whole(path, lambda file: file.write("\n".join(lines).encode()))

    return log


def tensorboard_log(folder: Path) -> Log:
    """A function that writes an iteration's losses and picture where TensorBoard looks for them."""
    import tensorflow as tf

    writer = tf.summary.create_file_writer(str(folder))

    def log(iteration: Iteration) -> None:
        rows, columns = iteration.state.size
        group = f"{rows}x{columns}/" if iteration.coarse else ""  # by what is before the slash
        with writer.as_default(step=iteration.number):
            for name, value in {"loss": iteration.loss, **iteration.parts}.items():
                tf.summary.scalar(group + name.replace(" conv", "/conv"), value)
            tf.summary.image(f"{group}picture", iteration.own_size[None])
        writer.flush()

    return log


def write_animation(path: Path, frames: list[np.ndarray]) -> None:
    """Save pictures, (H, W, 3) uint8 RGB, as a .gif, .webp or .mp4 that shows the last one for two seconds.

    Of transparent ones, (H, W, 4), a .webp keeps the alpha, a .gif what is more than half opaque, and a .mp4, which
    has none, shows them on white. A .webp is tagged as sRGB, which the others are taken for.
    """
    import imageio.v3

    frames = [with_alpha_that_shows(frame, path.suffix, frames[0].shape[2]) for frame in frames]
    if path.suffix == ".mp4":  # which has whole pairs of pixels only, and one duration for all frames
        rows, columns = (length // 2 * 2 for length in frames[0].shape[:2])
        frames = [frame[:rows, :columns] for frame in [*frames, *frames[-1:] * 6]]
        options: dict[str, Any] = {"plugin": "FFMPEG", "fps": 4, "macro_block_size": 2}
    else:
        options = {"plugin": "pillow", "duration": [250] * (len(frames) - 1) + [2000], "loop": 0}
        options |= {"icc_profile": srgb_profile()} if path.suffix == ".webp" else {}
    data = imageio.v3.imwrite("<bytes>", np.stack(frames), extension=path.suffix, **options)
    write_whole(path, lambda file: file.write(data))


def with_alpha_that_shows(frame: np.ndarray, kind: str, channels: int) -> np.ndarray:
    """A frame with what this kind of file can have of its alpha, in files whose first frame has 3 or 4 channels."""
    if channels == 3 or kind == ".mp4":
        return laid_on(frame, "white")
    frame = np.array(Image.fromarray(frame).convert("RGBA"))  # one that was saved, and turned out opaque, lacks it
    if kind == ".gif":
        frame[..., 3] = np.where(frame[..., 3] > 127, 255, 0)
    return frame

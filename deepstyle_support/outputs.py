"""What a run writes besides its pictures and state: the log, TensorBoard's events, the animation."""

import io
import os
import re
import socket
import time
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


def events_path(folder: Path) -> Path:
    """A new file in the folder, named as TensorBoard names its events."""
    now = time.time_ns()
    return folder / f"events.out.tfevents.{now // 10**9:010}.{socket.gethostname()}.{os.getpid()}.{now % 10**9}"


def tensorboard_log(path: Path) -> Log:
    """A function that writes an iteration's losses and picture to a file that TensorBoard looks for.

    It needs no TensorFlow, which would take a GPU's memory beside another backend: TensorBoard's own writer of files
    loads it where it is installed, so only its records and messages are used. There is no file before there is an
    iteration.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb
    from tensorboard.summary.writer.record_writer import RecordWriter

    def write(*events: Any) -> None:
        with path.open("ab") as file:
            for event in events:
                RecordWriter(file).write(event.SerializeToString())

    def log(iteration: Iteration) -> None:
        rows, columns = iteration.state.size
        group = f"{rows}x{columns}/" if iteration.coarse else ""  # by what is before the slash
        losses = {"loss": iteration.loss, **iteration.parts}
        shown = [scalar_pb(group + name.replace(" conv", "/conv"), value) for name, value in losses.items()]
        shown.append(Summary(value=[picture_value(f"{group}picture", iteration.own_size)]))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        write(*(Event(wall_time=time.time(), step=iteration.number, summary=summary) for summary in shown))

    return log


def picture_value(tag: str, picture: np.ndarray) -> Any:
    """A picture, (H, W, 3) uint8 RGB, as TensorBoard's summaries hold it: its columns, its rows and a PNG, as texts."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.image.metadata import create_summary_metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    png = io.BytesIO()
    Image.fromarray(picture).save(png, format="PNG")
    rows, columns = picture.shape[:2]
    texts = make_tensor_proto([str(columns).encode(), str(rows).encode(), png.getvalue()])
    metadata = create_summary_metadata(display_name=None, description=None)
    return Summary.Value(tag=tag, tensor=texts, metadata=metadata)


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
        durations = [250] * (len(frames) - 1) + [2000]
        # Of one picture alone Pillow takes one number alone.
        options = {"plugin": "pillow", "duration": durations if len(frames) > 1 else durations[0], "loop": 0}
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

"""What a run writes besides its pictures and state: the log, TensorBoard's events, the animation."""

import io
import os
import re
import socket
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from deepstyle import Iteration, State
from deepstyle_support.disk import write_whole
from deepstyle_support.messages import UserError
from deepstyle_support.profiles import srgb_profile
from deepstyle_support.transparency import on_colour


def log_rows(iteration: Iteration) -> list[str]:
    """A log's header, and its row of this iteration's losses."""
    rows, columns = iteration.state.size
    row: dict[str, float] = {"rows": rows, "columns": columns, "iteration": iteration.number}
    row |= {"evaluations": iteration.state.evaluations, "seconds": iteration.seconds}
    row |= {"loss": iteration.loss, **iteration.parts}
    return [",".join(row), ",".join(map(str, row.values()))]


def latest_rows(rows: list[str]) -> list[str]:
    """A log's header, and of the rows the last for each iteration: of one that was stopped there is an earlier one."""
    return [*rows[:1], *{tuple(row.split(",")[:3]): row for row in rows[1:]}.values()]


def read_log(path: Path, state: State) -> list[str]:
    """The header and the rows of a log that there are, up to this state; of a log by an earlier version."""
    there = path.read_text(errors="replace").splitlines() if path.exists() else []
    if there and there[0].startswith("iteration,"):  # 0.2.0 logged the last size only, and did not say which
        sizes = "rows,columns", *[f"{state.size[0]},{state.size[1]}"] * (len(there) - 1)
        there = [f"{size},{row}" for size, row in zip(sizes, there, strict=True)]
    found = [(re.match(r"(\d+),\d+,(\d+),", row), row) for row in there]
    last = state.size[0], state.iteration + state.partial
    return there[:1] + [row for match, row in found if match and (int(match[1]), int(match[2])) <= last]


def write_log(path: Path, rows: list[str]) -> None:
    """Write the header and the latest rows. Raises UserError, status 1, if the disk does not take it."""
    write_whole(path, lambda file: file.write("\n".join([*latest_rows(rows), ""]).encode()))


def events_path(folder: Path) -> Path:
    """A new file in the folder, named as TensorBoard names its events."""
    now = time.time_ns()
    return folder / f"events.out.tfevents.{now // 10**9:010}.{socket.gethostname()}.{os.getpid()}.{now % 10**9}"


def write_events(
    path: Path, size: tuple[int, int], coarse: bool, number: int, losses: dict[str, float], picture: np.ndarray | None
) -> None:
    """Write an iteration's losses and its picture, if that is there, to a file that TensorBoard looks for.

    It needs no TensorFlow, which would take a GPU's memory beside another backend: TensorBoard's own writer of files
    loads it where it is installed, so only its records and messages are used.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb
    from tensorboard.summary.writer.record_writer import RecordWriter

    group = events_group(size) if coarse else ""  # by what is before the slash
    summaries = [scalar_pb(group + name.replace(" conv", "/conv"), value) for name, value in losses.items()]
    if picture is not None:
        summaries.append(Summary(value=[picture_value(f"{group}picture", picture)]))
    events = [Event(wall_time=time.time(), step=number, summary=summary) for summary in summaries]
    if not path.exists():
        events.insert(0, Event(wall_time=time.time(), file_version="brain.Event:2"))
    try:
        with path.open("ab") as file:
            for event in events:
                RecordWriter(file).write(event.SerializeToString())
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}", status=1) from error


def events_group(size: tuple[int, int]) -> str:
    """What TensorBoard's names of a coarse size begin with."""
    return f"{size[0]}x{size[1]}/"


def iterations_in_events(path: Path) -> set[tuple[str, int]]:
    """The group, which is empty in full size, and the number of each iteration whose loss is in TensorBoard's file.

    What is behind a damaged event does not count: nobody can tell where the next one begins.
    """
    from tensorboard.compat.proto.event_pb2 import Event

    found, data, at = set(), path.read_bytes(), 0
    while at + 12 <= len(data):  # a record: its length, a checksum, the event, and another checksum
        end = at + 12 + struct.unpack_from("<Q", data, at)[0]
        if end > len(data):  # a killed run was writing it
            break
        try:
            event = Event.FromString(data[at + 12 : end])
        except Exception:  # DecodeError, of a package that TensorBoard brings
            break
        tags = [value.tag for value in event.summary.value if re.fullmatch(r"(\d+x\d+/)?loss", value.tag)]
        found |= {(tag.removesuffix("loss"), event.step) for tag in tags}
        at = end + 4
    return found


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


# Pixels a side: of a GIF, of a WebP file, and what x264, which makes MP4s, takes.
MAX_SIDE = {".gif": 65535, ".webp": 16383, ".mp4": 16384}
MAX_PIXELS_OF_MP4 = 2**28 - 1  # pixels with 128 more a side, as FFmpeg counts them


def check_animation(path: Path, size: tuple[int, int]) -> None:
    """Raise UserError if this kind of file cannot show pictures of (rows, columns)."""
    most = MAX_SIDE[path.suffix]
    too_many = path.suffix == ".mp4" and (size[0] + 128) * (size[1] + 128) >= MAX_PIXELS_OF_MP4
    if max(size) > most or too_many:
        others = [kind for kind, limit in MAX_SIDE.items() if kind != ".mp4" and max(size) <= limit]
        advice = f"give it a name in {' or '.join(others)}, or " if others else ""
        limit = "268 million pixels" if max(size) <= most else f"{most} pixels a side"
        raise UserError(
            f"--animation is '{path}'; a {path.suffix} file has at most {limit}, and the pictures have "
            f"{size[0]} x {size[1]}: {advice}leave it out"
        )


def write_animation(path: Path, frames: list[np.ndarray], about: str) -> None:
    """Save pictures, (H, W, 3) uint8 RGB, as a .gif, .webp or .mp4 that shows the last one for two seconds.

    Of transparent ones, (H, W, 4), a .webp keeps the alpha, a .gif what is more than half opaque, and a .mp4, which
    has none, shows them on white. A .webp is tagged as sRGB, which the others are taken for. `about` is ASCII, and
    goes into the file as it is. Raises UserError, status 1, if it cannot be made or the disk does not take it.
    """
    import imageio.v3

    frames = [with_alpha_that_shows(frame, path.suffix, frames[0].shape[2]) for frame in frames]
    if path.suffix == ".mp4":  # which has whole pairs of pixels only, and one duration for all frames
        rows, columns = (length // 2 * 2 for length in frames[0].shape[:2])
        frames = [frame[:rows, :columns] for frame in [*frames, *frames[-1:] * 6]]
        options: dict[str, Any] = {"plugin": "FFMPEG", "fps": 4, "macro_block_size": 2}
        options |= {"ffmpeg_log_level": "quiet", "output_params": ["-metadata", f"comment={about}"]}
    else:
        durations = [250] * (len(frames) - 1) + [2000]
        # Pillow takes a list for several frames only.
        options = {"plugin": "pillow", "duration": durations if len(frames) > 1 else durations[0], "loop": 0}
        options |= {"comment": about.encode()} if path.suffix == ".gif" else with_text(about)
    data = imageio.v3.imwrite("<bytes>", np.stack(frames), extension=path.suffix, **options)
    if not data:  # FFmpeg has failed, and nobody says so
        raise UserError(f"cannot make '{path}': FFmpeg gives nothing for {len(frames)} frames", status=1)
    write_whole(path, lambda file: file.write(data))


def with_text(about: str) -> dict[str, Any]:
    """Pillow's options for a WebP file of sRGB with a description."""
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = about
    return {"icc_profile": srgb_profile(), "exif": exif}


def with_alpha_that_shows(frame: np.ndarray, kind: str, channels: int) -> np.ndarray:
    """A frame with what this kind of file can have of its alpha, in files whose first frame has 3 or 4 channels."""
    if channels == 3 or kind == ".mp4":
        return on_colour(frame, "white")
    frame = np.array(Image.fromarray(frame).convert("RGBA"))  # one that was saved, and turned out opaque, lacks it
    if kind == ".gif":
        frame[..., 3] = np.where(frame[..., 3] > 127, 255, 0)
    return frame

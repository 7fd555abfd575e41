"""The command: its arguments, and `main`, which returns the exit status."""

import argparse
import dataclasses
import difflib
import functools
import itertools
import sys
from typing import Any, NoReturn

from deepstyle import __version__
from deepstyle_support.messages import Stream, UserError, answer, as_typed, describe_error, notify, require_choice
from deepstyle_support.settings import (
    IN_ALL_PRESETS,
    OF_EACH_PRESET,
    PRESETS,
    TIMES_OF_PRESETS,
    Settings,
    flags_in_words,
)
from deepstyle_support.values import ON_OFF, name_of, value_of

from .folder import is_many, run_many
from .info import page
from .job import Job
from .recipe import description
from .run import run
from .terminal import fill_closed_descriptors, without_warnings


class Parser(argparse.ArgumentParser):
    """argparse, with errors raised for `main` to show in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{self.nearest_flag(message)} (see --help)")

    def nearest_flag(self, message: str) -> str:
        """What may have been meant by the first flag that there is not."""
        unknown, flags = message.removeprefix("unrecognized arguments: "), self._option_string_actions
        nearest = difflib.get_close_matches(unknown.split()[0], flags, n=1) if unknown != message else []
        return f"; did you mean {nearest[0]}?" if nearest else ""

    def _print_message(self, message: str, file: object = None) -> None:  # --help and --version have no other way
        answer(message.rstrip("\n"))


class Describe(argparse.Action):
    """--describe: as with --version, nothing else is done."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: object, path: Any, option: object = None) -> None:
        answer(description(path, dataclasses.asdict(Settings()), __version__, Stream("stdout").encoding))
        parser.exit()


class Info(argparse.Action):
    """--info: nothing else is done either."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: object, none: Any, option: object = None) -> None:
        answer(page())
        parser.exit()


def command_line() -> Parser:
    """The parser of the command's arguments."""
    parser = Parser(
        prog="deepstyle",
        usage="%(prog)s CONTENT STYLE [STYLE ...] PREFIX [flags]",
        description="Paint the CONTENT picture in the style of the STYLE picture, or of several.",
        epilog="docs/flags.md says more of each flag, with pictures.",
        add_help=False,  # it is with --version
        allow_abbrev=False,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=30),
    )
    parser.add_argument("content", metavar="CONTENT", help="the photo to paint, or a folder of photos")
    parser.add_argument("style", metavar="STYLE", nargs="+", help="the style's picture, or a folder of them")
    parser.add_argument("prefix", metavar="PREFIX", help="pictures are PREFIX_at_iteration_N.png; or a folder")
    group = parser.add_argument_group("looks by name, as defaults for the flags below")
    looks = (
        f"{name}: {flags_in_words(own)}, in about {TIMES_OF_PRESETS[name]}" for name, own in OF_EACH_PRESET.items()
    )
    help_text = f"{'; '.join(looks)} of the default's time; all of them: {flags_in_words(IN_ALL_PRESETS)}"
    group.add_argument("--preset", metavar="NAME", help=help_text)
    for title, members in itertools.groupby(dataclasses.fields(Settings), lambda field: field.metadata["group"]):
        group = parser.add_argument_group(title)
        for field in members:
            add_setting(group, field)
    group = parser.add_argument_group("masks: pictures, white where something holds")
    group.add_argument("--style_masks", metavar="M", nargs="+", default=[], help="where each style goes")
    group.add_argument("--content_mask", metavar="M", help="where the content counts")
    group.add_argument("--color_mask", metavar="M", help="where preserve_color applies")
    group = parser.add_argument_group("what is saved")
    every = functools.partial(value_of, int)
    group.add_argument("--every", metavar="N", type=every, default=1, help="only each Nth picture, and the last (1)")
    group.add_argument("--animation", metavar="FILE", type=name_of, help="all iterations as .gif, .webp or .mp4")
    group.add_argument("--log", metavar="FILE", type=name_of, help="a row of losses for each iteration, .csv")
    group.add_argument("--tensorboard", metavar="DIR", type=name_of, help="losses and pictures for TensorBoard")
    group.add_argument("--report", metavar="FILE", type=name_of, help="a page that shows the run, .html")
    group.add_argument("--describe", metavar="PICTURE", action=Describe, help="print how PICTURE was made, and end")
    add_manners(parser.add_argument_group("the run"))
    return parser


def add_setting(group: argparse._ArgumentGroup, field: dataclasses.Field) -> None:
    """Add the flag of a field of Settings."""
    default: Any = field.default
    kind: Any = type(default)
    options: dict[str, Any] = {}
    if kind is bool:
        colours = {"luma": "luma", "match": "match"} if field.name == "preserve_color" else {}
        kind, options = ON_OFF | colours, {"nargs": "?", "const": True}
    elif kind is tuple:
        kind, options = type(default[0]), {"nargs": "+"}
    group.add_argument(
        f"--{field.name}",
        default=default,
        type=str if default is None else functools.partial(value_of, kind),
        metavar=field.metadata["metavar"],
        help=field.metadata["help"] + ("" if default is None else f" ({as_typed(default)})"),
        **options,
    )


def add_manners(group: argparse._ArgumentGroup) -> None:
    """Add the flags of how the run goes about it."""
    earlier = group.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="go on where an earlier run of this PREFIX ended")
    earlier.add_argument("--overwrite", action="store_true", help="replace an earlier run; else it is moved aside")
    whole = functools.partial(value_of, int)
    group.add_argument("--workers", metavar="N", type=whole, default=1, help="so many share the work (1)")
    group.add_argument("--allow_large", action="store_true", help="read pictures over Pillow's limit")
    group.add_argument("--quiet", action="store_true", help="say nothing but errors")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    group.add_argument("--info", action=Info, nargs=0, help="print what the report of a bug needs, and end")
    group.add_argument("-h", "--help", action="help", help="print this page, and end")
    group.add_argument("--version", action="version", version=f"deepstyle {__version__}", help="print it, and end")


def job_of(argv: list[str] | None) -> Job:
    """What the arguments ask for. Raises UserError for what is wrong with them."""
    parser = command_line()
    preset = parser.parse_args(argv).preset
    if preset is not None:
        require_choice("--preset", preset, PRESETS)
    # What a namespace has already is argparse's default, so that flags count more wherever they stand.
    arguments: dict[str, Any] = vars(parser.parse_args(argv, argparse.Namespace(**PRESETS.get(preset, {}))))
    try:
        settings = Settings(**{field.name: arguments.pop(field.name) for field in dataclasses.fields(Settings)})
    except UserError as error:
        of_preset = f" (--preset {preset} stands for {flags_in_words(PRESETS[preset])})" if preset else ""
        raise UserError(f"{error}{of_preset}") from error
    for name in ("describe", "info", "preset"):  # which have ended the program, or have done what they are for
        arguments.pop(name)
    several = {name: tuple(one) for name, one in arguments.items() if isinstance(one, list)}
    return Job(settings=settings, **arguments | several)


@without_warnings()
def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status; see the README for what each means."""
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    fill_closed_descriptors()
    try:
        job = job_of(argv)
        return run_many(job) if is_many(job) else run(job).status
    except SystemExit as ending:  # --help and --version
        return int(ending.code or 0)
    except KeyboardInterrupt:
        notify("interrupted; the same command begins again, and with --resume goes on from what is saved")
        return 130
    except Exception as error:
        notify(f"error: {describe_error(error, debug)}")
        return error.status if isinstance(error, UserError) else 1

"""Looks by name: what --preset stands for, and what counts more."""

import re
import shlex
import shutil

import pytest
from conftest import IMAGES, describe, pixels

from deepstyle_app.command import job_of, main
from deepstyle_support.settings import PRESETS, TIMES_OF_PRESETS, Settings

PAGE = (IMAGES.parent / "docs" / "flags.md").read_text()


def settings_of(*flags):
    return job_of(["c.png", "s.png", "out", *flags]).settings


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_stands_for_the_flags_that_its_row_names(name):
    row = re.search(rf"^\| `{name}` \| `(.*)` \|$", PAGE, re.MULTILINE)
    assert settings_of("--preset", name) == settings_of(*shlex.split(row[1]))


def test_every_preset_is_told_by_the_help_with_its_flags_and_its_time(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    shown = " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    assert PRESETS.keys() == TIMES_OF_PRESETS.keys()
    assert "quick: --image_size 200 --scales 2 --num_iter 1, in about " in shown
    assert f"--num_iter 1, in about {TIMES_OF_PRESETS['print']} of the default's time" in shown
    assert "all of them: --init_image recolored --padding edge --optimizer device --precision auto" in shown


def test_without_a_preset_the_defaults_are_as_ever():
    assert settings_of() == Settings()


@pytest.mark.parametrize("flag", [("--scales", "1"), ("--num_iter", "10"), ("--init_image", "content")])
def test_a_flag_counts_more_wherever_it_stands_and_with_its_default_as_well(flag):
    name, value = flag[0].removeprefix("--"), getattr(Settings(), flag[0].removeprefix("--"))
    for flags in (["--preset", "good", *flag], [*flag, "--preset", "good"]):
        found = settings_of(*flags)
        assert getattr(found, name) == value
        assert found == Settings(**PRESETS["good"] | {name: value})


def test_of_two_presets_the_last_counts_alone():
    assert settings_of("--preset", "print", "--preset", "good") == settings_of("--preset", "good")


@pytest.mark.parametrize(("name", "hint"), [("goood", "; did you mean good?"), ("", "")])
def test_an_unknown_preset_is_one_line_that_names_those_there_are(capsys, name, hint):
    assert main(["c.png", "s.png", "out", "--preset", name]) == 2
    said = f"--preset is '{name}'; it must be one of quick, good, print{hint}"
    assert capsys.readouterr().err == f"deepstyle: error: {said}\n"


def test_what_does_not_go_with_a_preset_is_told_with_what_it_stands_for(capsys):
    assert main(["c.png", "s.png", "out", "--preset", "print", "--scales", "2"]) == 2
    said = capsys.readouterr().err
    assert "--coarse_iter has 2 numbers (5 3); with --scales 2" in said
    assert "(--preset print stands for --init_image recolored " in said
    assert said.count("\n") == 1


SMALL = {"image_size": 64, "padding": "edge", "scales": 2, "coarse_iter": (1,), "num_iter": 1}
FLAGS = ["--image_size", "64", "--padding", "edge", "--scales", "2", "--coarse_iter", "1", "--num_iter", "1"]


@pytest.fixture
def small_preset(monkeypatch):
    """A preset of pictures that are painted at once."""
    monkeypatch.setitem(PRESETS, "good", SMALL)


def paint(inputs, prefix, *flags):
    return main([*inputs, str(prefix), "--weights", "random", "--quiet", *map(str, flags)])


def test_a_picture_and_its_log_hold_the_flags_and_not_the_presets_name(small_preset, picture_files, tmp_path, capsys):
    assert paint(picture_files, tmp_path / "a", "--preset", "good", "--log", tmp_path / "a.csv") == 0
    assert paint(picture_files, tmp_path / "b", *FLAGS) == 0
    named, spelled = (tmp_path / f"{name}_at_iteration_1.png" for name in "ab")
    assert (pixels(named) == pixels(spelled)).all()
    _, _, *again = shlex.split(describe(named, capsys).splitlines()[-1])
    assert job_of(again).settings == Settings(**SMALL, weights="random", tile="off")
    written = [path for path in tmp_path.iterdir() if path.name.startswith("a")]
    assert not [path.name for path in written if b"preset" in path.read_bytes()]


def test_a_run_with_a_preset_is_gone_on_with_by_the_preset_or_its_flags(small_preset, picture_files, tmp_path, capsys):
    assert paint(picture_files, tmp_path / "a", "--preset", "good") == 0
    assert main([*picture_files, str(tmp_path / "a"), "--weights", "random", "--preset", "good", "--resume"]) == 0
    assert "nothing to do: iteration 1 is done" in capsys.readouterr().err
    assert paint(picture_files, tmp_path / "a", *FLAGS, "--num_iter", "2", "--resume") == 0
    assert (tmp_path / "a_at_iteration_2.png").exists()


def test_a_run_whose_preset_has_changed_since_is_refused_by_the_flag(picture_files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "good", SMALL)
    assert paint(picture_files, tmp_path / "a", "--preset", "good") == 0
    monkeypatch.setitem(PRESETS, "good", SMALL | {"padding": "zeros"})
    assert paint(picture_files, tmp_path / "a", "--preset", "good", "--resume") == 2
    said = capsys.readouterr().err
    assert "--padding" in said
    assert said.count("\n") == 1


def test_a_folders_photos_are_painted_with_the_preset(small_preset, picture_files, tmp_path):
    (tmp_path / "photos").mkdir()
    photo = tmp_path / "photos" / "a.png"
    shutil.copy(picture_files[0], photo)
    assert paint([str(photo.parent), picture_files[1]], tmp_path / "out", "--preset", "good") == 0
    results = tmp_path / "out" / "a.png"
    assert pixels(results / "result_image_at_iteration_1.png").shape[0] == 64
    assert (results / "result_image_at_32x42_iteration_1.png").exists()

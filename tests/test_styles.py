"""A folder of styles: each of its pictures is a style of its own; with a folder of photos, all pairs."""

import re

import numpy as np
import pytest
from conftest import SMALL, pixels, smooth_picture
from PIL import Image

import deepstyle
from deepstyle_app import inputs
from deepstyle_app.command import main

LAST = "result_image_at_iteration_2.png"


def save(path, seed=1, rows=48, columns=64):
    Image.fromarray(smooth_picture(seed, rows, columns)).save(path, format="PNG")


@pytest.fixture
def folders(tmp_path):
    """A folder of two photos of one shape, and one of two styles."""
    for folder in ("photos", "styles"):
        (tmp_path / folder).mkdir()
    save(tmp_path / "photos" / "a.jpg", 1)
    save(tmp_path / "photos" / "b.png", 3)
    save(tmp_path / "styles" / "wave.png", 2, 50, 40)
    save(tmp_path / "styles" / "dots.png", 4, 44, 60)
    return tmp_path


def paint(folders, content, style, *flags, out="out"):
    return main([str(folders / content), str(folders / style), f"{folders}/{out}/", *SMALL, *flags])


def results(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(LAST))


def test_a_photo_is_made_in_each_style_of_a_folder(folders, capsys):
    assert paint(folders, "photos/a.jpg", "styles") == 0
    first, _, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("painting 2 pictures on ")
    assert [line.split(": ")[0] for line in lines] == ["1/2 dots.png", "2/2 wave.png"]
    assert results(folders / "out") == [f"{style}/{LAST}" for style in ("dots.png", "wave.png")]
    for style in ("dots.png", "wave.png"):
        assert paint(folders, "photos/a.jpg", f"styles/{style}", out=f"alone/{style}") == 0
        np.testing.assert_array_equal(pixels(folders / "out" / style / LAST), pixels(folders / "alone" / style / LAST))


def test_a_folder_by_a_folder_makes_all_pairs_and_a_sheet_of_them(folders, capsys):
    assert paint(folders, "photos", "styles", "--report", "sheet.html") == 0
    pairs = [(photo, style) for photo in ("a.jpg", "b.png") for style in ("dots.png", "wave.png")]
    assert results(folders / "out") == [f"{photo}/{style}/{LAST}" for photo, style in pairs]
    page = (folders / "out" / "sheet.html").read_text()
    assert re.findall('<th scope="col">(.*?)</th>', page) == ["dots.png", "wave.png"]
    assert re.findall('<th scope="row">(.*?)</th>', page) == ["a.jpg", "b.png"]
    assert re.findall('alt="(.*?), painted"', page) == [f"{photo} in {style}" for photo, style in pairs]
    assert re.findall('href="(.*?sheet.html)"', page) == [f"{photo}/{style}/sheet.html" for photo, style in pairs]
    assert "4 of 4 pictures done" in page
    assert paint(folders, "photos/b.png", "styles/wave.png", out="alone") == 0
    pair = folders / "out" / "b.png" / "wave.png" / LAST
    np.testing.assert_array_equal(pixels(pair), pixels(folders / "alone" / LAST))


def test_what_a_style_needs_is_made_once_for_all_photos(folders, monkeypatch):
    shown: list[int] = []
    grams = deepstyle.Objective._grams
    monkeypatch.setattr(deepstyle.Objective, "_grams", lambda *given: shown.append(1) or grams(*given))
    assert paint(folders, "photos", "styles") == 0
    assert len(shown) == 2  # the photos have one shape, and as a whole they need no other Gram matrices of their own


def test_a_style_that_cannot_be_read_fails_once_and_stops_no_other(folders, capsys):
    (folders / "styles" / "notes.txt").write_text("no picture")
    assert paint(folders, "photos", "styles", "--report", "sheet.html") == 1
    err = capsys.readouterr().err
    assert len(results(folders / "out")) == 4
    fails, *end = err.splitlines()
    assert fails.startswith("deepstyle: notes.txt fails: ")
    assert end[0] == "deepstyle: 4 of 6 pictures are done; the same command with --resume does what is not"
    assert [line.split(": ")[:3] for line in end[1:]] == [["deepstyle", "failed", "notes.txt"]]
    assert (folders / "out" / "sheet.html").read_text().count("is no picture that Pillow can read") == 2


def test_the_only_style_of_a_folder_that_cannot_be_read_is_an_error_before_anything_is_made(folders, capsys):
    (folders / "bad").mkdir()
    (folders / "bad" / "notes.txt").write_text("no picture")
    assert paint(folders, "photos", "bad") == 2
    assert "is no picture that Pillow can read" in capsys.readouterr().err
    assert not (folders / "out").exists()


def test_a_folder_among_several_styles_is_one_line(folders, capsys):
    arguments = [str(folders / name) for name in ("photos/a.jpg", "styles/wave.png", "styles", "out")]
    assert main([*arguments, *SMALL]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"deepstyle: error: '{folders}/styles' is a folder; name it as the only style")
    assert err.count("\n") == 1
    assert not (folders / "out").exists()


def test_resume_makes_only_the_pairs_that_are_not_there(folders, capsys):
    assert paint(folders, "photos/a.jpg", "styles", "--resume") == 0
    before = (folders / "out" / "wave.png" / LAST).stat().st_mtime_ns
    save(folders / "styles" / "new.png", 5)
    capsys.readouterr()
    assert paint(folders, "photos/a.jpg", "styles", "--resume") == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(", ")[1] == "done before" for line in lines] == [True, False, True]
    assert (folders / "out" / "wave.png" / LAST).stat().st_mtime_ns == before


@pytest.mark.parametrize("odd", ["wave.png", "mask.png"])
def test_the_notes_of_a_style_or_a_mask_are_shown_once(folders, capsys, monkeypatch, odd):
    read = inputs.read_picture
    monkeypatch.setattr(
        inputs, "read_picture", lambda path, *given: (read(path, *given)[0], ["is odd"] if odd in path else [])
    )
    save(folders / "mask.png", 6)
    assert paint(folders, "photos", "styles", "--content_mask", str(folders / "mask.png")) == 0
    assert capsys.readouterr().err.count("is odd") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--style_weight", "1", "2"), "--style_weight has 2 weights for 1 styles"),
        (("--style_masks", "{photo}", "{photo}"), "there are 2 style masks for 1 styles"),
        (("--content_mask", "{folder}"), "cannot read the picture"),
        (("--init_image", "contnet"), "--init_image is 'contnet'"),
        (("--style_size", "16"), "a style picture would have 16 x 16 pixels"),
    ],
)
def test_what_is_wrong_with_the_command_is_no_styles_fault(folders, capsys, flags, message):
    names = {"photo": folders / "photos" / "b.png", "folder": folders / "styles"}
    assert paint(folders, "photos", "styles", *(flag.format(**names) for flag in flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"deepstyle: error: {message}")
    assert not (folders / "out").exists()


def test_a_folder_that_is_photos_and_styles_is_spoken_of_once(folders, capsys):
    (folders / "photos" / "notes.txt").write_text("no picture")
    (folders / "photos" / "inside").mkdir()
    assert paint(folders, "photos", "photos") == 1
    fails, passed_over, done, failed = capsys.readouterr().err.splitlines()
    assert fails.startswith("deepstyle: notes.txt fails: ")
    assert passed_over == f"deepstyle: folders in '{folders}/photos' are not looked into: inside"
    assert done.startswith("deepstyle: 4 of 9 pictures are done; ")
    assert failed.startswith("deepstyle: failed: notes.txt: ")


def test_a_photo_and_a_style_of_one_name_that_both_fail_are_both_named_at_the_end(folders, capsys):
    for folder in ("photos", "styles"):
        (folders / folder / "notes.txt").write_text("no picture")
    assert paint(folders, "photos", "styles") == 1
    end = [line for line in capsys.readouterr().err.splitlines() if "failed: notes.txt: " in line]
    assert [re.search("'.*/(.*)/notes.txt'", line)[1] for line in end] == ["photos", "styles"]

"""Photos as they come: colour profiles, HEIC, AVIF, cameras' raw files."""

import dataclasses
import io
import subprocess
import sys

import icc
import numpy as np
import pytest
from conftest import smooth_picture
from PIL import Image, features

import deepstyle
from deepstyle_app.inputs import read_inputs
from deepstyle_app.job import Job
from deepstyle_support import profiles, reading

COLOURS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)


def saved(path, picture, profile=None, **options):
    Image.fromarray(picture).save(path, icc_profile=profile, **options)
    return str(path)


@pytest.mark.parametrize("name", ["Display P3", "Adobe RGB"])
@pytest.mark.parametrize("kind", ["png", "tif", "webp"])
def test_colours_are_those_of_the_formulas(tmp_path, name, kind):
    lossless = {"lossless": True, "exact": True} if kind == "webp" else {}
    path = saved(tmp_path / f"a.{kind}", COLOURS, icc.rgb_profile(name), **lossless)
    picture, notes = deepstyle.read_picture(path)
    assert np.abs(picture - icc.in_srgb(COLOURS, name)).max() <= 1.5
    assert notes == []


@pytest.mark.parametrize(
    ("name", "expected"), [("Display P3", (215, 93, 31)), ("P3 with a gamma of 2.2", (216, 92, 23))]
)
def test_an_orange_of_a_phone_is_more_vivid_than_its_numbers(tmp_path, name, expected):
    orange = np.full((2, 2, 3), (200, 100, 50), np.uint8)
    picture, _ = deepstyle.read_picture(saved(tmp_path / "a.png", orange, icc.rgb_profile(name)))
    assert np.abs(picture[0, 0].astype(int) - expected).max() <= 1


def test_what_is_srgb_is_not_changed_by_a_bit(tmp_path):
    exact = icc.rgb_profile("sRGB")
    rounded = exact.replace(icc.SRGB_CURVE, icc.srgb_curve(2.42))  # as many are, in one way or another
    for profile in (exact, rounded, profiles.srgb_profile(), None):
        picture, notes = deepstyle.read_picture(saved(tmp_path / "a.png", COLOURS, profile))
        np.testing.assert_array_equal(picture, COLOURS)
        assert notes == []


def test_an_icon_with_a_palette_is_read(tmp_path):
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("P")
    levels.save(tmp_path / "a.icns")
    picture, notes = deepstyle.read_picture(str(tmp_path / "a.icns"))
    assert picture[0, 0].tolist() == [0, 0, 0] and picture[-1, -1].tolist() == [255, 255, 255] and notes == []


def test_greys_of_8_and_16_bits_follow_their_curve(tmp_path):
    levels = np.arange(256, dtype=np.uint8)[None]
    expected = icc.srgb_encoded((levels / 255) ** 1.8)[..., None]
    for picture in (levels, levels.astype(np.uint16) * 257):
        read, notes = deepstyle.read_picture(saved(tmp_path / "a.png", picture, icc.grey_profile(1.8)))
        assert np.abs(read - expected).max() <= 1
        assert notes == []


def test_a_palettes_colours_are_its_profiles(tmp_path):
    palette = Image.fromarray(COLOURS).quantize(16)
    palette.save(tmp_path / "a.png", icc_profile=icc.rgb_profile("Adobe RGB"))
    picture, _ = deepstyle.read_picture(str(tmp_path / "a.png"))
    assert np.abs(picture - icc.in_srgb(np.asarray(palette.convert("RGB")), "Adobe RGB")).max() <= 1.5


def test_paper_is_white_and_ink_black_in_a_scan_by_its_cmyk_profile(tmp_path):
    scan = np.zeros((16, 16, 4), np.uint8)
    scan[:, 8:] = 255
    Image.fromarray(scan, "CMYK").save(tmp_path / "a.tif", icc_profile=icc.cmyk_profile(paper=100, ink=20))
    picture, notes = deepstyle.read_picture(str(tmp_path / "a.tif"))
    assert notes == []
    assert picture[:, :8].min() >= 253
    assert picture[:, 8:].max() <= 3  # and not the dark grey that the ink is


def test_a_profile_holds_for_what_is_turned_and_what_is_transparent(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    alpha = np.full((16, 24, 1), 255, np.uint8)
    alpha[:, :5] = 40
    clear = np.dstack([COLOURS, alpha])
    picture, _ = deepstyle.read_picture(saved(tmp_path / "a.png", clear, icc.rgb_profile("Display P3"), exif=exif))
    upright = np.rot90(clear, k=-1)
    assert np.abs(picture[..., :3] - icc.in_srgb(upright[..., :3], "Display P3")).max() <= 1.5
    np.testing.assert_array_equal(picture[..., 3], upright[..., 3])


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        (b"no profile", "it is damaged"),
        (icc.rgb_profile("Adobe RGB")[:200], "it is damaged"),
        (icc.grey_profile(1.8), "it is for GRAY, and the picture is RGB"),
    ],
)
def test_a_profile_of_no_use_is_told_and_ignored(tmp_path, picture_files, capfd, profile, said):
    path = saved(tmp_path / "a.png", smooth_picture(1, 40, 48), profile)
    picture, notes = deepstyle.read_picture(path)
    np.testing.assert_array_equal(picture, smooth_picture(1, 40, 48))
    assert len(notes) == 1
    assert said in notes[0]
    job = Job(path, (picture_files[1],), "out", deepstyle.Settings(image_size=32))
    read_inputs(job)
    assert capfd.readouterr().err == f"deepstyle: '{path}' {notes[0]}\n"
    read_inputs(dataclasses.replace(job, quiet=True))
    assert capfd.readouterr().err == ""


def test_a_pillow_without_littlecms_reads_the_numbers_and_says_so(tmp_path, monkeypatch):
    from PIL._util import DeferredError

    monkeypatch.setattr(profiles.ImageCms, "core", DeferredError(ImportError("no module named _imagingcms")))
    picture, notes = deepstyle.read_picture(saved(tmp_path / "a.png", COLOURS, icc.rgb_profile("Display P3")))
    np.testing.assert_array_equal(picture, COLOURS)
    assert "built without LittleCMS" in notes[0]
    assert profiles.srgb_profile() is None


def test_a_masks_values_are_numbers_and_no_colours(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = saved(tmp_path / "a.png", grey, icc.grey_profile(1.8))
    np.testing.assert_array_equal(deepstyle.read_picture(path, as_mask=True)[0][..., 0], grey)
    clear = np.dstack([np.zeros((16, 16, 3), np.uint8), grey])
    white, _ = deepstyle.read_picture(saved(tmp_path / "b.png", clear), as_mask=True)
    np.testing.assert_array_equal(white[..., 0], 255 - grey)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_with_its_profile_and_named_if_pillow_cannot(tmp_path, monkeypatch):
    flat = np.full((32, 32, 3), (200, 100, 50), np.uint8)
    path = saved(tmp_path / "a.avif", flat, icc.rgb_profile("Display P3"), quality=95)
    assert np.abs(deepstyle.read_picture(path)[0].astype(int) - (215, 93, 31)).max() <= 4
    monkeypatch.setattr(reading.features, "check", lambda feature: False)
    with pytest.raises(deepstyle.UserError, match=r"is an AVIF picture, which this Pillow does not read; .* pillow'"):
        deepstyle.read_picture(path)


@pytest.mark.parametrize("name", ["a.heic", "a.jpg"])
def test_heic_is_read_with_its_profile_whatever_its_name(tmp_path, name):
    pillow_heif = pytest.importorskip("pillow_heif")
    picture = Image.fromarray(np.full((48, 64, 3), (200, 100, 50), np.uint8))
    picture.info["icc_profile"] = icc.rgb_profile("Display P3")
    file = io.BytesIO()
    pillow_heif.from_pillow(picture).save(file, quality=95)
    (tmp_path / name).write_bytes(file.getvalue())
    read, _ = deepstyle.read_picture(str(tmp_path / name))
    assert read.shape == (48, 64, 3)
    assert np.abs(read.astype(int) - (215, 93, 31)).max() <= 4


@pytest.mark.parametrize("name", ["a.heic", "a.jpg", "a.HIF"])
def test_heic_without_its_package_is_one_line_with_the_command_that_brings_it(tmp_path, monkeypatch, name):
    monkeypatch.setattr(reading.importlib.util, "find_spec", lambda name: None)
    (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" if name != "a.HIF" else b"what a phone sent")
    with pytest.raises(deepstyle.UserError, match=r"is a HEIC picture, which .* -m pip install pillow-heif' brings it"):
        deepstyle.read_picture(str(tmp_path / name))
    Image.fromarray(COLOURS).save(tmp_path / name, format="PNG")  # a picture that Pillow knows is read by any name
    np.testing.assert_array_equal(deepstyle.read_picture(str(tmp_path / name))[0], COLOURS)


def test_importing_deepstyle_looks_for_no_heic():
    code = "import sys, deepstyle; print('pillow_heif' in sys.modules)"
    folder = deepstyle.__file__.rsplit("/", 1)[0]
    ended = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert ended.stdout == "False\n"


def raw_files():
    """The name and the bytes of cameras' files; many of them Pillow would read, as a small preview."""
    preview = io.BytesIO()
    Image.fromarray(COLOURS).save(preview, format="TIFF")
    for name in ("a.NEF", "a.arw", "a.dng", "a.pef"):
        yield name, preview.getvalue()
    for name, tags in (("dng.tif", {50706: b"\1\4\0\0"}), ("nef.tif", {254: 1, 330: 8})):
        file = io.BytesIO()
        Image.fromarray(COLOURS).save(file, format="TIFF", tiffinfo=tags)
        yield name, file.getvalue()
    yield "a.cr2", b"II*\0\x10\0\0\0CR\2\0"
    yield "cr2.tif", b"II*\0\x10\0\0\0CR\2\0"
    yield "cr3.jpg", b"\0\0\0\x18ftypcrx \0\0\0\1crx isom"
    yield "raf.jpg", b"FUJIFILMCCD-RAW 0201"
    yield "orf.jpg", b"IIRO\x08\0\0\0"


@pytest.mark.parametrize(("name", "content"), [*raw_files()], ids=lambda value: value if isinstance(value, str) else "")
def test_a_cameras_raw_file_is_refused_with_what_to_do(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(deepstyle.UserError, match=r"is a camera's raw file: develop it with .* TIFF or JPEG"):
        deepstyle.read_picture(str(tmp_path / name))


def test_a_file_that_is_not_there_is_no_raw_file(tmp_path):
    with pytest.raises(deepstyle.UserError, match="No such file"):
        deepstyle.read_picture(str(tmp_path / "none.cr2"))


def test_png_says_that_it_is_srgb(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.png", pnginfo=profiles.png_tags())
    data = (tmp_path / "a.png").read_bytes()
    assert data.index(b"sRGB") < data.index(b"IDAT")  # where the standard wants it
    assert Image.open(tmp_path / "a.png").info["srgb"] == 1

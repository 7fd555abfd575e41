"""Greys of any number of bits, palettes and planes: black and white are where the file says."""

import io

import numpy as np
import pytest
from odd_files import grey_tiff, tiff
from PIL import Image

import deepstyle

SHARE = np.tile(np.arange(80) / 79, (6, 1))  # of white, from the left to the right
RAMP = 255 * SHARE
PLACE = np.arange(SHARE.size).reshape(SHARE.shape) == 99


def read(tmp_path, data):
    (tmp_path / "a.tif").write_bytes(data)
    picture, notes = deepstyle.read_picture(str(tmp_path / "a.tif"))
    return picture.astype(float), " ".join(notes)


def assert_greys(picture, expected, within=1):
    assert np.abs(picture - expected[..., None]).max() <= within


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("white_is_zero", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16, 32])
def test_unsigned_numbers_go_from_black_to_white(tmp_path, bits, white_is_zero, order, compressed):
    most = 2**bits - 1
    numbers = np.rint(SHARE * most)
    stored = most - numbers if white_is_zero else numbers
    picture, notes = read(tmp_path, grey_tiff(stored, bits, 1, white_is_zero, order, compressed))
    assert_greys(picture, numbers / most * 255)
    assert notes == ""


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("white_is_zero", [True, False])
def test_signed_numbers_and_floats_go_from_black_to_white(tmp_path, white_is_zero, order, compressed):
    for bits in (8, 16, 32):
        numbers = np.rint((SHARE - 0.5) * (2**bits - 1) - 0.5)
        stored = -1 - numbers if white_is_zero else numbers
        picture, notes = read(tmp_path, grey_tiff(stored, bits, 2, white_is_zero, order, compressed))
        assert_greys(picture, RAMP)
        assert "is taken for black" in notes
    stored = 1 - SHARE if white_is_zero else SHARE
    picture, notes = read(tmp_path, grey_tiff(stored, 32, 3, white_is_zero, order, compressed))
    assert_greys(picture, RAMP)
    assert notes == ""


@pytest.mark.parametrize(
    ("numbers", "expected", "white"),
    [
        (np.where(SHARE == 1, 1.0001, SHARE), RAMP, 1),
        (np.where(PLACE, np.inf, SHARE), np.where(PLACE, 255, RAMP), None),
        (np.where(PLACE, -np.inf, SHARE), np.where(PLACE, 0, RAMP), None),
        (np.where(PLACE, np.nan, SHARE), np.where(PLACE, 0, RAMP), None),
        (SHARE - 0.25, RAMP - 64, 1),
        (SHARE * 255, RAMP, 255),
        (SHARE * 65535, RAMP, 65535),
        (SHARE * 3, RAMP, 3),
        (SHARE / 100, RAMP / 100, None),
        (SHARE * 0, RAMP * 0, None),
        (SHARE * np.nan, RAMP * 0, None),
    ],
)
def test_floats_are_scaled_by_what_is_white_and_it_is_told_where_that_is_guessed(tmp_path, numbers, expected, white):
    picture, notes = read(tmp_path, grey_tiff(numbers, 32, 3))
    assert_greys(picture, np.clip(expected, 0, 255))
    assert (f" {white:g} for white" in notes) if white else notes == ""


def test_a_single_huge_float_does_not_make_the_rest_black(tmp_path):
    numbers = np.tile(SHARE, (20, 1))
    numbers[3, 4] = 1e9
    picture, notes = read(tmp_path, grey_tiff(numbers, 32, 3))
    expected = np.tile(RAMP, (20, 1))
    expected[3, 4] = 255
    assert_greys(picture, expected)
    assert "1 for white" in notes


@pytest.mark.parametrize("most", [255, 65535, 300_000])
def test_32_bits_that_are_hardly_used_are_scaled_by_what_is(tmp_path, most):
    picture, notes = read(tmp_path, grey_tiff(np.rint(SHARE * most), 32))
    assert_greys(picture, RAMP)
    assert f"{most:g} for white" in notes


@pytest.mark.parametrize(
    ("bits", "sample_format", "kind", "black", "white"),
    [(16, 1, 3, 100, 4095), (16, 2, 8, -1000, 2000), (32, 3, 11, -2.0, 6.0), (32, 1, 4, 0, 10**6)],
)
def test_black_and_white_are_what_the_tags_say(tmp_path, bits, sample_format, kind, black, white):
    tags = {340: (kind, [black]), 341: (kind, [white])}
    picture, notes = read(tmp_path, grey_tiff(black + SHARE * (white - black), bits, sample_format, tags=tags))
    assert_greys(picture, RAMP)
    assert notes == ""


def test_tags_that_make_no_sense_do_not_count(tmp_path):
    for number in (1.0, np.nan):
        tags = {340: (11, [number]), 341: (11, [number])}
        assert_greys(read(tmp_path, grey_tiff(SHARE, 32, 3, tags=tags))[0], RAMP)


@pytest.mark.parametrize("bits", [1, 4, 8, 16])
def test_where_black_is_not_said_it_is_0_with_a_note(tmp_path, bits):
    numbers = np.rint(SHARE * (2**bits - 1))
    picture, notes = read(tmp_path, grey_tiff(numbers, bits, white_is_zero=None))
    assert_greys(picture, numbers / (2**bits - 1) * 255)
    assert "does not say whether 0 is black" in notes


@pytest.mark.parametrize(("bits", "factor"), [(4, 17), (8, 1), (8, 256), (8, 257)])
def test_a_palette_counts_to_255_or_to_65535(tmp_path, bits, factor):
    index = np.rint(SHARE * (2**bits - 1)).astype(int)
    level = np.arange(2**bits) * (factor if bits == 4 else 1)
    scale = 1 if bits == 4 else factor
    table = [*(scale * level), *(scale * level[::-1]), *[scale * 50] * 2**bits]
    tags = {258: (3, [bits]), 262: (3, [3]), 320: (3, [int(number) for number in table])}
    data = index.astype(np.uint8).tobytes() if bits == 8 else grey_tiff(index, 4)[-index.size // 2 :]
    picture, notes = read(tmp_path, tiff([data], index.shape, tags))
    np.testing.assert_array_equal(picture, np.dstack([level[index], 255 - level[index], index * 0 + 50]))
    assert ("counts to 255" in notes) == (scale == 1)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 16])
def test_colours_that_come_one_after_the_other_are_those_of_one_picture(tmp_path, bits, order, compressed):
    colours = np.random.default_rng(0).integers(0, 2**bits, (20, 30, 3))
    planes = [colours[..., channel].astype(f"{order}u{bits // 8}").tobytes() for channel in range(3)]
    tags = {258: (3, [bits] * 3), 262: (3, [2]), 277: (3, [3]), 284: (3, [2])}
    picture, _ = read(tmp_path, tiff(planes, (20, 30), tags, order, compressed))
    assert np.abs(picture - colours / (2**bits - 1) * 255).max() <= 1


@pytest.mark.parametrize("most", [1, 15, 255, 256, 1023, 4095, 65535])
def test_a_pgms_white_is_its_largest_number(tmp_path, most):
    numbers = np.rint(SHARE * most / 2)
    data = b"P5 80 6 %d\n" % most + numbers.astype(">u2" if most > 255 else "u1").tobytes()
    assert_greys(read(tmp_path, data)[0], numbers / most * 255)


@pytest.mark.parametrize("kind", ["pfm", "spider", "png"])
def test_what_is_no_tiff_has_its_formats_white(tmp_path, kind):
    file = io.BytesIO()
    if kind == "png":
        Image.fromarray(np.rint(SHARE * 300).astype(np.uint16)).save(file, format="PNG")
    elif kind == "pfm":
        file.write(b"Pf\n80 6\n-1.0\n" + SHARE.astype("<f4").tobytes())
    else:
        Image.fromarray(SHARE.astype(np.float32)).save(file, format="SPIDER")
    picture, notes = read(tmp_path, file.getvalue())
    assert_greys(picture, RAMP * 300 / 65535 if kind == "png" else RAMP)
    assert notes == ""

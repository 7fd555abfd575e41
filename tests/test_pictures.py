"""Reading, resizing, colours, naming and saving; what may be given as a picture."""

import random
import tracemalloc

import numpy as np
import pytest
from conftest import smooth_picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import deepstyle
from deepstyle import Pictures, Settings
from deepstyle_support.colours import colours, match_colours, recolour, with_colours_of
from deepstyle_support.images import MEAN_BGR, RESAMPLING, enlarge, from_input_space, resize, to_input_space
from deepstyle_support.transparency import on_colour


def read(path):
    return deepstyle.read_picture(str(path))[0]


def test_exif_orientation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show
    Image.fromarray(smooth_picture(1, 20, 30)).save(tmp_path / "turned.png", exif=exif)
    expected = np.rot90(smooth_picture(1, 20, 30), k=-1)
    np.testing.assert_array_equal(read(tmp_path / "turned.png"), expected)


def test_transparency_is_read_as_alpha_of_a_palette_as_well(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[..., 3] = [[0, 255], [128, 255]]
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    np.testing.assert_array_equal(read(tmp_path / "clear.png"), pixels)
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "palette.png", transparency=1)
    assert read(tmp_path / "palette.png").tolist() == [[[10, 20, 30, 255], [40, 50, 60, 0]]]
    Image.fromarray(pixels[..., 3]).save(tmp_path / "grey.png", transparency=128)
    assert read(tmp_path / "grey.png")[..., 3].tolist() == [[255, 255], [0, 255]]
    Image.fromarray(pixels | np.uint8([0, 0, 0, 255])).save(tmp_path / "opaque.png")
    np.testing.assert_array_equal(read(tmp_path / "opaque.png"), pixels[..., :3])


def test_what_is_laid_on_a_colour_is_mixed_with_it():
    clear = np.array([[[200, 0, 0, 0], [200, 0, 0, 255], [200, 0, 0, 128]]], np.uint8)
    on_background = on_colour(clear, "white")[0].tolist()
    assert on_background[:2] == [[255, 255, 255], [200, 0, 0]]
    assert on_background[2] == pytest.approx([227, 127, 127], abs=1)
    assert on_colour(clear, None) is clear


def test_grey_becomes_rgb(tmp_path):
    Image.fromarray(np.uint8([[0, 100, 255]])).save(tmp_path / "grey.png")
    assert read(tmp_path / "grey.png").tolist() == [[[0] * 3, [100] * 3, [255] * 3]]


def test_sixteen_bits_are_scaled(tmp_path):
    Image.fromarray(np.uint16([[0, 25820, 65535]])).save(tmp_path / "deep.png")
    assert read(tmp_path / "deep.png").tolist() == [[[0] * 3, [100] * 3, [255] * 3]]


@given(height=st.integers(1, 5000), width=st.integers(1, 5000), rows=st.integers(1, 3000), keep=st.booleans())
def test_columns_follow_from_the_content_picture(height, width, rows, keep):
    settings = Settings(image_size=rows, maintain_aspect_ratio=keep)
    expected = (rows, int(rows * width / height) if keep else rows)
    if min(expected) >= 32:
        assert deepstyle.picture_sizes((height, width, 3), settings) == [expected]
    else:
        with pytest.raises(deepstyle.UserError, match="at least 32"):
            deepstyle.picture_sizes((height, width, 3), settings)


def test_each_scale_has_twice_the_rows_of_the_one_before():
    settings = Settings(image_size=201, scales=3)
    assert deepstyle.picture_sizes((300, 450, 3), settings) == [(50, 75), (100, 150), (201, 301)]
    with pytest.raises(deepstyle.UserError, match=r"the coarsest picture would have 25 x 37 .*lower --scales"):
        deepstyle.picture_sizes((300, 450, 3), Settings(image_size=201, scales=4))


def test_enlarging_keeps_fractions_and_values_beyond_the_range():
    x = np.random.default_rng(0).normal(0, 300, (5, 7, 3)).astype(np.float32)
    larger = enlarge(x, (10, 14))
    assert larger.shape == (10, 14, 3)
    assert larger.dtype == np.float32
    np.testing.assert_allclose(larger.mean((0, 1)), x.mean((0, 1)), atol=25)
    assert np.ptp(larger) > 255
    np.testing.assert_allclose(enlarge(np.full((5, 7, 3), 0.25, np.float32), (10, 14)), 0.25)


def test_resizing_is_pillows_bilinear():
    picture = smooth_picture(1, 40, 60)
    expected = Image.fromarray(picture).resize((30, 20), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resize(picture, (20, 30)), np.asarray(expected))


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic"])
def test_rescaled_picture_has_the_contents_size(method):
    content, small = smooth_picture(1, 45, 61), smooth_picture(2, 20, 27)
    settings = Settings(rescale_image=True, rescale_method=method)
    picture = deepstyle.finish(to_input_space(small), content, settings)
    expected = Image.fromarray(small).resize((61, 45), Image.Resampling[method.upper()])
    np.testing.assert_array_equal(picture, np.asarray(expected))


def test_cubic_is_another_name_for_bicubic():
    assert RESAMPLING["cubic"] == RESAMPLING["bicubic"]


def test_preserve_color_keeps_the_results_luma_and_the_contents_chroma():
    # Mild colours: at the edges of RGB, clipping would change luma and chroma.
    content, result = smooth_picture(1, 20, 20) // 4 + 96, smooth_picture(2, 20, 20) // 4 + 96
    x = to_input_space(result)
    picture = deepstyle.finish(x, content, Settings(preserve_color=True))
    shown, wanted_luma, wanted_chroma = (
        np.asarray(Image.fromarray(p).convert("YCbCr")).astype(int) for p in (picture, result, content)
    )
    assert np.abs(shown[..., 0] - wanted_luma[..., 0]).max() <= 2
    assert np.abs(shown[..., 1:] - wanted_chroma[..., 1:]).max() <= 2
    np.testing.assert_array_equal(deepstyle.finish(x, content, Settings()), result)


def test_input_space_is_bgr_minus_the_means_and_back():
    picture = np.uint8([[[255, 128, 0]]])
    x = to_input_space(picture)
    assert x.ravel().tolist() == pytest.approx([0 - 103.939, 128 - 116.779, 255 - 123.68])
    np.testing.assert_array_equal(from_input_space(x), picture)


def test_saved_values_are_rounded_and_clipped():
    x = np.float64([[[300, 99.6, -50]]]) - MEAN_BGR
    assert from_input_space(x).tolist() == [[[0, 100, 255]]]


@pytest.mark.parametrize(
    ("mode", "grey", "white"),
    [("float32", 0.5, 1), ("float32", 100, 255), ("int32", 32768, 65535), ("int32", 2**30, 2**31 - 1)],
)
def test_greys_are_scaled_by_what_is_white(tmp_path, mode, grey, white):
    values = np.zeros((4, 4), mode)
    values[0], values[1] = white, grey
    Image.fromarray(values).save(tmp_path / "a.tif")
    picture, _ = deepstyle.read_picture(str(tmp_path / "a.tif"))
    assert picture[0, 0, 0] == 255
    assert abs(int(picture[1, 0, 0]) - 255 * grey / white * picture[0, 0, 0] / 255) <= 1
    assert picture[2, 0, 0] == 0


PICTURE, CLEAR = smooth_picture(1, 40, 50), np.dstack([smooth_picture(2, 40, 50), np.full((40, 50), 99, np.uint8)])
HALF = np.repeat(np.uint8([[0, 255]]), 20, axis=0)
GOOD = [PICTURE, CLEAR, PICTURE[::-1, ::-1], np.asfortranarray(PICTURE), PICTURE[..., ::-1]]
GOOD_MASKS = [HALF, HALF == 255, np.dstack([HALF] * 3), HALF[::-1, ::-1]]
BAD = {
    "numbers are float64": [PICTURE / 255, PICTURE.astype(float), CLEAR / 255, np.full((40, 50, 3), np.nan)],
    "numbers are int64": [PICTURE.astype(np.int64), np.array(PICTURE.tolist(), np.int64)],
    "numbers are bool": [PICTURE > 99],
    "numbers are uint16": [PICTURE.astype(np.uint16)],
    "numbers are object": [PICTURE.astype(object)],
    "shape is": [PICTURE[..., 0], PICTURE[..., :2], PICTURE[None], PICTURE[0], np.array("a"), np.zeros((4, 5, 6))],
    "more than a single pixel": [PICTURE[:0], PICTURE[:, :0], PICTURE[:1, :1]],
    "of the type list": [PICTURE.tolist()],
    "of the type Image": [Image.fromarray(PICTURE)],
    "of the type str": ["a.png"],
    "of the type NoneType": [None],
}
BAD_MASKS = {
    "mask's numbers are float64": [np.ones((4, 4)), HALF / 255],
    "mask's numbers are int64": [HALF.astype(np.int64)],
    "mask's shape is": [HALF[..., None], CLEAR, np.uint8(255) * np.ones(3, np.uint8), HALF[None]],
    "more than a single pixel": [HALF[:0], HALF[:1, :1]],
    "mask is of the type": [Image.fromarray(HALF), "a.png", 1, HALF.tolist()],
    "all black": [HALF * 0, HALF > 255],
}
KINDS = {"content": (GOOD, BAD), "style": (GOOD, BAD), "content_mask": (GOOD_MASKS, BAD_MASKS)}


@pytest.fixture
def begin(monkeypatch, untrained):
    """Begins to stylize, up to the first evaluation."""
    monkeypatch.setattr(deepstyle, "load_weights", lambda *named: (untrained, ""))

    def with_pictures(content=PICTURE, style=PICTURE, **options):
        return deepstyle.stylize(content, style, **{"image_size": 32, **options})

    return with_pictures


@pytest.mark.parametrize(
    ("name", "said", "given"),
    [(name, said, one) for name, (_, bad) in KINDS.items() for said, several in bad.items() for one in several],
)
def test_what_is_no_picture_is_refused_with_what_it_is(begin, name, said, given):
    if name == "style":
        given = [given, PICTURE]
    with pytest.raises(deepstyle.UserError, match=said) as refused:
        begin(**{name: given})
    assert name.split("_")[0] in str(refused.value)


def test_without_a_style_there_is_nothing_to_paint(begin):
    several: tuple = [], (), None, iter([])
    for nothing in several:
        with pytest.raises(deepstyle.UserError, match="there is no style picture"):
            begin(style=nothing)


def test_a_mask_of_bool_is_one_of_0_and_255():
    given = Pictures(PICTURE, (PICTURE,), (HALF == 255,), HALF == 255, HALF == 255)
    for mask in (given.content_mask, given.color_mask, *given.style_masks):
        np.testing.assert_array_equal(mask, HALF)
        assert mask.dtype == np.uint8


def test_a_single_style_or_mask_needs_no_list(begin):
    begin(style=PICTURE, style_masks=HALF)
    begin(style=(one for one in [PICTURE, CLEAR]), style_masks=[HALF, HALF])
    begin(style_masks=None)


def test_a_picture_in_any_order_in_memory_is_the_same():
    for order in (np.asfortranarray(PICTURE), PICTURE[::-1][::-1], np.repeat(PICTURE, 2, axis=1)[:, ::2]):
        assert Pictures(order, (order,)).digests() == Pictures(PICTURE, (PICTURE,)).digests()
        np.testing.assert_array_equal(resize(order, (20, 30)), resize(PICTURE, (20, 30)))


VALUES = [0, 1, 2, -1, 0.5, 40, np.int64(32), np.float32(2), np.bool_(True), None, "", "1", "true", "luma", [], [1, 2]]
VALUES += [np.array([1.0, 2]), "conv4_2", ["conv1_1", "conv2_1"], "keep", "red", float("nan"), 1j, b"x", 10**400, {}]


def test_whatever_is_given_stylize_begins_or_says_what_is_wrong(begin):
    chance, begun = random.Random(0), 0
    names = list(vars(Settings()))
    for _ in range(400):
        given = {name: chance.choice(VALUES) for name in chance.sample(names, chance.choice([0, 0, 1, 1, 2]))}
        for name, (good, bad) in KINDS.items():
            wrong = [one for several in bad.values() for one in several]
            given[name] = chance.choice(wrong if chance.random() < 0.1 else good)
        given["style"] = chance.choice([given["style"], [given["style"]], [given["style"], PICTURE]])
        try:
            begun += bool(begin(**given))
        except deepstyle.UserError as error:
            assert "\n" not in str(error)
    assert 50 < begun < 350


LARGE = smooth_picture(1, 1100, 1500)  # several bands
OTHER = LARGE[::-1] // 2 + 20


def test_what_is_done_a_band_at_a_time_is_what_is_done_at_once():
    for method, resampling in RESAMPLING.items():
        at_once = np.asarray(Image.fromarray(LARGE).resize((700, 400), resampling))
        np.testing.assert_array_equal(resize(LARGE, (400, 700), method), at_once)
    luma, chroma = (Image.fromarray(one).convert("YCbCr").split() for one in (OTHER, LARGE))
    at_once = np.asarray(Image.merge("YCbCr", (luma[0], *chroma[1:])).convert("RGB"))
    np.testing.assert_array_equal(with_colours_of(LARGE, OTHER), at_once)
    np.testing.assert_array_equal(to_input_space(LARGE), LARGE[..., ::-1].astype(np.float32) - MEAN_BGR)
    x = np.random.default_rng(0).normal(0, 150, LARGE.shape)
    at_once = np.clip(np.rint(x + MEAN_BGR), 0, 255).astype(np.uint8)[..., ::-1]
    np.testing.assert_array_equal(from_input_space(x), at_once)
    clear = np.dstack([LARGE, OTHER[..., 0]])
    on_red = Image.alpha_composite(Image.new("RGBA", (1500, 1100), "red"), Image.fromarray(clear)).convert("RGB")
    np.testing.assert_array_equal(on_colour(clear, "red"), np.asarray(on_red))


def test_mean_and_covariance_are_those_of_all_pixels():
    mask = np.random.default_rng(0).random((1100, 1500, 1))
    clear = np.dstack([LARGE, OTHER[..., 0]])
    counted = {"all": (LARGE, None, None), "mask": (LARGE, mask, mask)}
    counted |= {"alpha": (clear, None, clear[..., 3] / 255), "both": (clear, mask, mask * clear[..., 3:] / 255)}
    for picture, limits, counts in counted.values():
        pixels, weights = LARGE.reshape(-1, 3).astype(float), None if counts is None else counts.ravel()
        found = colours(picture, limits)
        np.testing.assert_allclose(found.mean, np.average(pixels, 0, weights), rtol=1e-10)
        expected = np.cov(pixels.T, aweights=weights, ddof=1 if weights is None else 0)
        np.testing.assert_allclose(found.covariance, expected, rtol=1e-9)


HUGE = np.broadcast_to(smooth_picture(1, 1, 3000), (2000, 3000, 3))
SHADE = np.broadcast_to(np.float32(0.5), (2000, 3000, 1))


@pytest.mark.parametrize(
    "step",
    [
        lambda: colours(HUGE).mean,
        lambda: match_colours(HUGE, HUGE[:, ::-1]),
        lambda: recolour(HUGE, [HUGE[:, ::-1], HUGE], [1.0, 2.0], []),
        lambda: recolour(HUGE, [HUGE[:, ::-1], HUGE], [1.0, 2.0], [SHADE, SHADE]),
        lambda: with_colours_of(HUGE, HUGE[:, ::-1]),
        lambda: resize(HUGE, (2000, 2999)),
        lambda: to_input_space(HUGE),
        lambda: from_input_space(np.broadcast_to(np.float32(1), HUGE.shape)),
    ],
)
def test_large_pictures_take_little_memory_beside_the_result(step):
    tracemalloc.start()
    result = step()
    beside = tracemalloc.get_traced_memory()[1] - result.nbytes
    tracemalloc.stop()
    assert beside < 70e6  # a float for each number would be 144 MB

"""Transparent pictures: what counts, what the network sees, what is saved."""

import dataclasses
import math

import imageio.v3
import numpy as np
import oracle
import pytest
from conftest import describe, held_by, pixels, run_quietly, smooth_picture
from odd_files import chunk, png, tiff
from PIL import Image
from test_losses import LAYERS, SIZE, found, on_grid, picture, soft_mask, some_x  # noqa: F401

import deepstyle
from deepstyle import STYLE, Pictures, Settings, stages_of
from deepstyle_support.colours import colours, match_colours
from deepstyle_support.images import MEAN_BGR, resize, to_input_space
from deepstyle_support.memory import PLACED_MASK, animation_bytes
from deepstyle_support.transparency import alpha_of, filled, on_colour


def clear(seed, size=SIZE, beneath=0):
    """A picture that is opaque in its middle, transparent at its border, and between half transparent: RGBA."""
    alpha = np.zeros(size, np.uint8)
    alpha[4:-4, 6:-8] = 128
    alpha[8:-6, 12:-10] = 255
    rgb = np.where(alpha[..., None] > 0, smooth_picture(seed, *size), np.uint8(beneath))
    return np.dstack([rgb, alpha])


def gram_within(f, weight):
    """The Gram matrix of a whole picture like the part where the weight is."""
    return oracle.gram(f * np.sqrt(weight)) / weight.mean()


@pytest.mark.parametrize("tile", ["off", "32"])
def test_a_styles_gram_is_that_of_its_opaque_part(untrained, found, tile):  # noqa: F811
    style = clear(2, (64, 50))
    parts = deepstyle.Objective(picture(1), style, weights=untrained, tile=tile).evaluate(some_x()).parts
    f_style = oracle.features(oracle.to_input_space(filled(style)), untrained, "ave")
    for layer in LAYERS:
        target = gram_within(f_style[layer], on_grid(style[..., 3], layer))
        target = target * math.prod(found[layer].shape[:2]) / math.prod(f_style[layer].shape[:2])
        expected = ((target - oracle.gram(found[layer])) ** 2).sum() / (4 * 3**2 * math.prod(SIZE) ** 2) / 5
        assert parts[f"style {layer}"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("tile", ["off", "32"])
def test_where_the_content_is_transparent_nothing_counts_with_masks_or_without(untrained, found, tile):  # noqa: F811
    content, style, mask = clear(1), picture(2), soft_mask(5)
    options = {"content_layer": "conv4_2", "weights": untrained, "tile": tile}
    target = oracle.features(oracle.to_input_space(filled(content)), untrained, "ave")["conv4_2"]
    f_style = oracle.features(oracle.to_input_space(style), untrained, "ave")
    for masks, weight in (({}, content[..., 3]), ({"style_masks": [mask], "content_mask": mask}, None)):
        weight = content[..., 3].astype(float) * mask / 255 if weight is None else weight
        parts = deepstyle.Objective(content, style, **masks, **options).evaluate(some_x()).parts
        for layer in LAYERS:
            difference = oracle.gram(f_style[layer]) - gram_within(found[layer], on_grid(weight, layer))
            expected = (difference**2).sum() / (4 * 3**2 * math.prod(SIZE) ** 2) / 5
            assert parts[f"style {layer}"] == pytest.approx(expected, rel=2e-4)
        expected = 0.025 * ((found["conv4_2"] - target) ** 2 * on_grid(weight, "conv4_2")).sum()
        assert parts["content conv4_2"] == pytest.approx(expected, rel=1e-4)


def test_several_styles_share_the_contents_alpha(untrained):
    content, styles = clear(1), [picture(2), clear(4)]
    alpha = content[..., 3]
    plain = deepstyle.Objective(content, styles, weights=untrained)
    masked = deepstyle.Objective(
        filled(content), styles, style_masks=[alpha, alpha], content_mask=alpha, weights=untrained
    )
    assert plain.evaluate(some_x()).parts == pytest.approx(masked.evaluate(some_x()).parts, rel=1e-5)
    assert len(plain.tiled.places(STYLE)) == len(LAYERS)  # and not once for each of them


def test_what_is_beneath_the_transparency_changes_nothing(untrained):
    losses = [
        deepstyle.Objective(clear(1, beneath=beneath), clear(2, beneath=beneath), weights=untrained)(some_x())[0]
        for beneath in (0, 201)
    ]
    assert losses[0] == losses[1]


def test_the_picture_is_continued_by_its_own_colours_and_has_no_outline():
    flat = np.full((40, 60, 4), (200, 90, 40, 0), np.uint8)
    flat[..., :3] = 0
    flat[10:14, 20:23] = (200, 90, 40, 255)
    flat[14, 20:23] = (200, 90, 40, 100)
    assert np.abs(filled(flat).astype(int) - (200, 90, 40)).max() <= 4  # 8 bits, a few times rounded
    content = clear(1)
    opaque = content[..., 3] == 255
    np.testing.assert_array_equal(filled(content)[opaque], content[opaque][:, :3])


def test_an_opaque_alpha_is_none():
    opaque = np.dstack([picture(1), np.full(SIZE, 255, np.uint8)])
    assert alpha_of(opaque) is None
    options = {"weights": "random", "image_size": 37, "num_iter": 1}
    (with_alpha,), (without,) = (deepstyle.stylize(one, picture(2), **options) for one in (opaque, picture(1)))
    np.testing.assert_array_equal(with_alpha.picture, without.picture)


def test_colours_are_matched_where_pictures_are_opaque():
    style, content = clear(2), clear(1)
    matched = match_colours(style, content)
    np.testing.assert_array_equal(matched[..., 3], style[..., 3])
    np.testing.assert_allclose(colours(matched).mean, colours(content).mean, atol=2)
    inside = content[content[..., 3] > 0].astype(float)
    mean = np.average(inside[:, :3], axis=0, weights=inside[:, 3])
    np.testing.assert_allclose(colours(content).mean, mean, rtol=1e-6)


@pytest.mark.parametrize("start", ["content", "gray", "recolored", "noise"])
def test_any_start_is_without_holes(start):
    pictures = Pictures(clear(1), (clear(2),))
    (stage,) = stages_of(pictures, Settings(image_size=37, init_image=start))
    x = stage.start()
    assert x.shape == (*SIZE, 3)
    border = (x + MEAN_BGR)[0]
    assert border.min() > 5 or start == "noise"  # not the black that is beneath


def test_the_result_has_the_contents_alpha_at_its_size():
    content, x = clear(1), to_input_space(picture(3, (20, 28)))
    for settings in (Settings(), Settings(rescale_image=True), Settings(preserve_color=True)):
        result = deepstyle.finish(x, content, settings)
        size = SIZE if settings.rescale_image else (20, 28)
        assert result.shape == (*size, 4)
        np.testing.assert_array_equal(result[..., 3], resize(content[..., 3], size))
    np.testing.assert_array_equal(deepstyle.finish(x, content, Settings())[..., :3], picture(3, (20, 28)))


def test_colours_of_the_content_are_kept_at_a_transparent_edge():
    content, x = clear(1), to_input_space(picture(3))
    kept, of_filled = (deepstyle.finish(x, one, Settings(preserve_color=True)) for one in (content, filled(content)))
    np.testing.assert_array_equal(kept[..., :3], of_filled)


def read(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    picture, notes = deepstyle.read_picture(str(tmp_path / "a"))
    return picture[..., :3], np.full(picture.shape[:2], 255) if picture.shape[2] == 3 else picture[..., 3], notes


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_grey_of_any_bits_may_be_transparent_in_a_png(tmp_path, bits):
    # Of 16 bits some greys differ in the lower 8 only.
    greys = np.random.default_rng(0).integers(0, min(2**bits, 5), (20, 30)) + (0x1230 if bits == 16 else 0)
    for grey in np.unique(greys):
        beyond = 0xAB00 if bits in (2, 4, 8) else 0  # bits that do not count
        data = png(0, bits, greys, chunk(b"tRNS", int(grey | beyond).to_bytes(2, "big")))
        shown, alpha, notes = read(tmp_path, data)
        np.testing.assert_array_equal(alpha, np.where(greys == grey, 0, 255))
        np.testing.assert_allclose(shown[..., 0], greys * 255 / (2**bits - 1), atol=1)
        assert notes == []


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("turned", [False, True])
def test_a_colour_may_be_transparent_in_a_png(tmp_path, bits, turned):
    colours = np.random.default_rng(0).integers(0, 3, (20, 30, 3)) + (0x1200 if bits == 16 else 0)
    key = b"".join(int(number).to_bytes(2, "big") for number in colours[3, 3])
    orientation = chunk(b"eXIf", b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0")
    chunks = [chunk(b"tRNS", key), *([orientation] if turned else [])]
    _, alpha, _ = read(tmp_path, png(2, bits, colours, *chunks))
    expected = np.where((colours == colours[3, 3]).all(axis=-1), 0, 255)
    np.testing.assert_array_equal(alpha, np.rot90(expected, -1) if turned else expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_palettes_colours_may_be_transparent_in_any_degree(tmp_path, bits):
    generator = np.random.default_rng(0)
    index, table = generator.integers(0, 2**bits, (20, 30)), generator.integers(0, 256, (2**bits, 4), np.uint8)
    table[:, 3] //= 2
    chunks = chunk(b"PLTE", table[:, :3].tobytes()), chunk(b"tRNS", table[:, 3].tobytes())
    shown, alpha, _ = read(tmp_path, png(3, bits, index, *chunks))
    np.testing.assert_array_equal(np.dstack([shown, alpha]), table[index])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("extra", "in_planes"), [(0, False), (1, False), (2, False), (1, True), (2, True)])
def test_a_tiffs_extra_samples_say_what_they_are(tmp_path, extra, in_planes, compressed, order):
    pixels = np.random.default_rng(0).integers(1, 256, (20, 30, 4), np.uint8)
    alpha = pixels[..., 3:]
    stored = np.dstack([np.minimum(pixels[..., :3], alpha), alpha]) if extra == 1 else pixels
    tags = {258: (3, [8] * 4), 262: (3, [2]), 277: (3, [4]), 338: (3, [extra]), 284: (3, [1 + in_planes])}
    planes = [stored[..., channel].tobytes() for channel in range(4)] if in_planes else [stored.tobytes()]
    shown, opacity, _ = read(tmp_path, tiff(planes, (20, 30), tags, order, compressed))
    np.testing.assert_array_equal(opacity, alpha[..., 0] if extra else 255)
    expected = np.minimum(stored[..., :3] * 255.0 / alpha, 255) if extra == 1 else pixels[..., :3]
    assert np.abs(shown - expected).max() <= 1


@pytest.fixture
def clear_files(tmp_path):
    paths = [str(tmp_path / "content.png"), str(tmp_path / "style.png")]
    for path, seed in zip(paths, (1, 2), strict=True):
        Image.fromarray(clear(seed, (48, 64))).save(path)
    return paths


def test_a_run_keeps_the_alpha_through_sizes_resume_and_describe(clear_files, tmp_path, capsys):
    flags = ["--image_size", 64, "--scales", 2, "--coarse_iter", 1, "--rescale_image"]
    assert run_quietly(clear_files, tmp_path / "a", *flags, "--num_iter", 1) == 0
    assert run_quietly(clear_files, tmp_path / "a", *flags, "--num_iter", 2, "--resume") == 0
    alpha = pixels(clear_files[0])[..., 3]
    for number in (1, 2):
        np.testing.assert_array_equal(pixels(tmp_path / f"a_at_iteration_{number}.png")[..., 3], alpha)
    assert Image.open(tmp_path / "a_at_iteration_2.png").info["srgb"] == 1
    assert pixels(tmp_path / "a_at_32x42_iteration_1.png").shape == (32, 42, 4)
    assert "the content picture's SHA-256" in describe(tmp_path / "a_at_iteration_1.png", capsys)
    opaque = np.asarray(Image.open(clear_files[0]))[..., :3]
    Image.fromarray(opaque).save(clear_files[0])
    assert run_quietly(clear_files, tmp_path / "a", *flags, "--num_iter", 3, "--resume") == 2
    assert "the content picture's SHA-256 was" in capsys.readouterr().err


def test_a_background_is_what_laying_them_on_it_before_would_make(clear_files, tmp_path, capsys):
    assert run_quietly(clear_files, tmp_path / "a", "--num_iter", 1, "--background", "#306090") == 0
    assert "--background '#306090'" in describe(tmp_path / "a_at_iteration_1.png", capsys)
    for path in clear_files:
        file = Image.open(path)
        Image.alpha_composite(Image.new("RGBA", file.size, (48, 96, 144)), file).convert("RGB").save(path)
    # Nor is it another run: the pictures are the same.
    assert run_quietly(clear_files, tmp_path / "a", "--num_iter", 1, "--resume") == 0
    assert run_quietly(clear_files, tmp_path / "b", "--num_iter", 1) == 0
    np.testing.assert_array_equal(pixels(tmp_path / "a_at_iteration_1.png"), pixels(tmp_path / "b_at_iteration_1.png"))


def test_stylize_takes_transparent_arrays_as_the_command_takes_files(clear_files, tmp_path):
    assert run_quietly(clear_files, tmp_path / "a", "--num_iter", 1) == 0
    content, style = (pixels(path) for path in clear_files)
    options = {"weights": "random", "image_size": 32, "num_iter": 1}
    (iteration,) = deepstyle.stylize(content, style, **options)
    np.testing.assert_array_equal(iteration.picture, pixels(tmp_path / "a_at_iteration_1.png"))
    (on_background,) = deepstyle.stylize(content, style, background="white", **options)
    white = [on_colour(one, "white") for one in (content, style)]
    (before,) = deepstyle.stylize(*white, **options)
    np.testing.assert_array_equal(on_background.picture, before.picture)


@pytest.mark.parametrize("kind", ["gif", "webp", "mp4"])
def test_an_animation_has_the_alpha_that_it_can_have(clear_files, tmp_path, kind):
    # Resumed, so that frames come from saved pictures as well.
    assert run_quietly(clear_files, tmp_path / "a", "--num_iter", 1) == 0
    assert run_quietly(clear_files, tmp_path / "a", "--resume", "--animation", tmp_path / f"a.{kind}") == 0
    alpha = pixels(tmp_path / "a_at_iteration_2.png")[..., 3]
    if kind == "mp4":
        frame = imageio.v3.imread(tmp_path / "a.mp4", index=0)
        assert frame[alpha == 0].min() > 200  # white, as video has it
        return
    with Image.open(tmp_path / f"a.{kind}") as animation:
        assert animation.n_frames == 3
        assert kind == "gif" or animation.info["icc_profile"]
        for index in range(3):
            animation.seek(index)
            shown = np.asarray(animation.convert("RGBA"))[..., 3]
            np.testing.assert_array_equal(shown, np.where(alpha > 127, 255, 0) if kind == "gif" else alpha)


def test_what_is_all_transparent_is_one_clear_error(clear_files, tmp_path, capsys):
    nothing = tmp_path / "nothing.png"
    Image.fromarray(np.zeros((48, 64, 4), np.uint8)).save(nothing)
    for pair, name in (([nothing, clear_files[1]], "content"), ([clear_files[0], nothing], "style")):
        assert run_quietly([*map(str, pair)], tmp_path / "a") == 2
        said = f"deepstyle: error: the {name} picture is all transparent; --background COLOUR lays it on a colour\n"
        assert capsys.readouterr().err == said
    # A row that pooling leaves out, and a mask that is white where the content is transparent only.
    sliver = clear(1)
    sliver[..., 3] = 0
    sliver[-1, :, 3] = 255
    settings = Settings(image_size=37)
    with pytest.raises(deepstyle.UserError, match="the style's alpha is all black at conv2_1"):
        deepstyle.check_agreement(Pictures(picture(1), (sliver,)), settings)
    outside = np.where(clear(1)[..., 3] == 0, 255, 0).astype(np.uint8)
    with pytest.raises(deepstyle.UserError, match="the style mask times the content's alpha is all black at conv1_1"):
        deepstyle.check_agreement(Pictures(clear(1), (picture(2),), (outside,)), settings)


@pytest.mark.parametrize("colour", ["", "reddish", "#12", "x" * 200])
def test_a_background_that_is_no_colour_is_refused(colour):
    with pytest.raises(deepstyle.UserError, match=r"--background is '.*'; it must be a colour's name"):
        Settings(background=colour)


def test_the_plan_counts_the_alpha_of_the_inputs_the_result_and_the_frames():
    opaque = Pictures(picture(1), (picture(2),))
    transparent = dataclasses.replace(opaque, content=clear(1))
    settings = Settings(image_size=37)
    more = held_by(transparent, settings).kept - held_by(opaque, settings).kept
    assert more == pytest.approx(math.prod(SIZE) * (1 + 5 + PLACED_MASK))
    frames = [animation_bytes(SIZE, channels, 3) for channels in (3, 4)]
    assert frames[1] - frames[0] == math.prod(SIZE) * 3 * 4

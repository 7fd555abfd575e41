"""The files of a run: their names, that they are whole, how runs are kept apart and gone on with."""

import json
import os
import shutil

import forked
import numpy as np
import pytest
from conftest import SMALL, run, smooth_picture
from PIL import Image

import deepstyle
from deepstyle import Settings
from deepstyle_app import ownership
from deepstyle_app.command import main
from deepstyle_app.locks import lock_of
from deepstyle_app.ownership import RunFiles, base_path
from deepstyle_app.run import what_shapes
from deepstyle_support import disk
from deepstyle_support.disk import write_whole
from deepstyle_support.engine import Engine
from deepstyle_support.images import from_input_space


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_prefix_names_the_files(tmp_path):
    (tmp_path / "there").mkdir()
    bases = {"out/a": "out/a", "out/": "out/result_image", str(tmp_path / "there"): f"{tmp_path}/there/result_image"}
    for prefix, expected in bases.items():
        base = base_path(prefix)
        assert str(RunFiles(base).picture_path(3)) == f"{expected}_at_iteration_3.png"
        assert str(RunFiles(base).state_path) == f"{expected}_state.npz"


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"before")

    def half(file):
        file.write(b"half")
        assert path.read_bytes() == b"before"
        raise OSError(28, "No space left on device")

    with pytest.raises(deepstyle.UserError, match=r"cannot write .*No space left") as caught:
        write_whole(path, half)
    assert caught.value.status == 1
    assert path.read_bytes() == b"before"
    write_whole(path, lambda file: file.write(b"after"))
    assert path.read_bytes() == b"after"
    assert names(tmp_path) == ["a.png"]


def test_on_windows_who_reads_a_file_is_in_the_way_of_the_next_for_a_moment_only(tmp_path, monkeypatch):
    path, replace = tmp_path / "a", os.replace
    refused: list[str] = []

    def replace_unless_read(name, target):
        if len(refused) < 2:
            refused.append(name)
            raise PermissionError(13, "Access is denied")
        replace(name, target)

    monkeypatch.setattr(disk, "fcntl", None)
    monkeypatch.setattr(disk.os, "replace", replace_unless_read)
    write_whole(path, lambda file: file.write(b"after"))
    assert path.read_bytes() == b"after"
    assert len(refused) == 2


def test_every_iteration_leaves_its_state(picture_files, tmp_path):
    assert run(picture_files, tmp_path / "a", "--quiet") == 0
    with np.load(tmp_path / "a_state.npz", allow_pickle=False) as state:
        assert state["iteration"] == 2
        assert state["x"].dtype == np.float32
        assert state["losses"].shape == (3, 4)
        shown = from_input_space(state["x"])
        shaped_by = json.loads(str(state["shaped_by"]))
    saved = np.asarray(Image.open(tmp_path / "a_at_iteration_2.png"))
    np.testing.assert_allclose(shown.astype(int), saved, atol=1)  # float32 may round the other way
    assert shaped_by["--image_size"] == "32"
    assert {"the content picture's SHA-256", "the style picture's SHA-256", "the weights' SHA-256"} < set(shaped_by)


def test_same_command_twice_moves_the_earlier_run_aside(picture_files, tmp_path, capfd):
    out = tmp_path / "out"
    for seed in "012":
        assert run(picture_files, out / "a", "--num_iter", "1", "--seed", seed) == 0
    first = ["a_at_iteration_1.png", "a_state.npz"]
    assert names(out) == [*first[:1], "a_earlier_1", "a_earlier_2", *first[1:]]
    assert names(out / "a_earlier_1") == names(out / "a_earlier_2") == first
    with np.load(out / "a_earlier_1" / "a_state.npz") as state:
        assert json.loads(str(state["shaped_by"]))["--seed"] == "0"
    assert capfd.readouterr().out.count("moved 2 files of an earlier run to ") == 2


def test_only_files_of_the_same_prefix_are_moved(picture_files, tmp_path):
    others = ["a_at_iteration_x.png", "ab_at_iteration_1.png", "a.png", "a_at_iteration_1.png.txt", "b_state.npz"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / "a_at_iteration_7.png").touch()
    assert RunFiles(tmp_path / "a").clear_the_way(overwrite=False) != ""
    assert names(tmp_path / "a_earlier_1") == ["a_at_iteration_7.png"]
    assert set(others) < set(names(tmp_path))


def test_what_a_killed_run_was_writing_is_cleared_away(tmp_path):
    unfinished = "a_at_iteration_7.png.0123abcd", "a_state.npz.0123abcd", "a.html.0123abcd", "a_state.npz"  # by 0.2.0
    for name in (*unfinished, "b_at_iteration_7.png.0123abcd"):
        (tmp_path / f".{name}.part").touch()
    with RunFiles(tmp_path / "a", report=tmp_path / "a.html").owned():
        assert ".b_at_iteration_7.png.0123abcd.part" in names(tmp_path)
        assert not list(tmp_path.glob(".a*.part"))


def everything(out):
    return ["--log", str(out / "a.csv"), "--report", str(out / "a.html"), "--tensorboard", str(out / "events")]


def test_a_folder_that_was_copied_does_not_own_the_originals_files(picture_files, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    elsewhere = tmp_path / "all.gif"
    assert run(picture_files, first / "a", *everything(first), "--animation", str(elsewhere)) == 0
    before = {path: path.read_bytes() for path in [*first.rglob("*"), elsewhere] if path.is_file()}
    shutil.copytree(first, second)
    assert run(picture_files, second / "a", "--num_iter", "1", "--overwrite") == 0
    assert before == {path: path.read_bytes() for path in before}
    assert names(second) == ["a_at_iteration_1.png", "a_state.npz", "events"]
    assert names(second / "events") == []


def test_a_folder_that_was_moved_is_gone_on_with(picture_files, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(picture_files, first / "a", *everything(first)) == 0
    first.rename(second)
    assert run(picture_files, second / "a", *everything(second), "--num_iter", "3", "--resume") == 0
    assert len((second / "a.csv").read_text().splitlines()) == 4


def test_what_a_run_wrote_stays_its_own_while_it_goes_on_without(picture_files, tmp_path):
    log = ["--log", str(tmp_path / "a.csv")]
    for number, flags in enumerate((log, [], log), 1):
        assert run(picture_files, tmp_path / "a", *flags, "--num_iter", str(number), "--resume") == 0


def test_an_input_that_an_earlier_run_wrote_is_not_removed(picture_files, tmp_path, capfd):
    animation = tmp_path / "first.gif"
    assert run(picture_files, tmp_path / "a", "--animation", str(animation)) == 0
    assert run(picture_files, tmp_path / "a", "--init_image", str(animation), "--overwrite") == 2
    assert "is an input, and an earlier run wrote it; choose another PREFIX" in capfd.readouterr().err
    assert animation.exists()


@pytest.mark.parametrize("flag", ["content_mask", "style_masks", "color_mask", "init_image", "weights"])
def test_none_of_the_files_that_are_read_is_written_over(picture_files, tmp_path, capfd, flag):
    picture = tmp_path / "a_at_iteration_7.png"
    shutil.copy(picture_files[0], picture)
    before = picture.read_bytes()
    command = [*picture_files, tmp_path / "a", *SMALL, "--preserve_color", "luma", "--overwrite", f"--{flag}", picture]
    assert main([*map(str, command)]) == 2
    assert f"'{picture}' is an input, and a run with this PREFIX would write there" in capfd.readouterr().err
    assert picture.read_bytes() == before


def test_events_of_another_run_are_left_alone(picture_files, tmp_path, capfd):
    events = tmp_path / "events"
    flags = ["--tensorboard", str(events)]
    assert run(picture_files, tmp_path / "a", *flags, "--style_weight", "1e38") == 1
    assert run(picture_files, tmp_path / "a", *flags) == 0  # that one had left none
    foreign = events / "events.out.tfevents.1.another"
    foreign.touch()
    capfd.readouterr()
    assert run(picture_files, tmp_path / "a", *flags, "--overwrite") == 2
    assert "is there, and not of a run with this PREFIX" in capfd.readouterr().err
    assert run(picture_files, tmp_path / "a", "--overwrite") == 0
    assert names(events) == [foreign.name]


def test_a_link_is_written_through_and_stays_ours(picture_files, tmp_path):
    link = tmp_path / "link.csv"
    link.symlink_to(tmp_path / "real.csv")
    for number in ("1", "2"):
        assert run(picture_files, tmp_path / "a", "--log", str(link), "--num_iter", number, "--resume") == 0
    assert link.is_symlink()
    assert len((tmp_path / "real.csv").read_text().splitlines()) == 3


def test_a_command_that_is_refused_makes_no_folder(picture_files, tmp_path):
    (tmp_path / "foreign.csv").touch()
    assert run(picture_files, tmp_path / "new" / "a", "--log", str(tmp_path / "foreign.csv")) == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("wrong", ["device", "seed"])
def test_nothing_is_left_of_folders_for_a_run_that_is_refused(picture_files, tmp_path, monkeypatch, wrong):
    assert run(picture_files, tmp_path / "a", "--num_iter", "1") == 0

    def refuse(engine):
        raise deepstyle.UserError("no device")

    monkeypatch.setattr(Engine, "start", refuse)
    before = sorted(tmp_path.rglob("*"))
    flags = ["--log", str(tmp_path / "new" / "deep" / "a.csv"), "--tensorboard", str(tmp_path / "events")]
    flags += ["--resume", "--seed", "1"] if wrong == "seed" else []
    assert run(picture_files, tmp_path / "a", *flags) == 2
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("flag", "name"), [("--report", "a.html"), ("--log", "a.csv"), ("--tensorboard", ".")])
def test_a_prefix_means_the_same_after_a_run_made_a_folder_of_that_name(picture_files, tmp_path, capfd, flag, name):
    flags = [flag, str(tmp_path / "a" / name)]
    assert run(picture_files, tmp_path / "a", *flags, "--num_iter", "1") == 0
    assert run(picture_files, tmp_path / "a", *flags, "--resume") == 0
    assert "going on after iteration 1\n" in capfd.readouterr().out
    assert run(picture_files, tmp_path / "a", "--num_iter", "1", "--overwrite") == 0
    assert "replacing " in capfd.readouterr().out
    assert names(tmp_path) == ["a", "a_at_iteration_1.png", "a_state.npz", "content.png", "style.png"]
    assert names(tmp_path / "a") == []


def test_another_runs_log_that_took_the_place_of_ours_is_left_alone(picture_files, tmp_path, capfd):
    flags = ["--num_iter", "1", "--log", str(tmp_path / "a.csv"), "--report", str(tmp_path / "a.html")]
    assert run(picture_files, tmp_path / "a", *flags) == 0
    for name in ("a.csv", "a.html"):
        (tmp_path / name).rename(tmp_path / f"moved {name}")
    assert run(picture_files, tmp_path / "b", *flags) == 0
    theirs = [(tmp_path / name).read_bytes() for name in ("a.csv", "a.html")]
    assert run(picture_files, tmp_path / "a", "--num_iter", "1", "--overwrite") == 0
    assert run(picture_files, tmp_path / "a", *flags, "--overwrite") == 2
    assert "is there, and not of a run with this PREFIX" in capfd.readouterr().err
    assert [(tmp_path / name).read_bytes() for name in ("a.csv", "a.html")] == theirs


def test_a_log_through_a_link_is_not_written_by_two_runs(picture_files, tmp_path, capfd):
    (tmp_path / "link.csv").symlink_to("real.csv")
    with lock_of(tmp_path / "real.csv"):
        assert run(picture_files, tmp_path / "a", "--log", str(tmp_path / "link.csv")) == 2
    assert "another run is writing" in capfd.readouterr().err


def test_a_run_without_locks_says_so_and_leaves_none_behind(picture_files, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("deepstyle_app.locks.has_locks", lambda folder: False)
    for quiet, told in (([], 1), (["--quiet"], 0)):
        assert run(picture_files, tmp_path / "out" / "a", "--num_iter", "1", "--overwrite", *quiet) == 0
        assert capfd.readouterr().err.count("has no locks: see that no other run writes there") == told
    assert names(tmp_path / "out") == ["a_at_iteration_1.png", "a_state.npz"]


def test_pictures_and_events_may_go_to_one_name(picture_files, tmp_path):
    assert run(picture_files, tmp_path / "a", "--tensorboard", str(tmp_path / "a")) == 0


def test_a_part_of_an_iteration_is_written_over_though_every_leaves_it_out(picture_files, tmp_path):
    assert run(picture_files, tmp_path / "a", "--num_iter", "1") == 0
    (tmp_path / "a_at_iteration_2.png").write_text("a part")
    assert run(picture_files, tmp_path / "a", "--num_iter", "3", "--every", "3", "--resume") == 0
    Image.open(tmp_path / "a_at_iteration_2.png").verify()


def test_a_run_that_ended_for_lack_of_improvement_is_not_gone_on_with(picture_files, tmp_path, capfd):
    enough = ["--num_iter", "5", "--min_improvement", "99.9"]
    assert run(picture_files, tmp_path / "a", *enough) == 0
    capfd.readouterr()
    assert run(picture_files, tmp_path / "a", *enough, "--resume") == 0
    assert "nothing to do: the last iteration improved by less than 99.9 %" in capfd.readouterr().err
    assert not (tmp_path / "a_at_iteration_3.png").exists()


def test_overwrite_replaces_the_earlier_run(picture_files, tmp_path):
    out = tmp_path / "out"
    assert run(picture_files, out / "a", "--quiet") == 0
    assert run(picture_files, out / "a", "--quiet", "--num_iter", "1", "--overwrite") == 0
    assert names(out) == ["a_at_iteration_1.png", "a_state.npz"]


def test_resume_goes_on_to_the_iterations_now_given(picture_files, tmp_path, capfd):
    assert run(picture_files, tmp_path / "a") == 0
    before = (tmp_path / "a_at_iteration_2.png").read_bytes()
    capfd.readouterr()
    assert run(picture_files, tmp_path / "a", "--num_iter", "4", "--resume") == 0
    said = capfd.readouterr().out.splitlines()
    assert said[0] == "going on after iteration 2"
    assert said[4].startswith("iteration 3/4: ")
    assert said[5].startswith("iteration 4/4: ")
    assert (tmp_path / "a_at_iteration_2.png").read_bytes() == before
    with np.load(tmp_path / "a_state.npz") as state:
        losses = state["losses"][:, 0]
    assert len(losses) == 5
    assert np.all(np.diff(losses) < 0)


def test_resume_with_nothing_left_to_do_says_so(picture_files, tmp_path, capfd):
    assert run(picture_files, tmp_path / "a") == 0
    capfd.readouterr()
    assert run(picture_files, tmp_path / "a", "--resume") == 0
    assert "nothing to do: iteration 2 is done" in capfd.readouterr().err


def test_resume_of_nothing_is_a_new_run(picture_files, tmp_path, capfd):
    assert run(picture_files, tmp_path / "a", "--resume") == 0
    assert "nothing to resume" in capfd.readouterr().out
    assert (tmp_path / "a_at_iteration_2.png").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--image_size", "33"], "--image_size was 32 and now is 33"),
        (["--style_weight", "2"], "--style_weight was 1.0 and now is 2.0"),
        (["--content_layer", "conv4_2"], "--content_layer was conv5_2 and now is conv4_2"),
        (["--seed", "1"], "--seed was 0 and now is 1"),
        (["--padding", "edge"], "--padding was zeros and now is edge"),
        (["--coarse_iter", "3"], "--coarse_iter was 5 and now is 3"),
        (["--preserve_color"], "--preserve_color was False and now is luma"),
    ],
)
def test_resume_refuses_another_run(picture_files, tmp_path, capfd, flags, said):
    assert run(picture_files, tmp_path / "a", "--num_iter", "1") == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(picture_files, tmp_path / "a", "--resume", *flags) == 2
    assert said in capfd.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_resume_refuses_other_inputs(picture_files, tmp_path, capfd):
    assert run(picture_files, tmp_path / "a", "--num_iter", "1") == 0
    other = tmp_path / "other.png"
    Image.fromarray(smooth_picture(9, 48, 64)).save(other)
    assert run([str(other), picture_files[1]], tmp_path / "a", "--resume") == 2
    assert "the content picture's SHA-256 was" in capfd.readouterr().err


def test_min_improvement_may_differ_on_resume(untrained):
    pictures = deepstyle.Pictures(smooth_picture(1, 32, 32), (smooth_picture(2, 32, 32),))
    a, b = (
        what_shapes(pictures, settings, untrained)
        for settings in (Settings(), Settings(min_improvement=1.0, num_iter=50))
    )
    assert a == b


def test_metadata_of_the_inputs_does_not_reach_the_outputs(picture_files, tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "my street"
    exif[0x8825] = {1: "N", 2: (48.0, 51.0, 30.0)}  # GPS latitude
    with Image.open(picture_files[0]) as picture:
        picture.save(picture_files[0], exif=exif, icc_profile=b"profile")
    with Image.open(picture_files[0]) as picture:
        assert {0x010E, 0x8825} <= set(picture.getexif())
        assert "icc_profile" in picture.info
    assert run(picture_files, tmp_path / "a", "--quiet", "--num_iter", "1") == 0
    with Image.open(tmp_path / "a_at_iteration_1.png") as picture:
        assert picture.info.keys() == {"Software", "deepstyle", "srgb"}
        assert "street" not in str(picture.info)
        assert len(picture.getexif()) == 0


def test_a_disk_without_room_is_noticed_before_the_start(tmp_path, monkeypatch):
    RunFiles(tmp_path / "a").check([], (32, 32))
    monkeypatch.setattr(ownership.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(deepstyle.UserError, match="1000 bytes free"):
        RunFiles(tmp_path / "a").check([], (32, 32))


def test_the_disk_has_to_have_room_for_what_the_devices_optimiser_knows(picture_files, tmp_path, capfd, monkeypatch):
    room = 32 * 42 * (3 * 4 + 4) + 2 * 10 * 3 * 4 * 32 * 42  # a picture, its state, and ten corrections of two vectors
    usage = type("Usage", (), {"free": room - 1})
    monkeypatch.setattr(ownership.shutil, "disk_usage", lambda folder: usage)
    flags = ["--num_iter", "1", "--tile", "off"]
    assert run(picture_files, tmp_path / "a", *flags, "--optimizer", "device") == 2
    assert f"has {room - 1} bytes free, and one iteration needs {room}" in capfd.readouterr().err
    assert run(picture_files, tmp_path / "a", *flags, "--optimizer", "scipy") == 0


def test_a_folder_that_may_not_be_written_is_noticed_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership.os, "access", lambda folder, mode: False)  # root may write everywhere
    with pytest.raises(deepstyle.UserError, match="no permission"):
        RunFiles(tmp_path / "new" / "a").check([], (32, 32))


def as_state_of_0_2_0(path, **changes):
    """Rewrite a state as an earlier version would have it; a change to None takes a key out."""
    with np.load(path) as file:
        contents = {name: file[name] for name in ("x", "losses", "iteration")}
        shaped_by = json.loads(str(file["shaped_by"])) | changes
    kept = {name: value for name, value in shaped_by.items() if value is not None}
    np.savez(path, shaped_by=json.dumps(kept), **contents)


def test_a_state_that_is_older_than_a_flag_is_gone_on_with_at_the_flags_default(picture_files, tmp_path, capsys):
    command = [*picture_files, str(tmp_path / "a"), *SMALL]
    assert main([*command, "--num_iter", "1"]) == 0
    as_state_of_0_2_0(tmp_path / "a_state.npz", **{"--style_fit": None})
    assert main([*command, "--resume", "--style_size", "64"]) == 2
    as_state_of_0_2_0(tmp_path / "a_state.npz", **{"--style_size": None})
    capsys.readouterr()
    assert main([*command, "--resume", "--style_size", "64"]) == 2
    assert "--style_size was 0 and now is 64" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert (tmp_path / "a_at_iteration_2.png").exists()


def test_a_start_picture_is_known_by_its_digest_whatever_its_path(picture_files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [*picture_files, str(tmp_path / "a"), *SMALL, "--init_image"]
    assert main([*command, "style.png", "--num_iter", "1"]) == 0
    as_state_of_0_2_0(tmp_path / "a_state.npz", **{"--init_image": "style.png"})
    assert main([*command, "content.png", "--resume"]) == 2
    assert "the start picture's SHA-256 was" in capsys.readouterr().err
    assert main([*command, "./style.png", "--resume"]) == 0


@pytest.mark.parametrize("wrong", ["backend", "mask"])
def test_what_is_wrong_is_said_before_an_earlier_run_is_touched(picture_files, tmp_path, wrong):
    command = [*picture_files, tmp_path / "out" / "a", *SMALL, "--quiet"]
    assert main([*map(str, command)]) == 0
    before = names(tmp_path / "out")
    environment = os.environ | ({"KERAS_BACKEND": "numpy"} if wrong == "backend" else {})
    corner = np.zeros((33, 48), np.uint8)
    corner[-1] = 255  # a row that pooling leaves out
    Image.fromarray(corner).save(tmp_path / "corner.png")
    flags = ["--overwrite", "--image_size", "33"]
    flags += ["--style_masks", str(tmp_path / "corner.png")] if wrong == "mask" else []
    run = forked.cold_start(*command, *flags, env=environment)
    said = {"backend": "KERAS_BACKEND is 'numpy'", "mask": "the style mask is all black at conv2_1"}[wrong]
    assert said in run.communicate(timeout=60)[1]
    assert run.returncode == 2
    assert names(tmp_path / "out") == before


def test_two_that_write_the_same_file_at_once_do_not_mix(tmp_path):
    def write_slowly(file):
        file.write(b"one")
        write_whole(tmp_path / "a", lambda other: other.write(b"two"))
        file.write(b" one")

    write_whole(tmp_path / "a", write_slowly)
    assert (tmp_path / "a").read_bytes() == b"one one"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("failing", "advice"),
    [
        (1, "nothing was saved before; make room, and give the command again"),
        (2, "what was saved before is whole; make room, and the same command with --resume goes on from there"),
    ],
)
def test_a_picture_that_finds_no_room_is_said_with_what_to_do_next(
    picture_files, tmp_path, capfd, monkeypatch, failing, advice
):
    written = []

    def refuse(path, write):
        written.append(path) if path.suffix == ".png" else None
        if len(written) >= failing:
            raise deepstyle.UserError("no room", status=1)
        write_whole(path, write)

    monkeypatch.setattr("deepstyle_app.files.write_whole", refuse)
    assert run(picture_files, tmp_path / "a") == 1
    assert capfd.readouterr().err == f"deepstyle: error: no room; {advice}\n"

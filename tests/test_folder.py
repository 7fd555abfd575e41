"""A folder of photos: each is painted, by one process; what is wrong with one stops no other."""

import os
import re
import shlex
import signal

import forked
import numpy as np
import psutil
import pytest
from conftest import SMALL, pixels, smooth_picture, wait_for
from PIL import Image

import deepstyle
from deepstyle_app import folder, inputs, locks, run
from deepstyle_app.command import main
from deepstyle_support import engine
from deepstyle_support.reading import read_picture, shape_of

LAST = "result_image_at_iteration_2.png"


def save(path, seed=1, rows=48, columns=64):
    Image.fromarray(smooth_picture(seed, rows, columns)).save(path, format="PNG")


def names(path):
    return sorted(entry.name for entry in path.iterdir())


@pytest.fixture
def photos(tmp_path):
    """A folder with the photos a.jpg and b c.png, and a style beside it."""
    (tmp_path / "photos").mkdir()
    save(tmp_path / "photos" / "a.jpg", 1)
    save(tmp_path / "photos" / "b c.png", 3, 60, 50)
    save(tmp_path / "style.png", 2, 50, 40)
    return tmp_path / "photos"


def paint(photos, *flags, out="out"):
    base = photos.parent
    return main([str(photos), str(base / "style.png"), str(base / out), *SMALL, "--image_size", "40", *flags])


def test_each_photo_gets_the_pictures_that_it_would_get_alone(photos, tmp_path, capsys):
    assert paint(photos) == 0
    out, err = capsys.readouterr()
    first, weights, *lines = out.splitlines()
    assert first.startswith("painting 2 photos on ")
    assert "weights" in weights
    for number, (line, name) in enumerate(zip(lines, ("a.jpg", "b c.png"), strict=True), 1):
        assert line.startswith(f"{number}/2 {name}: loss ")
        assert line.endswith(f" s, {tmp_path}/out/{name}/{LAST}")
        assert (
            main(
                [
                    f"{photos}/{name}",
                    f"{tmp_path}/style.png",
                    f"{tmp_path}/alone/",
                    *SMALL,
                    "--image_size",
                    "40",
                    "--overwrite",
                ]
            )
            == 0
        )
        np.testing.assert_array_equal(pixels(tmp_path / "out" / name / LAST), pixels(tmp_path / "alone" / LAST))
    assert err == ""


def test_what_fails_is_told_at_the_end_and_stops_nothing(photos, tmp_path, capsys, monkeypatch):
    (photos / "notes.txt").write_text("no picture")
    (photos / "cut.png").write_bytes((photos / "a.jpg").read_bytes()[:400])
    (photos / "lost.png").symlink_to("nowhere")
    os.mkfifo(photos / "pipe.png")
    save(photos / "tall.png", 1, 400, 9)
    for hidden in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (photos / hidden).touch()
    monkeypatch.setattr(folder, "run", only_for(photos / "a.jpg", ValueError("a bug"), folder.run))
    assert paint(photos) == 1
    out, err = capsys.readouterr()
    assert out.startswith("painting 2 of 7 photos on ")
    assert out.splitlines()[2].startswith("2/7 b c.png: loss ")
    at_the_end = err.split("1 of 7 photos are done; the same command with --resume does what is not\n")[1]
    failed = [line.split(": ")[2] for line in at_the_end.splitlines()]
    assert failed == ["a.jpg", "cut.png", "lost.png", "notes.txt", "pipe.png", "tall.png"]
    for reason in ("ValueError: a bug", "is no picture that Pillow can read", "neither a file", "40 x 0 pixels"):
        assert reason in at_the_end
    assert names(tmp_path / "out") == ["b c.png"]


def test_a_page_that_cannot_be_written_is_told_and_stops_nothing(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("deepstyle_app.batch.write_index", lambda *given: 1 / 0)
    assert paint(photos, "--report", "a.html") == 1
    assert "deepstyle: no page of the photos: ZeroDivisionError" in capsys.readouterr().err
    assert all((tmp_path / "out" / name / LAST).exists() for name in ("a.jpg", "b c.png"))


def only_for(path, error, otherwise):
    def run_one(job, *given):
        if job.content == str(path):
            raise error
        return otherwise(job, *given)

    return run_one


def test_network_and_style_are_made_ready_once(photos, tmp_path, monkeypatch):
    save(photos / "c.jpg", 4)  # of a.jpg's shape, so the style is shown in the same size
    made: dict[str, list] = {name: [] for name in ("load_weights", "on_device", "read_picture")}
    for module, name in ((folder, "load_weights"), (run, "load_weights"), (engine, "on_device")):
        monkeypatch.setattr(module, name, noting(made[name], getattr(module, name)))
    monkeypatch.setattr(inputs, "read_picture", noting(made["read_picture"], read_picture))
    shown = []
    grams = deepstyle.Objective._grams
    monkeypatch.setattr(deepstyle.Objective, "_grams", lambda *given: shown.append(given[2].shape) or grams(*given))
    assert paint(photos) == 0
    assert len(made["load_weights"]) == len(made["on_device"]) == 1
    assert made["read_picture"].count(str(tmp_path / "style.png")) == 1
    assert sorted(shown) == [(40, 33, 3), (40, 53, 3)]


def noting(calls, otherwise):
    return lambda *given: calls.append(given[0]) or otherwise(*given)


def test_resume_computes_only_what_is_not_done(photos, tmp_path, capsys, monkeypatch):
    assert paint(photos, "--num_iter", "1") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(run, "paint", None)
        assert paint(photos, "--num_iter", "1", "--resume") == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(", ")[1] for line in lines] == ["done before"] * 2
    assert before == {path: path.read_bytes() for path in before}
    save(photos / "c.jpg", 4)
    assert paint(photos, "--resume") == 0
    assert all((tmp_path / "out" / name / LAST).exists() for name in ("a.jpg", "b c.png", "c.jpg"))
    assert not list((tmp_path / "out").rglob("*earlier*"))


def test_a_picture_that_was_taken_away_stops_no_other(photos, tmp_path, capsys):
    assert paint(photos, "--num_iter", "1", "--report", "a.html") == 0
    (tmp_path / "out" / "a.jpg" / "result_image_at_iteration_1.png").unlink()
    save(photos / "c.jpg", 4)
    assert paint(photos, "--num_iter", "1", "--resume", "--report", "a.html") == 0
    assert (tmp_path / "out" / "c.jpg" / "a.html").exists()


def test_a_report_of_photos_that_were_done_before_is_made(photos, tmp_path):
    (photos / "notes.txt").write_text("no picture")
    assert paint(photos, "--num_iter", "1") == 1
    assert paint(photos, "--num_iter", "1", "--resume", "--report", "a.html") == 1
    page = (tmp_path / "out" / "a.html").read_text()
    assert "a.jpg/a.html" in page
    assert (tmp_path / "out" / "a.jpg" / "a.html").exists()
    assert "notes.txt/a.html" not in page  # which is not there


def test_what_a_killed_command_was_writing_of_the_page_is_cleared_away(photos, tmp_path):
    (tmp_path / "out").mkdir()
    for name in (".a.html.0123abcd.part", ".b.html.0123abcd.part"):
        (tmp_path / "out" / name).touch()
    assert paint(photos, "--num_iter", "1", "--report", "a.html") == 0
    assert names(tmp_path / "out") == [".b.html.0123abcd.part", "a.html", "a.jpg", "b c.png"]


def test_a_page_has_no_photos_name(photos, capsys):
    save(photos / "c.html")
    assert paint(photos, "--report", "c.html") == 2
    assert "--report is 'c.html', and so is a photo" in capsys.readouterr().err
    assert not (photos.parent / "out").exists()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_page_is_a_file(photos, tmp_path, capsys, make):
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / "a.html")
    assert paint(photos, "--report", "a.html") == 2
    assert "--report is" in capsys.readouterr().err


def test_resume_reports_the_photo_that_was_changed(photos, tmp_path, capsys):
    assert paint(photos) == 0
    save(photos / "a.jpg", 5)
    assert paint(photos, "--resume") == 1
    out, err = capsys.readouterr()
    assert "failed: a.jpg: cannot resume " in err
    assert "2/2 b c.png: " in out.splitlines()[-1]


def test_a_second_run_moves_each_photos_pictures_aside_or_replaces_them(photos, tmp_path, capsys):
    for flags in ((), (), ("--overwrite",)):
        assert paint(photos, *flags) == 0
    for name in ("a.jpg", "b c.png"):
        assert names(tmp_path / "out" / name / "result_image_earlier_1") == [
            f"result_image_at_iteration_{n}.png" for n in (1, 2)
        ] + ["result_image_state.npz"]
        assert len(names(tmp_path / "out" / name)) == 4
    assert capsys.readouterr().out.count("replacing 3 files") == 2


def test_of_two_runs_at_once_the_second_is_told(photos, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with locks.lock_of(tmp_path / "out" / "photos"):
        assert paint(photos) == 2
    assert "another run is writing" in capsys.readouterr().err
    assert names(tmp_path / "out") == []
    (tmp_path / "out" / "a.jpg").mkdir()
    with locks.lock_of(tmp_path / "out" / "a.jpg" / "result_image"):
        assert paint(photos) == 1
    assert "failed: a.jpg: another run is writing" in capsys.readouterr().err
    assert (tmp_path / "out" / "b c.png" / LAST).exists()


def test_a_page_that_another_run_writes_is_left_alone(photos, tmp_path, capsys, monkeypatch):
    page = tmp_path / "out" / "a.html"
    page.parent.mkdir()
    with locks.lock_of(page):
        assert paint(photos, "--report", "a.html") == 2
    assert f"another run is writing '{page}'" in capsys.readouterr().err
    # One that came, and went, while the network was loaded.
    load = folder.load_weights
    monkeypatch.setattr(folder, "load_weights", lambda *given: [load(*given), page.write_text("a run's")][0])
    assert paint(photos, "--report", "a.html") == 2
    assert f"'{page}' is there, and no page of a folder's photos" in capsys.readouterr().err
    assert names(tmp_path / "out") == ["a.html"]


def test_a_page_goes_where_a_link_leads(photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.html").symlink_to("../shown.html")
    assert paint(photos, "--num_iter", "1", "--report", "a.html") == 0
    assert (tmp_path / "out" / "a.html").is_symlink()
    assert "a folder" in (tmp_path / "shown.html").read_text()


def test_a_signal_ends_the_batch_and_resume_goes_on_within_the_photo(photos, tmp_path):
    command = [photos, tmp_path / "style.png", tmp_path / "out", *SMALL, "--image_size", "40", "--num_iter"]
    process = forked.start(*command, "100000")
    wait_for(tmp_path / "out" / "a.jpg" / LAST, process)
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    stopped, summary = err.splitlines()
    assert stopped.startswith("deepstyle: 1/2 a.jpg: stopped")
    assert summary == "deepstyle: 0 of 2 photos are done; the same command with --resume does what is not"
    assert names(tmp_path / "out") == ["a.jpg"]
    done = len(names(tmp_path / "out" / "a.jpg")) - 1
    ended = forked.run(*command, done, "--resume")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert all(len(names(tmp_path / "out" / name)) == done + 1 for name in ("a.jpg", "b c.png"))


def test_a_signal_between_two_photos_ends_the_batch(photos, tmp_path, capsys, monkeypatch):
    run_one = folder.run
    monkeypatch.setattr(folder, "run", lambda *given: (run_one(*given), os.kill(os.getpid(), signal.SIGTERM))[0])
    assert paint(photos) == 143
    assert "1 of 2 photos are done" in capsys.readouterr().err
    assert names(tmp_path / "out") == ["a.jpg"]


def test_describe_prints_the_command_for_one_photo_alone(photos, tmp_path, capsys):
    assert paint(photos) == 0
    picture = tmp_path / "out" / "b c.png" / LAST
    painted = pixels(picture)
    capsys.readouterr()
    assert main(["--describe", str(picture)]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[2] == f"{photos}/b c.png"
    assert main([*command[2:], "--weights", "random", "--overwrite"]) == 0
    np.testing.assert_array_equal(pixels(picture), painted)


def test_a_log_and_an_animation_go_beside_each_photos_pictures(photos, tmp_path, capsys):
    assert paint(photos, "--log", "losses.csv", "--animation", "all.gif") == 0
    for name in ("a.jpg", "b c.png"):
        assert {"losses.csv", "all.gif"} < {*names(tmp_path / "out" / name)}
    for flag, path in (("--log", "logs/a.csv"), ("--animation", "/tmp/a.gif"), ("--tensorboard", "..")):
        assert paint(photos, flag, path, out="none") == 2
        assert f"{flag} is '{path}'; of many pictures each gets its own" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_names_of_any_kind_are_kept(photos, tmp_path, capsys):
    odd = ["-x.jpg", "a.JPG", "a.png", "n" * 251 + ".png", "red\x1b[31m\n.png", os.fsdecode(b"\xff.png"), "no suffix"]
    for name in odd:
        save(photos / name, 1)
    assert paint(photos, "--num_iter", "1") == 0
    assert names(tmp_path / "out") == names(photos)
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 2 + len(odd) + 2
    assert "\x1b" not in out


def test_a_disk_that_does_not_tell_two_names_apart_loses_nothing(photos, tmp_path, capsys):
    (tmp_path / "out" / "a.jpg").mkdir(parents=True)
    (tmp_path / "out" / "b c.png").symlink_to("a.jpg")
    assert paint(photos) == 1
    assert "failed: b c.png: its results would go where those of 'a.jpg' are" in capsys.readouterr().err
    assert len(names(tmp_path / "out" / "a.jpg")) == 3


def test_folders_in_it_are_passed_over_and_the_results_may_be_one(photos, capsys):
    (photos / "more").mkdir()
    save(photos / "more" / "c.png")
    assert paint(photos, out="photos/out") == 0
    assert paint(photos, "--resume", out="photos/out") == 0
    assert names(photos / "out") == ["a.jpg", "b c.png"]
    err = capsys.readouterr().err
    assert err == f"deepstyle: folders in '{photos}' are not looked into: more\n" * 2


@pytest.mark.parametrize(
    ("flags", "out", "said"),
    [
        ([], "photos", "is the folder of the pictures; the results need another one"),
        ([], "style.png", "style.png' is a file"),
        (["--style_masks", "none.png"], "out", "cannot read the picture 'none.png'"),
        (["--style_weight", "1", "2"], "out", "--style_weight has 2 weights for 1 styles"),
        (["--image_size", "20"], "out", "20 x 20 pixels, but needs at least 32"),
        (["--log", "a.txt"], "out", "it must be a file whose name ends in .csv"),
        (["--weights", "none.h5"], "out", "cannot read the weights 'none.h5'"),
    ],
)
def test_what_is_wrong_whatever_the_photo_is_one_line_and_creates_nothing(photos, capsys, flags, out, said):
    before = names(photos), names(photos.parent)
    assert paint(photos, *flags, out=out) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert (names(photos), names(photos.parent)) == before


def test_an_empty_folder_is_one_error(tmp_path, capsys):
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    (tmp_path / "photos" / ".hidden").touch()
    save(tmp_path / "style.png")
    assert paint(tmp_path / "photos") == 2
    assert "there is no picture in the folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8, 99])
def test_a_pictures_shape_is_known_from_its_beginning(tmp_path, orientation):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(smooth_picture(1, 40, 60)).save(tmp_path / "a.jpg", exif=exif)
    assert shape_of(str(tmp_path / "a.jpg")) == read_picture(str(tmp_path / "a.jpg"))[0].shape[:2]


def test_masks_count_for_each_photo(photos, tmp_path):
    mask = np.zeros((48, 64), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flags = ["--content_mask", str(tmp_path / "mask.png")]
    assert paint(photos) == paint(photos, *flags, out="masked") == 0
    for name in ("a.jpg", "b c.png"):
        plain, masked = (pixels(tmp_path / out / name / LAST).astype(int) for out in ("out", "masked"))
        assert np.abs(plain - masked).max() > 0


@pytest.mark.parametrize("flags", [[], ["--preserve_color"]])
def test_masks_of_an_absurd_size_do_not_fill_the_memory_before_it_is_refused(photos, tmp_path, capsys, flags):
    Image.fromarray(np.full((40, 50), 255, np.uint8)).save(tmp_path / "mask.png")
    kinds = ["--content_mask", "--style_masks", *(["--color_mask"] if flags else [])]
    masks = [part for kind in kinds for part in (kind, str(tmp_path / "mask.png"))]
    assert paint(photos, *masks, *flags, "--image_size", "90000000") == 1
    refused = [line for line in capsys.readouterr().err.splitlines() if "GB of memory or more" in line]
    assert refused
    assert all(re.search(r"90000000 x \d+ pixels need .*, enough for --image_size \d+", line) for line in refused)


def test_free_memory_is_asked_before_the_first_photo_takes_any(photos, monkeypatch):
    asked = []
    monkeypatch.setattr(folder, "free_memory", lambda cap: asked.append(cap) or (1e11, 0))
    monkeypatch.setattr("deepstyle_support.memory.free_memory", lambda cap: pytest.fail("asked again"))
    assert paint(photos) == 0
    assert len(asked) == 1


@pytest.mark.endurance
def test_fifty_photos_of_one_shape_need_no_more_memory_than_five(photos, monkeypatch):
    for number in range(48):
        save(photos / f"{number}.png", number)
    save(photos / "b c.png")
    run_one, memory = folder.run, []
    monkeypatch.setattr(
        folder, "run", lambda *given: (run_one(*given), memory.append(psutil.Process().memory_info().rss))[0]
    )
    assert paint(photos, "--num_iter", "1") == 0
    assert len(memory) == 50
    assert max(memory[-5:]) <= 1.05 * max(memory[:5])

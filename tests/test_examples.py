"""The programs in examples/, run as their texts say."""

import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import IMAGES
from PIL import Image

import deepstyle

sys.path.insert(0, str(IMAGES.parent / "examples"))
import many_pictures


@pytest.mark.xdist_group("ray")
def test_ray_paints_a_list_of_pictures_with_two_workers(full_network, picture_files, tmp_path):
    content, style = picture_files
    spaced = tmp_path / "a content\udce9.png"  # which is no UTF-8
    shutil.copy(content, spaced)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "6.png").write_text("done already")
    lines = [f"{content} {style}", f"'{spaced}' {content}", f"none.jpg {style}", "", "one.png", f"{content} {style}"]
    lines.append(f"none\udce9.jpg {style}")
    as_windows_writes = b"\xef\xbb\xbf" + os.fsencode("\r\n".join(lines))
    (tmp_path / "jobs.txt").write_bytes(as_windows_writes)
    script = IMAGES.parent / "examples" / "many_pictures.py"
    flags = ["--workers", "2", "--image_size", "32", "--num_iter", "1", "--weights", "random"]
    command = [sys.executable, str(script), "jobs.txt", "results", *flags]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    assert f"failed: none.jpg {style}: cannot read the picture" in ended.stderr
    assert f"failed: none?.jpg {style}: cannot read the picture" in ended.stderr
    assert ended.stderr.count("\n") == 3
    assert "line 5, 'one.png': it must be CONTENT STYLE" in ended.stderr
    assert (tmp_path / "results" / "6.png").read_text() == "done already"
    assert sorted(ended.stdout.split()) == [str(tmp_path / "results" / f"{n}.png") for n in (1, 2)]
    for number, pair in ((1, picture_files), (2, [content, content])):
        pictures = (deepstyle.read_picture(path)[0] for path in pair)
        (expected,) = deepstyle.stylize(*pictures, image_size=32, num_iter=1, weights="random")
        got = np.asarray(Image.open(tmp_path / "results" / f"{number}.png")).astype(int)
        assert np.abs(got - expected.picture).max() <= 2  # with fewer threads, sums are rounded in another order


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["jobs.txt", "results", "--workers", "0"], "--workers must be 1 or more"),
        (["jobs.txt", "results", "--workers", "x"], "invalid int value"),
        (["jobs.txt", "results", "--image_size", "0"], "--image_size is 0"),
        (["jobs.txt", "results", "--weights", ""], "--weights is ''"),
        (["none.txt", "results"], "there is no file 'none.txt'"),
        (["", "results"], "cannot read the list '.'"),
        ([".", "results"], "cannot read the list '.': Is a directory"),
        (["loop.txt", "results"], "cannot read the list 'loop.txt': Too many levels"),
        (["jobs.txt", "jobs.txt"], "'jobs.txt' is no folder"),
        (["jobs.txt", "jobs.txt/results"], "cannot make the folder 'jobs.txt/results'"),
    ],
)
def test_what_is_wrong_with_a_list_of_pictures_is_said_before_anything_is_made(
    tmp_path, monkeypatch, capsys, arguments, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs.txt").touch()
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    with pytest.raises(SystemExit, match="2"):
        many_pictures.main(arguments)
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jobs.txt", "loop.txt"]


def test_a_cluster_that_is_not_there_is_one_line_for_a_list_as_well(picture_files, tmp_path):
    (tmp_path / "jobs.txt").write_text(" ".join(picture_files))
    script = IMAGES.parent / "examples" / "many_pictures.py"
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # so that nobody else can
        environment = os.environ | {"RAY_ADDRESS": f"127.0.0.1:{nobody.getsockname()[1]}"}
        command = [sys.executable, str(script), "jobs.txt", "results"]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 1
    assert ended.stderr.startswith("deepstyle: error: Ray cannot start: nobody answers at 127.0.0.1:")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "content", [b"", b"\xef\xbb\xbf\r\n", "a.png\n".encode("utf-16"), b"'\n\xff\x0c\n", b"a\0 b c\n"]
)
def test_lines_that_are_no_jobs_are_told_one_by_one(tmp_path, capsys, content):
    (tmp_path / "jobs.txt").write_bytes(content)
    status = many_pictures.main([str(tmp_path / "jobs.txt"), str(tmp_path / "results")])
    told = capsys.readouterr().err.splitlines()
    assert status == bool(told)
    assert len(told) == sum(bool(line.strip()) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
    assert all("it must be CONTENT STYLE" in line for line in told)

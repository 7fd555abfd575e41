"""The programs in examples/, run as their texts say."""

import shutil
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
    spaced = tmp_path / "a content.png"
    shutil.copy(content, spaced)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "6.png").write_text("done already")
    lines = [f"{content} {style}", f"'{spaced}' {content}", f"none.jpg {style}", "", "one.png", f"{content} {style}"]
    (tmp_path / "jobs.txt").write_text("\n".join(lines))
    script = IMAGES.parent / "examples" / "many_pictures.py"
    flags = ["--workers", "2", "--image_size", "32", "--num_iter", "1", "--weights", "random"]
    command = [sys.executable, str(script), "jobs.txt", "results", *flags]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    assert f"failed: none.jpg {style}: cannot read the picture" in ended.stderr
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
        (["none.txt", "results"], "there is no file 'none.txt'"),
        (["jobs.txt", "jobs.txt"], "'jobs.txt' is no folder"),
    ],
)
def test_what_is_wrong_with_a_list_of_pictures_is_said_before_anything_is_made(
    tmp_path, monkeypatch, capsys, arguments, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs.txt").touch()
    with pytest.raises(SystemExit, match="2"):
        many_pictures.main(arguments)
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["jobs.txt"]

"""What is written beside the code agrees with it."""

import re
import subprocess
import sys

import pytest
from conftest import IMAGES
from PIL import Image

import deepstyle

ROOT = IMAGES.parent
README = (ROOT / "README.md").read_text()


def test_the_readmes_table_has_every_flag_with_its_default():
    table = dict(re.findall(r"^\| `--(\w+)` \| (\S*) ?\| .*\|$", README, re.MULTILINE))
    defaults = vars(deepstyle.command_line().parse_args(["CONTENT", "STYLE", "PREFIX"]))
    flags = {name: value for name, value in defaults.items() if name not in ("content", "style", "prefix")}
    assert flags.keys() == table.keys()
    for name, value in flags.items():
        assert table[name] == ("" if value is None or name not in vars(deepstyle.Settings()) else str(value))


def test_the_readmes_pictures_exist():
    shown = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert len(shown) >= 6
    for path in shown:
        Image.open(ROOT / path).verify()


def test_every_shipped_picture_has_its_source():
    table = (IMAGES / "SOURCES.md").read_text()
    for path in IMAGES.glob("*.jpg"):
        assert f"| {path.name} |" in table


@pytest.mark.parametrize("check", [["check"], ["format", "--check"]])
def test_style(check):
    ended = subprocess.run([sys.executable, "-m", "ruff", *check, "."], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout

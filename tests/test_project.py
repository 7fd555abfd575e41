"""What is written beside the code agrees with it."""

import ast
import itertools
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import IMAGES
from PIL import Image

import deepstyle
from deepstyle_app.command import command_line, job_of
from deepstyle_support.messages import as_typed

ROOT = IMAGES.parent
DOCS = ROOT / "docs"
LOOKS = (DOCS / "looks.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}
CODE = re.compile(r"```.*?```|^    .*?$|`[^`]*`", re.MULTILINE | re.DOTALL)
ROW_OF_A_FLAG = re.compile(r"^\| `--(\w+)` \| (.*?) ?\| .*\|$", re.MULTILINE)
# What stands for a reader's own pictures and folders.
PLACEHOLDERS = {"CONTENT", "STYLE", "photo.jpg", "painting.png", "woodcut.jpg", "holiday", "paintings", "my_photos"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def default_of_each_flag():
    """{flag: its default as a page has it}"""
    defaults = vars(command_line().parse_args(["CONTENT", "STYLE", "PREFIX"]))
    known = vars(deepstyle.Settings())
    flags = defaults.keys() - {"content", "style", "prefix"}
    return {name: as_typed(known[name]) if known.get(name) is not None else "" for name in flags}


def links_of(page):
    """(path, anchor) of what this page shows and leads to, but for other sites."""
    targets = re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", PAGES[page]))
    parts = [target.partition("#") for target in targets if not target.startswith("https://")]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in parts]


def anchors_of(page):
    """What GitHub makes of this page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def commands_of(page):
    """The arguments of each command of ours in this page's code, without what is optional there."""
    code = CODE.findall(PAGES[page])
    ours = re.compile(r"(?:^|(?<=do )|(?<=; ))(sh run\.sh|python deepstyle\.py|deepstyle) ([^;<\n]*)", re.MULTILINE)
    for program, arguments in ours.findall("\n".join(part.strip("` ") for part in code)):
        arguments = re.sub(r"\$\(.*?\)", "CONTENT STYLE PREFIX", arguments)  # what the shell reads from a file
        words = shlex.split(re.sub(r"\[.*?\]", "", arguments), comments=True)
        if program == "sh run.sh" and words != ["--setup"]:
            positional = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
            words[2:2] = ["result_image/"] if len(positional) == 2 else []
        if words != ["--setup"]:
            yield words


def test_the_table_of_flags_has_every_flag_with_its_default():
    assert dict(ROW_OF_A_FLAG.findall(PAGES[DOCS / "flags.md"])) == default_of_each_flag()


def test_the_readme_is_short_and_its_flags_have_their_defaults():
    readme = PAGES[ROOT / "README.md"]
    assert len(readme.splitlines()) <= 150
    most_used = dict(ROW_OF_A_FLAG.findall(readme))
    assert len(most_used) >= 12
    assert most_used.items() <= default_of_each_flag().items()


@each_page
def test_a_page_leads_to_what_exists_and_shows_whole_pictures(page):
    for path, anchor in links_of(page):
        assert path.exists(), path
        assert not anchor or anchor in anchors_of(path), anchor
        if path.suffix in (".jpg", ".png", ".gif"):
            Image.open(path).verify()


def test_every_page_and_picture_is_found_from_the_readme():
    found, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page not in found:
            found.add(page)
            ahead += [path for path, _ in links_of(page)] if page in PAGES else []
    assert {path for path in DOCS.rglob("*.*") if path.is_file()} <= found


@each_page
def test_the_parser_takes_every_command_of_a_page(page, monkeypatch):
    monkeypatch.setattr("deepstyle_app.command.Describe", "store")  # it would look for the picture
    for words in commands_of(page):
        if words == ["--info"]:  # which ends the program
            continue
        if words[0].startswith("-"):  # such a command has no pictures
            words = ["CONTENT", "STYLE", "PREFIX", *words]
        job = job_of(words)
        for name in (job.content, *job.style):
            assert "$" in name or name in PLACEHOLDERS or (ROOT / "images" / name).is_file(), name


def test_commands_are_found_in_the_pages():
    found = [shlex.join(words) for page in PAGES for words in commands_of(page)]
    assert "rocket.jpg composition_viii.jpg rocket_composition" in found
    assert "--describe my_folder/result_image_at_iteration_7.png" in found
    assert "CONTENT STYLE PREFIX --quiet --max_memory 8 --resume" in found  # what a job of Slurm runs
    assert len(found) >= 45


def test_the_commands_beside_the_pictures_are_right():
    commands = re.findall(r"^    sh run.sh (.*)$", LOOKS, re.MULTILINE)
    assert len(commands) >= 17
    for command in commands:
        job = job_of(shlex.split(command))
        given = [job.content, *job.style]
        masks = [*job.style_masks, job.content_mask, job.color_mask]
        paths = [ROOT / "images" / name for name in given] + [ROOT / name for name in masks if name]
        assert all(path.exists() for path in paths)
        assert job.settings.image_size == 200
        assert f"](looks/{Path(job.prefix).name}." in LOOKS


def test_requirements_name_every_package_that_the_program_imports():
    # The tests' own requirements bring more, so that a missing line would show on a newcomer's machine only.
    imported = set()
    for path in (ROOT / "deepstyle.py", *ROOT.glob("deepstyle_*/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            imported |= {name.split(".")[0] for name in names}
    own, known = {"deepstyle", "deepstyle_app", "deepstyle_support"}, {"PIL": "pillow"}
    optional = {"jax", "pillow_heif", "ray", "tensorboard", "torch"}
    needed = {known.get(name, name) for name in imported - sys.stdlib_module_names - own} - optional
    named = {re.split("[^a-z0-9]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert needed == named - {"keras"}  # which is imported by its name


# Tests that use each package of requirements.txt, and need but a minute or two together.
WITH_LOWEST = (
    "test_losses.py",
    "test_pictures.py",
    "test_reading.py",
    "test_report.py::test_the_page_has_the_inputs_the_iterations_and_the_losses",
    "test_transparency.py",
    "test_weights.py",
)


@pytest.mark.endurance
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="TensorFlow's lowest version is older than this Python")
def test_the_lowest_versions_that_requirements_allow_are_enough():
    requirements = (ROOT / "requirements.txt").read_text()
    lowest = re.sub(">=([^,]+),.*", r"==\1", requirements)
    assert lowest.count("==") == len(requirements.splitlines())
    files = ROOT / "tests" / "requirements.txt", ROOT / "extras" / "heic.txt", ROOT / "extras" / "mp4.txt"
    of_tests = [line for file in files for line in file.read_text().splitlines()]
    of_tests = [line for line in of_tests if re.match("pytest>|hypothesis|imageio-ffmpeg|pillow-heif", line)]
    with tempfile.TemporaryDirectory() as folder:  # 2 GB, which pytest would keep
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, lowest.split()[-1]]
        if subprocess.run(pip, capture_output=True).returncode:
            pytest.skip("there is no package index")
        Path(folder, "lowest.txt").write_text(lowest)
        subprocess.run([sys.executable, "-m", "venv", f"{folder}/venv"], check=True)
        python = [f"{folder}/venv/bin/python", "-m"]
        subprocess.run([*python, "pip", "install", "--quiet", "-r", f"{folder}/lowest.txt", *of_tests], check=True)
        command = [*python, "pytest", "-q", "-p", "no:cacheprovider", "-m", "not endurance"]
        tests = [f"tests/{name}" for name in WITH_LOWEST]
        ended = subprocess.run([*command, *tests], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


def test_every_shipped_picture_has_its_source():
    table = (IMAGES / "SOURCES.md").read_text()
    for path in (*IMAGES.glob("*.jpg"), *IMAGES.glob("*.png")):
        assert re.search(rf"\| ([^|]+, )?{path.name}(, [^|]+)? \|", table)

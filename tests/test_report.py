"""The report: one file that shows a run, in any browser, without a server."""

import base64
import contextlib
import dataclasses
import html
import io
import json
import os
import re
import shutil
import time
import urllib.parse

import forked
import numpy as np
import pytest
from conftest import SMALL, run_quietly, wait_for
from PIL import Image

import deepstyle
from deepstyle import Losses, State
from deepstyle_app import files, report, run
from deepstyle_app.command import job_of
from deepstyle_app.recipe import Recipe, read_text
from deepstyle_app.report import MAX_PICTURES, News, Shown, encoded, plot, points_before, read_report, thinned
from deepstyle_support.engine import Engine
from deepstyle_support.memory import Plan, plan_memory


def decoded(picture):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))).astype(float)


def as_shown(path):
    """A saved picture as WebP gives it back: its noise is more than what an iteration changes."""
    file = io.BytesIO()
    Image.open(path).save(file, format="WebP", quality=90, method=2)
    return decoded(base64.b64encode(file.getvalue()))


def assert_shows_what_was_saved(shown, prefix):
    """Each shown picture is that of its iteration."""
    for one in shown[1:]:
        np.testing.assert_array_equal(decoded(one.picture), as_shown(f"{prefix}_at_iteration_{one.number}.png"))


def test_the_page_has_the_inputs_the_iterations_and_the_losses(picture_files, tmp_path):
    path = tmp_path / "new" / "a.html"
    mask = tmp_path / "mask.png"
    Image.fromarray(np.repeat(np.uint8([[0, 255]]), 20, axis=0)).save(mask)
    assert run_quietly(picture_files, tmp_path / "a", "--report", path, "--content_mask", mask) == 0
    shown, points = read_report(path)
    assert [one.number for one in shown] == [0, 1, 2]
    assert_shows_what_was_saved(shown, tmp_path / "a")
    page = path.read_text()
    for name in ("content", "style", "content mask"):
        assert f'alt="the {name} picture' in page
    with np.load(tmp_path / "a_state.npz") as state:
        assert points[(32, 42), 1] == state["losses"][0].tolist()
        assert [one.losses for one in shown[1:]] == state["losses"][1:].tolist()
    counts = [count for _, count in points]
    assert counts == list(range(1, shown[-1].evaluations + 1))
    for total, *parts in points.values():
        assert total == pytest.approx(sum(parts))
    recipe = Recipe.from_text(read_text(str(tmp_path / "a_at_iteration_2.png")))
    said = html.unescape(re.sub("<[^>]*>", "", re.search(r"<pre.*?</pre>", page, re.DOTALL)[0]))
    assert said == recipe.command(dataclasses.asdict(deepstyle.Settings()))
    for name in vars(deepstyle.Settings()):
        assert f"<dt>{name}</dt>" in page


def test_what_was_tried_behind_the_state_that_is_gone_on_from_is_not_in_the_plot():
    coarse, full, losses = (32, 40), (64, 80), [4.0, 1.0, 2.0, 1.0]
    state = State(np.zeros((*full, 3)), (Losses(*losses),) * 2, evaluations=25, partial=True)
    tried = {(size, count): losses for size in (coarse, full) for count in range(1, 29)}
    kept = points_before(tried, {(coarse, 28): losses, (full, 20): losses}, state)
    assert list(kept) == [(coarse, count) for count in range(1, 29)] + [(full, count) for count in range(1, 26)]


def test_a_picture_that_every_leaves_out_is_in_the_report(picture_files, tmp_path):
    assert (
        run_quietly(picture_files, tmp_path / "a", "--num_iter", 3, "--every", 3, "--report", tmp_path / "a.html") == 0
    )
    assert not (tmp_path / "a_at_iteration_1.png").exists()
    assert [one.number for one in read_report(tmp_path / "a.html")[0]] == [0, 1, 2, 3]


def test_only_the_new_picture_is_encoded(picture_files, tmp_path, monkeypatch):
    made, encode = [], report.encoded
    monkeypatch.setattr(report, "encoded", lambda *given: made.append(given) or encode(*given))
    assert run_quietly(picture_files, tmp_path / "a", "--num_iter", 3, "--report", tmp_path / "a.html") == 0
    assert len(made) == 3 + 3  # content, style and start, and each iteration once


def test_the_page_is_whole_after_each_iteration(picture_files, tmp_path, monkeypatch):
    path, pages, add = tmp_path / "a.html", [], report.Report.add

    def look(self, iteration, exact):
        add(self, iteration, exact)
        pages.append(path.read_text())

    monkeypatch.setattr(report.Report, "add", look)
    assert run_quietly(picture_files, tmp_path / "a", "--report", path) == 0
    assert [page.count('class="iteration"') for page in pages] == [2, 3]
    assert all(page.startswith("<!doctype html>") and page.endswith("</html>") for page in pages)
    assert "Reload this page" in pages[0]
    assert "less than a minute left" in pages[0]
    assert "Reload this page" not in pages[1]


def test_what_is_left_is_judged_by_the_latest_iterations_and_the_pixels_to_come():
    small, large = (10, 20), (20, 40)
    shown = [Shown(small, number, 20 * number, [], 0.0, 60.0 + number, False, "") for number in range(1, 4)]
    totals = {small: 4, large: 2}
    assert report.news_of(shown, totals) == News(left=62 * (1 + 4 + 4), due=63)
    assert report.news_of(shown, totals).left_in_words == "about 9 minutes left"
    assert report.news_of(shown, {small: 3, large: 20}) == News(left=62 * 80, due=63 * 4)
    assert report.news_of(shown, {small: 103}).left_in_words == "about 2 hours left"
    stopped = Shown(small, 4, 65, [], 0.0, 1.0, True, "")
    assert report.news_of([*shown, stopped], totals) == report.news_of(shown, totals)
    started = [Shown(small, 0, 0, [], 0.0, 0.0, False, "")]
    assert report.news_of(started, totals).left_in_words == ""


@pytest.fixture
def goes_on(monkeypatch):
    """What each page that was written says: whether the run goes on."""
    pages, write = [], report.write_page

    def look(path, *given, **data):
        write(path, *given, **data)
        pages.append(report.says_it_goes_on(path))

    monkeypatch.setattr(report, "write_page", look)
    return pages


def test_a_run_that_ends_early_and_goes_on_later_says_so_on_its_page(picture_files, tmp_path, goes_on):
    flags = ["--report", tmp_path / "a.html", "--num_iter", 4]
    assert run_quietly(picture_files, tmp_path / "a", *flags, "--min_improvement", 99.9) == 0
    assert goes_on == [True, True, False]
    assert "Iteration 2 of 4" in (tmp_path / "a.html").read_text()
    assert "The run has ended here." in (tmp_path / "a.html").read_text()
    assert run_quietly(picture_files, tmp_path / "a", *flags, "--resume") == 0
    assert goes_on[3:] == [True, True, False]
    assert "The run has ended here." not in (tmp_path / "a.html").read_text()


def test_a_run_that_fails_says_on_its_page_that_it_has_ended(picture_files, tmp_path, goes_on, monkeypatch):
    saved, save = [], files.Outputs._write_picture

    def full_disk(self, painted):
        saved.append(painted)
        if len(saved) > 1:
            raise deepstyle.UserError("full", status=1)
        return save(self, painted)

    monkeypatch.setattr(files.Outputs, "_write_picture", full_disk)
    assert run_quietly(picture_files, tmp_path / "a", "--report", tmp_path / "a.html", "--num_iter", 4) == 1
    assert len(saved) == 3  # once more at the end, in vain
    assert goes_on == [True, False]


def test_a_run_that_was_killed_before_its_page_said_that_it_ended_makes_up_for_it(
    picture_files, tmp_path, goes_on, monkeypatch
):
    flags = ["--report", tmp_path / "a.html", "--num_iter", 3, "--min_improvement", 99.9]
    with monkeypatch.context() as patch:
        patch.setattr(report.Report, "end", lambda self: None)
        assert run_quietly(picture_files, tmp_path / "a", *flags) == 0
    for _ in range(2):
        assert run_quietly(picture_files, tmp_path / "a", *flags, "--resume") == 0
    assert goes_on == [True, True, True, False]  # and then nothing is written


def test_a_page_that_cannot_be_made_leaves_the_one_before(tmp_path):
    path = tmp_path / "a.html"
    path.write_text("before")
    with pytest.raises(report.jinja2.UndefinedError):
        report.write_page(path, "report.html")  # without what it is to show
    assert path.read_text() == "before"


@pytest.mark.parametrize("there", ["report", "damaged", "none", "behind"])
def test_a_resumed_run_goes_on_with_its_report(full_network, picture_files, tmp_path, there):
    path = tmp_path / "a.html"
    flags = ["--report", path, "--every", 1 if there == "damaged" else 5]
    assert run_quietly(picture_files, tmp_path / "a", "--num_iter", 1, *flags) == 0
    behind = path.read_bytes()
    assert run_quietly(picture_files, tmp_path / "a", "--num_iter", 2, "--resume", *flags) == 0
    before = read_report(path)
    if there == "damaged":
        path.write_bytes(path.read_bytes()[:-2000])
    elif there == "none":
        path.unlink()
    elif there == "behind":
        path.write_bytes(behind)
    assert run_quietly(picture_files, tmp_path / "a", "--num_iter", 3, "--resume", *flags) == 0
    shown, points = read_report(path)
    # Each run saves its last picture, so these are on disk.
    assert [one.number for one in shown] == [0, 1, 2, 3]
    assert_shows_what_was_saved(shown, tmp_path / "a")
    with np.load(tmp_path / "a_state.npz") as state:
        assert [one.losses for one in shown[1:]] == state["losses"][1:].tolist()
        kept = [points[key] for key in points if key[1] in (1, 20, 40)]
        assert kept[0] == state["losses"][0].tolist()
    if there == "report":
        assert shown[:3] == before[0]
        # The evaluation that a run begins again with is that which the one before it ended with.
        for key, losses in before[1].items():
            assert points[key] == pytest.approx(losses, rel=1e-4)
    counts = [count for _, count in points]
    assert counts == sorted(counts)
    assert "comes close to it, not bit for bit" in path.read_text()


def test_coarse_sizes_are_on_the_page_and_stay_when_it_goes_on(picture_files, tmp_path):
    path = tmp_path / "a.html"
    flags = ["--image_size", 64, "--scales", 2, "--coarse_iter", 2, "--report", path]
    assert run_quietly(picture_files, tmp_path / "a", *flags, "--num_iter", 1) == 0
    assert run_quietly(picture_files, tmp_path / "a", *flags, "--num_iter", 2, "--resume") == 0
    shown, points = read_report(path)
    coarse, full = (32, 42), (64, 85)
    assert [(one.size, one.number) for one in shown[1:]] == [(coarse, 1), (coarse, 2), (full, 1), (full, 2)]
    assert decoded(shown[1].picture).shape[:2] == coarse
    assert [size for size, _ in points] == sorted(size for size, _ in points)
    assert {size for size, _ in points} == {coarse, full}
    page = path.read_text("utf-8")
    assert "at 32 \N{MULTIPLICATION SIGN} 42 pixels, iteration 1 of 2" in page
    assert "Iteration 2 of 2, 64 \N{MULTIPLICATION SIGN} 85 pixels (size 2 of 2), loss" in page


def test_the_plot_has_each_loss_at_its_place():
    size, large = (10, 20), (20, 40)
    points = {(size, 1): [1000.0, 0.0, 990.0, 10.0], (size, 20): [100.0, 1.0, 89.0, 10.0]}
    points[large, 1] = [50.0, 1.0, 39.0, 10.0]
    points[large, 20] = [10.0, 1.0, 8.0, 1.0]
    drawn = plot(points)
    # Decades from 10^0 to 10^4, so each takes 25 percent; 40 evaluations in all.
    assert [power for power, _ in drawn["decades"]] == [0, 1, 2, 3, 4]
    assert drawn["curves"]["total"] == ["2.5,25.0 50.0,50.0", f"52.5,{100 - 25 * np.log10(50):.2f} 100.0,75.0"]
    assert drawn["curves"]["content"] == ["50.0,100.0", "52.5,100.0 100.0,100.0"]  # 0 has no logarithm
    assert drawn["sizes"] == [(size, 0), (large, 50)]
    assert drawn["evaluations"][-1] == (40, 100)
    nothing = plot({(size, 1): [0.0, 0.0, 0.0, 0.0]})
    assert nothing["curves"] == {}


def test_very_many_iterations_are_thinned_evenly_and_the_last_is_there():
    kept: list = []
    for number in range(1000):
        kept = thinned([*kept, number], MAX_PICTURES, [*kept, number])
        assert len(kept) <= MAX_PICTURES + 2
    assert kept == [*range(0, 1000, 32), 999]


def test_ten_iterations_at_400_rows_are_below_5_mb(tmp_path):
    # Harder to compress than painted pictures: of 400 rows these took 1.6 and 1.9 bits a pixel, this takes 4.3.
    noise = np.random.default_rng(0).normal(128, 40, (12, 400, 600, 3))
    smoothed = [(one + np.roll(one, 1, 0) + np.roll(one, 1, 1)) / 3 for one in noise]
    hard = [np.clip(one, 0, 255).astype(np.uint8) for one in smoothed]
    recipe = Recipe.of(job_of(["c.png", "s.png", "out"]), Engine(Plan(None, 9), {}))
    facts = report.facts_of(recipe, {"content": hard[11], "style": hard[10]}, 600)
    losses = [123456.789123, 1234.56789123, 120000.123456, 2000.123456]
    shown = [Shown((400, 600), n, 20 * n, losses, 1.0, 1.0, False, encoded(hard[n], report.SIDE)) for n in range(10)]
    points = {((400, 600), count): losses for count in range(1, 201)}
    page = report.Report(tmp_path / "a.html", facts, {(400, 600): 10}, shown, points)
    state = State(hard[10], (Losses(*losses),) * 11, 200)
    page.add(deepstyle.Iteration(10, hard[10], hard[10], Losses(*losses), {}, 1.0, 1.0, False, state), exact=True)
    assert len(read_report(page.path)[0]) == 11
    assert page.path.stat().st_size < 5e6
    assert page.path.stat().st_size <= report.report_bytes((400, 600), 11)


BAD = "<script>alert(1)</script>"
BAD_NAME = "<img src=x onerror=alert(1)>\"'&.png"


def test_names_and_flags_are_escaped(picture_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(picture_files[1], BAD_NAME)
    assert (
        run_quietly([picture_files[0], BAD_NAME], BAD.replace("/", "") + "é", "--report", "a.html", "--num_iter", 1)
        == 0
    )
    page = (tmp_path / "a.html").read_text("utf-8")
    assert "<script>" not in page
    assert "<img src=x" not in page
    assert html.escape("<script>alert(1)<script>") in page


@pytest.mark.endurance  # two processes that are started cold
def test_an_ascii_locale_and_a_name_that_is_no_text_make_a_page(picture_files, tmp_path):
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    name = os.fsencode(str(tmp_path)) + b"/\xff\xc3\xa9.png"
    shutil.copy(picture_files[0], name)
    for more in (["--num_iter", "1"], ["--num_iter", "2", "--resume"]):
        command = [os.fsdecode(name), picture_files[1], "é", "--report", "é.html", *SMALL, *more]
        run = forked.cold_start(*command, cwd=tmp_path, env=environment)
        assert run.communicate(timeout=120)[1] == ""
        assert run.returncode == 0
    page = (tmp_path / "é.html").read_bytes()
    assert b"/\xff\xc3\xa9.png" in page
    assert len(read_report(tmp_path / "é.html")[0]) == 3


def test_an_earlier_runs_report_is_moved_aside_or_replaced_and_another_runs_is_refused(picture_files, tmp_path, capsys):
    flags = ["--report", tmp_path / "a.html", "--num_iter", 1]
    for _ in range(2):
        assert run_quietly(picture_files, tmp_path / "a", *flags) == 0
    assert (tmp_path / "a_earlier_1" / "a.html").exists()
    assert run_quietly(picture_files, tmp_path / "a", *flags, "--overwrite") == 0
    assert not (tmp_path / "a_earlier_2").exists()
    before = (tmp_path / "a.html").read_bytes()
    assert run_quietly(picture_files, tmp_path / "b", *flags) == 2
    assert "is there, and not of a run with this PREFIX" in capsys.readouterr().err
    assert (tmp_path / "a.html").read_bytes() == before


@pytest.mark.parametrize("name", ["a.pdf", "a", ".html", "folder.html"])
def test_a_report_has_to_be_a_file_whose_name_ends_in_html(picture_files, tmp_path, capsys, name):
    (tmp_path / "folder.html").mkdir()
    assert run_quietly(picture_files, tmp_path / "a", "--report", tmp_path / name) == 2
    assert "--report is" in capsys.readouterr().err
    assert not list(tmp_path.glob("a_*"))


def test_an_input_is_not_written_over(picture_files, tmp_path, capsys):
    picture = tmp_path / "photo.html"  # Pillow looks at what a file holds
    shutil.copy(picture_files[0], picture)
    assert run_quietly([str(picture), picture_files[1]], tmp_path / "a", "--report", picture) == 2
    assert "is an input, and would be written over" in capsys.readouterr().err


def test_the_plan_counts_the_report(picture_files, tmp_path, monkeypatch):
    held = []

    def look(size, settings, bytes_held, **more):
        held.append(bytes_held)
        return plan_memory(size, settings, bytes_held, **more)

    monkeypatch.setattr(run, "plan_memory", look)
    for flags in ([], ["--report", tmp_path / "a.html"]):
        assert run_quietly(picture_files, tmp_path / "a", "--num_iter", 1, *flags) == 0
    assert held[1].kept - held[0].kept == 2 * 2 * 2 * 32 * 42


# ------------------------------------------------------------------------------------- in a browser

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
QUIET = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
QUIET += " disable-component-update disable-sync"


@pytest.fixture
def browser(tmp_path, monkeypatch):
    """A headless Chromium that notes what pages ask for and what they say in the console."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("there is no chromium with its chromedriver")
    from selenium import webdriver

    monkeypatch.setenv("SE_OFFLINE", "true")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*QUIET.split(), f"user-data-dir={tmp_path / 'browser'}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    try:
        driver.get("about:blank")
        driver.get_log("performance")  # of the page that a new tab shows
        yield driver
    finally:
        driver.quit()


def look(browser, path, width, mode="light"):
    """Open the page as wide and as dark as given."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": mode}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(path.as_uri())


def asked_for(browser):
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


VISIBLE = "return [...document.querySelectorAll('.iteration')].map(one => one.checkVisibility())"
CONTRASTS = """
const light = colour => {
  const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const behind = one => {
  for (; one; one = one.parentElement) {
    const colour = getComputedStyle(one).backgroundColor;
    if (!/, 0\\)$/.test(colour)) return colour;
  }
};
const ratio = (one, other) => (Math.max(light(one), light(other)) + .05) / (Math.min(light(one), light(other)) + .05);
return [...document.querySelectorAll("h1, h2, p, dt, dd, pre, figcaption, li, text, th, td, footer, summary, .curve")]
  .map(one => ratio(getComputedStyle(one)[one.matches("text") ? "fill" : one.matches(".curve") ? "stroke" : "color"],
    behind(one)) / (one.matches(".curve") ? 3 : 4.5));
"""  # WCAG 2.2, 1.4.3 and 1.4.11: 4.5 for text, 3 for graphics; 1 here is just enough


def test_in_a_browser(picture_files, tmp_path, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    path = tmp_path / f"{BAD.replace('/', '')}.html"
    bad = str(tmp_path / BAD_NAME)
    shutil.copy(picture_files[1], bad)
    flags = ["--report", path, "--image_size", 64, "--scales", 2, "--coarse_iter", 1]
    assert run_quietly([picture_files[0], bad], tmp_path / "a", *flags, "--num_iter", 1) == 0
    look(browser, path, 1200)
    # The start, a coarse iteration and one more; the last one is shown.
    assert browser.execute_script(VISIBLE) == [False, False, True]
    assert browser.execute_script("return [...document.images].every(one => one.complete && one.naturalWidth > 0)")
    assert browser.execute_script("return [...document.images].every(one => one.alt)")
    assert browser.execute_script("return document.fonts.size") == 0
    slider = browser.find_element(By.ID, "slider")
    assert slider.accessible_name == "Picture"
    marker = browser.find_element(By.ID, "marker")
    for keys, shown in (("", 2), (Keys.ARROW_LEFT, 1), (Keys.HOME, 0), (Keys.ARROW_RIGHT, 1), (Keys.END, 2)):
        slider.send_keys(keys)
        assert browser.execute_script(VISIBLE) == [number == shown for number in range(3)]
        assert float(marker.get_attribute("x1").rstrip("%")) == pytest.approx((0, 50, 100)[shown], abs=3)
    browser.execute_script("document.activeElement.blur()")
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ARROW_LEFT)
    assert browser.execute_script(VISIBLE) == [False, True, False]
    assert browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", slider) == "none"
    slider.send_keys(Keys.HOME)
    assert browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", slider) == "solid"
    # What has come since is there after a reload, and it is what is shown.
    assert run_quietly([picture_files[0], bad], tmp_path / "a", *flags, "--num_iter", 2, "--resume") == 0
    browser.refresh()
    assert browser.execute_script(VISIBLE) == [False, False, False, True]
    for width in (1200, 390):
        for mode in ("light", "dark"):
            look(browser, path, width, mode)
            browser.execute_script("document.querySelector('details').open = true")
            assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
            assert min(browser.execute_script(CONTRASTS)) >= 1
            paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) == (mode == "dark")
    assert {url for url in asked_for(browser) if not url.startswith("data:")} == {path.as_uri()}
    assert browser.get_log("browser") == []


def test_a_page_may_run_nothing_that_is_not_its_own(picture_files, tmp_path, browser):
    path = tmp_path / "a.html"
    assert run_quietly(picture_files, tmp_path / "a", "--report", path, "--num_iter", 1) == 0
    meddled = tmp_path / "meddled.html"
    added = "<script>document.title = 'run'</script><img src='http://localhost:9/a.png'></main>"
    meddled.write_text(path.read_text().replace("</main>", added))
    look(browser, meddled, 1200)
    assert browser.title == "content in the style of style"
    said = [entry["message"] for entry in browser.get_log("browser")]
    assert len(said) == 2
    assert all("Content Security Policy" in message for message in said)


# ------------------------------------------------------------------------------------ of a folder


@pytest.fixture
def photos(picture_files, tmp_path):
    """A folder with two photos, one of an odd name, and a file that is none."""
    (tmp_path / "photos").mkdir()
    shutil.copy(picture_files[0], tmp_path / "photos" / "a.png")
    shutil.copy(picture_files[0], tmp_path / "photos" / BAD_NAME)
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    return [str(tmp_path / "photos"), picture_files[1]]


def cards(page):
    return page.count("<figure>"), page.count("data:image/webp")


def test_a_folders_report_is_a_page_of_all_its_pictures(photos, tmp_path, monkeypatch):
    path, pages, write = tmp_path / "out" / "all.html", [], report.write_page

    def look(written, *given, **data):
        write(written, *given, **data)
        pages.append(written.read_text()) if written == path else None

    monkeypatch.setattr(report, "write_page", look)
    assert run_quietly(photos, tmp_path / "out", "--report", "all.html", "--num_iter", 1) == 1
    # The file that is no picture has failed before the first is painted.
    assert [cards(page) for page in pages] == [(1, 0), (2, 1), (3, 2)]
    assert ["Reload this page" in page for page in pages] == [True, True, False]
    assert [f"{done} of 3 photos done, 1 failed" in page for done, page in enumerate(pages)] == [True] * 3
    assert "less than a minute left" in pages[1]
    last = pages[2]
    assert "is no picture that Pillow can read" in last
    assert "<img src=x" not in last
    links = [urllib.parse.unquote(html.unescape(link)) for link in re.findall('href="([^d].*?)"', last)]
    assert links == [f"{BAD_NAME}/all.html", "a.png/all.html"]
    for link in links:
        assert len(read_report(tmp_path / "out" / link)[0]) == 2
    # What is done already is on it as well.
    path.unlink()
    assert run_quietly(photos, tmp_path / "out", "--report", "all.html", "--num_iter", 1, "--resume") == 1
    assert cards(path.read_text()) == (3, 2)


def test_a_page_that_is_not_of_a_folder_is_not_written_over(photos, tmp_path, capsys):
    path = tmp_path / "out" / "all.html"
    path.parent.mkdir()
    path.write_text("mine")
    assert run_quietly(photos, tmp_path / "out", "--report", "all.html") == 2
    assert "no page of a folder's photos" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert [entry.name for entry in path.parent.iterdir()] == ["all.html"]


def test_a_page_that_cannot_be_read_is_not_written_over(tmp_path, monkeypatch):
    (tmp_path / "all.html").write_text(report.INDEX)
    report.check_index(tmp_path / "all.html")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    with pytest.raises(deepstyle.UserError, match="no page of a folder's photos"):
        report.check_index(tmp_path / "all.html")


def test_a_folders_page_in_a_browser(photos, tmp_path, browser):
    assert run_quietly(photos, tmp_path / "out", "--report", "all.html", "--num_iter", 1) == 1
    path = tmp_path / "out" / "all.html"
    for width in (1200, 390):
        for mode in ("light", "dark"):
            look(browser, path, width, mode)
            assert browser.execute_script("return [...document.images].map(one => one.naturalWidth > 0)") == [True] * 2
            assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
            assert min(browser.execute_script(CONTRASTS)) >= 1
    assert {url for url in asked_for(browser) if not url.startswith("data:")} == {path.as_uri()}
    browser.execute_script("document.querySelector('figure a').click()")
    assert browser.execute_script(VISIBLE) == [False, True]
    assert browser.get_log("browser") == []


# ------------------------------------------------------------------- in a browser, while a run goes on


@contextlib.contextmanager
def under_way(*given):
    """The command in a process of its own, until it is asked to stop."""
    process = forked.start(*SMALL, "--quiet", *given)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=60)


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


IS_LOADED_AGAIN = "return !window.isLooking"  # after window.isLooking = true
NEWEST = "return [slider.value === slider.max, Number(figures.at(-1).dataset.evaluations)]"
CHOSEN = "return Number(figures[slider.value].dataset.evaluations)"
FOLLOWS = "return document.getElementById('follows')?.textContent"


def loaded_again(browser):
    """Wait until the page has loaded itself again."""
    browser.execute_script("window.isLooking = true")
    until(
        lambda: (
            browser.execute_script(IS_LOADED_AGAIN)
            and browser.execute_script("return document.readyState") == "complete"
        )
    )


def stays(browser, seconds=2.5):
    """Whether the page does not load itself again for a while in which it would."""
    browser.execute_script("window.isLooking = true")
    time.sleep(seconds)
    return not browser.execute_script(IS_LOADED_AGAIN)


def test_the_page_of_a_run_follows_it_and_keeps_what_was_chosen_until_the_run_ends(picture_files, tmp_path, browser):
    path = tmp_path / "a.html"
    with under_way(*picture_files, tmp_path / "a", "--report", path, "--num_iter", 10**6) as process:
        wait_for(path, process)
        look(browser, path, 390)
        first = browser.execute_script(NEWEST)[1]
        loaded_again(browser)
        is_newest, reached = browser.execute_script(NEWEST)
        assert is_newest and reached > first
        browser.execute_script("slider.focus(); slider.value = 1; show(); details.open = true; scrollTo(0, 700)")
        chosen = browser.execute_script(CHOSEN)
        loaded_again(browser)
        assert browser.execute_script(NEWEST)[1] > reached
        assert browser.execute_script(CHOSEN) == chosen
        assert browser.execute_script("return [details.open, document.activeElement.id]") == [True, "slider"]
        assert browser.execute_script("return scrollY") == pytest.approx(700, abs=2)
        assert browser.execute_script(FOLLOWS) == "This page follows the run."
        browser.execute_script("window.isLooking = true")
    until(lambda: browser.execute_script(FOLLOWS) is None)
    assert browser.execute_script(CHOSEN) == chosen
    assert stays(browser)
    page = path.read_text()
    assert "The run has ended here" in page
    assert "reload" not in page.lower()
    assert browser.get_log("browser") == []


@pytest.fixture
def left_behind(picture_files, tmp_path, monkeypatch):
    """The page of a run that was killed: of its end nothing is written."""
    with monkeypatch.context() as patch:
        patch.setattr(report.Report, "end", lambda self: None)
        flags = ["--num_iter", 5, "--min_improvement", 99.9, "--report", tmp_path / "a.html"]
        assert run_quietly(picture_files, tmp_path / "a", *flags) == 0
    return tmp_path / "a.html"


def test_the_page_does_not_load_itself_again_under_the_persons_hands_nor_unseen(left_behind, browser):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    look(browser, left_behind, 1200)
    ActionChains(browser).click_and_hold(browser.find_element(By.ID, "slider")).perform()
    assert stays(browser)
    ActionChains(browser).release().perform()
    loaded_again(browser)
    browser.execute_script("getSelection().selectAllChildren(document.querySelector('h1'))")
    assert stays(browser)
    browser.execute_script("getSelection().removeAllRanges()")
    loaded_again(browser)
    browser.execute_script("Object.defineProperty(document, 'visibilityState', {value: 'hidden', configurable: true})")
    assert stays(browser)
    browser.execute_script("delete document.visibilityState")
    loaded_again(browser)


def test_a_page_without_news_for_long_says_that_the_run_may_have_been_killed(left_behind, browser):
    page = left_behind.read_text()
    written = float(re.search(r"written = ([\d.]+)", page)[1])

    def as_if_written(seconds_ago):
        left_behind.write_text(page.replace(str(written), str(time.time() - seconds_ago)))
        look(browser, left_behind, 1200)
        return browser.execute_script(FOLLOWS)

    assert as_if_written(3600).startswith("No news since then: the run may have been killed")
    assert stays(browser)
    assert as_if_written(30) == "This page follows the run."
    assert as_if_written(-3600) == "This page follows the run."  # another computer's clock
    # That clock is of no account once the page has changed under our eyes.
    loaded_again(browser)
    left_behind.write_text(page.replace(str(written), str(time.time() - 7200)))
    loaded_again(browser)
    assert browser.execute_script(FOLLOWS) == "This page follows the run."


def test_a_batchs_page_follows_it(picture_files, tmp_path, browser):
    (tmp_path / "photos").mkdir()
    for number in range(30):
        shutil.copy(picture_files[0], tmp_path / "photos" / f"{number}.png")
    path = tmp_path / "out" / "a.html"
    with under_way(
        tmp_path / "photos", picture_files[1], tmp_path / "out", "--report", "a.html", "--num_iter", 5
    ) as process:
        wait_for(path, process)
        look(browser, path, 390)
        shown = browser.execute_script("return document.images.length")
        until(lambda: browser.execute_script("return document.images.length") > shown)
    until(lambda: browser.execute_script(FOLLOWS) is None)
    assert "; the same command with --resume does what is not" in path.read_text()
    assert stays(browser)
    assert "script" not in re.sub("<meta.*?>", "", path.read_text())

"""A page in a real browser: slider, play, pointing, filters, charts, three widths, no errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from actors import steady
from contrasts import TEXT, contrast, from_rgb
from pages import EVIL, Read, spoiled

import tokenenv
from tokenenv.game.rules import TokenPrune
from tokenenv.measure import speed
from tokenenv.page.html import write_page

webdriver = pytest.importorskip(
    "selenium.webdriver", reason="selenium is not installed (extra: browser)"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("no chromium and chromedriver on this machine", allow_module_level=True)

WIDTHS = (360, 768, 1280)


class Page:
    """A page in the browser."""

    def __init__(self, driver: Any, path: Path) -> None:
        self.driver, self.path = driver, path
        self.data = json.loads(Read(path.read_text(encoding="utf-8")).data)

    def open(self, width: int = 1280) -> Page:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get_log("browser")  # of pages before
        self.driver.get(self.path.as_uri())
        self.wait("return document.querySelector('.readout').textContent !== ''")
        return self

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 20).until(lambda driver: driver.execute_script(script))

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def press(self, element: Any, *keys: str) -> None:
        from selenium.webdriver.common.keys import Keys

        element.send_keys(*(getattr(Keys, key) for key in keys))

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def picture(self) -> str:
        """The first canvas as text."""
        found: str = self.run("return document.querySelector('canvas').toDataURL()")
        return found

    def choose(self, select: str, value: str) -> None:
        self.run(
            "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
            "s.dispatchEvent(new Event('change', {bubbles: true}))",
            select, value,
        )  # fmt: skip


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--force-prefers-reduced-motion",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of ToMe, of a policy with a known probability, and of a method without pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "_SHORTEST", 0.0)
        policy = steady(tokenenv.load_backbone(), TokenPrune((3, 6)), 0.75)
        whats = ["tome:r=8,blocks=2/5/9", policy, "resize:size=4"]
        found = tokenenv.explore(whats, images=16, limit=60, rounds=1)
    out = tmp_path_factory.mktemp("page")
    found.save(out)
    return out


@pytest.fixture
def page(driver: Any, folder: Path) -> Iterator[Page]:
    made = Page(driver, folder / "index.html").open()
    yield made
    assert made.errors() == []


def test_the_slider_shows_each_block(page: Page) -> None:
    slider, name = page.one("#step"), page.one("#step-name")
    assert slider.get_attribute("max") == "5"  # before; 2, 3, 5, 6 and 9
    page.press(slider, "HOME")
    assert name.text == "before the first decision"
    seen = [page.picture()]
    for block in ("in block 2", "before block 3", "in block 5", "before block 6", "in block 9"):
        page.press(slider, "ARROW_RIGHT")
        assert name.text == f"after the decision {block}"
        assert slider.get_attribute("aria-valuetext") == name.text
        seen.append(page.picture())
    # ToMe, on the left, decides in blocks 2, 5 and 9 alone.
    assert [one != other for one, other in pairwise(seen)] == [
        True, False, True, False, True,
    ]  # fmt: skip
    left = page.all(".meter span:last-child")[0].text
    assert left == "40 of 64"


def test_play_runs_to_the_end_and_stops(page: Page) -> None:
    play = page.one("#play")
    play.click()
    assert (play.text, play.get_attribute("aria-pressed")) == ("Pause", "true")
    assert page.one("#step").get_property("value") == "0"
    page.wait("return document.getElementById('step').value === '5'")
    page.wait("return document.getElementById('play').textContent === 'Play'")


def test_pointing_at_a_patch_tells_its_token_chance_and_reward(page: Page) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    page.press(page.one("#step"), "HOME", "ARROW_RIGHT", "ARROW_RIGHT")  # block 3: the policy's
    left, right = page.all("canvas")
    before = page.picture()
    ActionChains(page.driver).move_to_element_with_offset(left, 9, 9).perform()
    assert page.picture() != before  # its token is outlined
    assert page.all(".readout")[0].text.startswith("Row 5, column 5; ")
    ActionChains(page.driver).move_to_element_with_offset(right, 9, 9).perform()
    told = page.all(".readout")[1].text
    assert "its agent's probability to prune: 25.0 %" in told
    assert "reward (alpha_beta): " in told
    assert "Point at a patch" in page.all(".readout")[0].text


def test_the_keyboard_walks_from_patch_to_patch(page: Page) -> None:
    canvas, readout = page.all("canvas")[0], page.all(".readout")[0]
    for keys, place in (
        (["ARROW_DOWN"], "Row 1, column 1"),
        (["ARROW_RIGHT", "ARROW_DOWN", "ARROW_DOWN"], "Row 3, column 2"),
        (["ARROW_UP"] * 9, "Row 1, column 2"),
    ):
        page.press(canvas, *keys)
        assert readout.text.startswith(place)
    page.press(canvas, "ESCAPE")
    assert readout.text.startswith("Point at a patch")


def last(image: dict[str, Any], m: int = 0) -> tuple[int, int]:
    """Tokens left in the end, and the class predicted from them."""
    run = image["runs"][m]
    return run["tokens"][-1], run["guesses"][-1][0][0]


def test_filters_and_orders(page: Page) -> None:
    images = page.data["images"]
    page.run("document.querySelector('.panel select').value = 1")
    page.run("document.querySelector('.panel select').dispatchEvent(new Event('change'))")
    tokens = sorted(last(image, 1)[0] for image in images)
    page.wait("return document.getElementById('count').textContent.includes('Actor')")

    def shown() -> list[int]:
        return [int(each.text.split()[0]) for each in page.all(".thumbs .what.soft")]

    page.choose("order", "fewest")
    assert shown() == tokens
    page.choose("order", "most")
    assert shown() == tokens[::-1]
    label = images[0]["label"]
    page.choose("class", str(label))
    expected = sum(image["label"] == label for image in images)
    assert len(page.all(".thumbs button")) == expected
    assert page.one("#count").text.startswith(f"{expected} image")
    page.choose("class", "")
    page.choose("order", "changed")
    changed = sum(last(image, 1)[1] != image["dense"][0][0] for image in images)
    buttons = page.all(".thumbs button")
    marks = [bool(each.find_elements("css selector", ".changed")) for each in buttons]
    assert marks == [True] * changed + [False] * (len(images) - changed)
    page.choose("which", "changed")
    assert len(page.all(".thumbs button")) == changed


def test_the_list_opens_images_and_the_arrows_step_through_it(page: Page) -> None:
    page.choose("order", "file")
    files = [image["file"] for image in page.data["images"]]
    page.all(".thumbs button")[3].click()
    title = "return document.getElementById('image-title').textContent"
    page.wait(f"{title} === {json.dumps(files[3])}")
    assert page.all(".thumbs button")[3].get_attribute("aria-current") == "true"
    page.one("#next").click()
    page.wait(f"{title} === {json.dumps(files[4])}")
    page.one("#previous").click()
    page.wait(f"{title} === {json.dumps(files[3])}")


def test_dots_lead_to_their_methods(page: Page) -> None:
    rows = page.data["rows"]
    charts = page.all(".chart svg")
    assert len(charts) == 2  # multiply-adds and time
    for chart in charts:
        assert len(chart.find_elements("css selector", "a")) == len(rows) == 4
    policy = rows[2]["what"]
    named = [link.get_attribute("aria-label").split(": ")[0] for link in page.all(".chart a")]
    assert named == 2 * [row["what"] for row in rows]
    dot = page.all(".chart a")[2]
    page.run("arguments[0].focus()", dot)
    assert page.one(".picked").text.startswith(policy)
    page.press(dot, "ENTER")
    page.wait("return document.querySelector('tr.picked') !== null")
    assert page.one("tr.picked th").text.removesuffix(" ★") == policy
    assert page.run("return document.activeElement.tagName") == "TR"
    assert page.one(".panel select").get_property("value") == "1"


def test_intervals_stay_inside_and_each_method_is_named_once(page: Page) -> None:
    for chart in page.all(".chart svg"):
        wide, tall = (float(v) for v in chart.get_dom_attribute("viewBox").split()[2:])
        for line in chart.find_elements("css selector", ".interval"):
            x, one, other = (float(line.get_dom_attribute(name)) for name in ("x1", "y1", "y2"))
            assert 0 < x < wide and 0 < other <= one < tall
    names = [each.text for each in page.all(".chart-key li")]
    assert len(names) == len(set(names)) == 4


def test_headings_sort_the_classes(page: Page) -> None:
    head = page.all("#class-table thead button")[3]
    for order in ("descending", "ascending"):
        head.click()
        assert page.all("#class-table thead th")[3].get_attribute("aria-sort") == order
        values = [float(row.text) for row in page.all("#class-table tbody tr > :nth-child(4)")]
        assert values == sorted(values, reverse=order == "descending")


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window(page: Page, width: int) -> None:
    page.open(width)
    assert page.run("return document.documentElement.scrollWidth") <= width
    clipped = page.run(
        "return [...document.querySelectorAll('button, h1, h2, h3, label, p, .caption-text')]"
        ".filter((e) => e.offsetParent && e.scrollWidth > e.clientWidth + 1 && "
        "getComputedStyle(e).display !== 'inline').map((e) => e.textContent)"
    )
    assert clipped == []
    panels = [each for each in page.all(".panel canvas") if each.is_displayed()]
    assert len(panels) == (1 if width < 640 else 2)
    overlapping = page.run(
        "return [...document.querySelectorAll('.chart svg')].flatMap((chart) => {"
        " const boxes = [...chart.querySelectorAll('text')].map((t) => t.getBoundingClientRect());"
        " return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) => a.left < b.right &&"
        " b.left < a.right && a.top < b.bottom && b.top < a.bottom)); }).length"
    )
    assert overlapping == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(page: Page, scheme: str) -> None:
    """WCAG AA, of text and what it stands on as the browser draws them."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    pairs = page.run(
        "const see = (e) => { for (; e; e = e.parentElement) {"
        " const c = getComputedStyle(e).backgroundColor; if (!c.endsWith(', 0)')) return c; } };"
        "return [...document.querySelectorAll('p, h1, h2, h3, h4, a, button, label, td, th, span,"
        " select, output')].filter((e) => e.offsetParent && e.textContent.trim())"
        ".map((e) => [getComputedStyle(e).color, see(e)].join('|'))"
    )
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert len(pairs) > 100
    poor = {pair for pair in set(pairs) if contrast(*map(from_rgb, pair.split("|"))) < TEXT}
    assert poor == set()


def test_every_control_has_a_name(page: Page) -> None:
    nameless = page.run(
        "return [...document.querySelectorAll('button, select, input, a, canvas, svg[role]')]"
        ".filter((e) => !(e.getAttribute('aria-label') || e.textContent.trim() ||"
        " (e.labels && e.labels.length))).map((e) => e.outerHTML)"
    )
    assert nameless == []


def test_names_that_look_like_scripts_are_shown_as_text(driver: Any, folder: Path) -> None:
    page = Page(driver, folder / "index.html")
    rows = [{**row, "what": EVIL, "method": EVIL} for row in page.data["rows"]]
    classes = [{**row, "name": EVIL} for row in page.data["classes"]]
    write_page(folder / "evil.html", spoiled(page.data) | {"rows": rows, "classes": classes})
    evil = Page(driver, folder / "evil.html").open()
    assert evil.run("return window.hacked") is None
    assert len(evil.all("script")) == 2 and evil.one("#image-title").text == EVIL
    assert evil.one("#class-table tbody th").text == EVIL
    assert evil.errors() == []


def test_a_report_has_charts_and_tables_and_no_images(driver: Any, tmp_path: Path) -> None:
    whats = ["tome:r=4", "random-merge:r=8,seed=0|1"]
    tokenenv.compare(whats, limit=30, batch=(4,), rounds=1, seeds=True, out=tmp_path / "out")
    page = Page(driver, tmp_path / "out" / "report.html")
    driver.get_log("browser")
    driver.get(page.path.as_uri())
    assert not page.one("#images").is_displayed()
    assert len(page.all(".chart")) == 2  # against multiply-adds and against time
    rows = page.all("#method-table tbody tr")
    cells = [len(row.find_elements("css selector", "td")) for row in rows]
    assert cells == [8] * 5  # the row of exact savings, which has no time, is as long
    assert [each.text for each in page.all("#seed-table tbody th")] == ["random-merge:r=8"]
    assert page.errors() == []

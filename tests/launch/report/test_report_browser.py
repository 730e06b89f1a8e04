"""Reports in a real browser: they draw what is in them, ask for nothing, and can be read in the dark, on a phone and by
keyboard."""

import json
import shutil
import time
from dataclasses import replace

import pytest

from foreroute.launch.page.html_file import html
from foreroute.launch.page.parts import Areas, Bars, Chart, Curve, HeatMap, Section
from foreroute.launch.page.style import DARK, LIGHT
from foreroute.launch.report.one_run import run_page
from foreroute.launch.report.run_data import read_run
from foreroute.launch.report.several_runs import several_page
from foreroute.launch.testing.run_folders import write_run

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs chromium and chromedriver: as root, tests/install_browser.sh"
)
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
DESK = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}


class Browser:
    """A headless Chromium, and what a page did in it."""

    def __init__(self):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, Service(DRIVER))  # a path: selenium looks for none

    def show(self, page, *, scheme="light", screen=DESK):
        """Open a file and wait until its charts are drawn."""
        self.command("Emulation.setDeviceMetricsOverride", screen)
        self.scheme(scheme)
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # forgets what was before
        self.driver.get(page.as_uri())
        self.wait("document.documentElement.dataset.drawn")

    def scheme(self, name):
        feature = {"name": "prefers-color-scheme", "value": name}
        self.command("Emulation.setEmulatedMedia", {"features": [feature]})

    def command(self, name, parameters):
        self.driver.execute_cdp_cmd(name, parameters)

    def run(self, script):
        return self.driver.execute_script(f"return {script}")

    def wait(self, script, seconds=150):
        deadline = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < deadline, f"not after {seconds} s: {script}"
            time.sleep(0.05)

    def errors(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        """Addresses that the page asked for, without its own and what it holds itself."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        own = self.driver.current_url.partition("#")[0]
        return [url for url in asked if url.partition("#")[0] != own and not url.startswith("data:")]

    def press(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()


@pytest.fixture(scope="module")
def browser():
    found = Browser()
    yield found
    found.driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Of one run and of several: the page and its file."""
    folder = tmp_path_factory.mktemp("runs")
    one = run_page(read_run(write_run(folder / "one", lines=60)))
    runs = [read_run(write_run(folder / f"r{i}", lines=20, seed=i, lr=1e-3 * (i + 1))) for i in range(7)]
    found = {}
    for name, page in (("one", one), ("several", several_page("Seven runs", runs))):
        file = folder / f"{name}.html"
        file.write_text(html(page), encoding="ascii")
        found[name] = page, file
    return found


def choose_all(browser):
    """Have every chart drawn, also those that are shown one at a time, and leave all of them open."""
    browser.run("""document.querySelectorAll(".switch").forEach((group) => {
        [...group.children].forEach((_, i) => [...group.children].find((figure) => !figure.hidden)
            .querySelectorAll(".choice button")[i].click());
        [...group.children].forEach((figure) => { figure.hidden = false; })})""")


@pytest.mark.parametrize("which", ["one", "several"])
def test_every_plot_has_its_marks_and_nothing_is_asked_for(browser, pages, which):
    page, file = pages[which]
    browser.show(file)
    choose_all(browser)
    counted = browser.run("""[...document.querySelectorAll(".plot")].map((plot) => ({
            lines: [...plot.querySelectorAll(".scatterlayer .js-line")]
                .filter((p) => p.getAttribute("d").length > 4).length,
            fills: plot.querySelectorAll(".scatterlayer .js-fill").length,
            bars: [...plot.querySelectorAll(".barlayer .point path")]
                .filter((p) => p.getBoundingClientRect().height > 1).length,
            images: [...plot.querySelectorAll(".heatmaplayer image")]
                .filter((i) => i.getBoundingClientRect().width > 50).length,
            words: plot.textContent}))""")
    charts = [part for section in page.sections for part in section.parts if isinstance(part, Chart)]
    assert {type(chart) for chart in charts} == ({Curve, Areas, Bars, HeatMap} if which == "one" else {Curve})
    assert len(counted) == len(charts)
    for chart, marks in zip(charts, counted, strict=True):
        assert chart.x_label in marks["words"] and chart.y_label in marks["words"]
        if isinstance(chart, Curve):
            bands = sum(line.upper is not None for line in chart.lines)
            assert marks["lines"] == len(chart.lines) + 2 * bands, chart.title
        elif isinstance(chart, Areas):
            assert marks["fills"] == len(chart.lines), chart.title
        elif isinstance(chart, Bars):
            assert marks["bars"] == len(chart.bars) * len(chart.groups), chart.title
        else:
            assert marks["images"] == 1, chart.title
    assert browser.errors() == [] and browser.requests() == []


def test_one_of_a_choice_is_shown(browser, pages):
    browser.show(pages["several"][1])
    shown = "[...document.querySelector('.switch').children].map((figure) => figure.checkVisibility())"
    pressed = "[...document.activeElement.parentElement.children].map((button) => button.ariaPressed)"
    lines = "document.querySelectorAll('.switch')[0].children[2].querySelectorAll('.scatterlayer .js-line').length"
    assert browser.run(shown) == [True, False, False] and browser.run(lines) == 0
    browser.driver.find_elements("css selector", ".choice button")[2].click()
    browser.wait(f"{lines} === 6")
    assert browser.run(shown) == [False, False, True]
    assert browser.run(pressed) == ["false", "false", "true"]
    assert browser.run("document.activeElement.textContent") == "time"


@pytest.mark.slow
def test_the_search_for_requests_finds_them(browser, pages, tmp_path):
    """Negative control: an image from outside is asked for, or refused by the page's own policy."""
    page = pages["several"][0]
    small = replace(page, sections=[Section("one", page.sections[1].parts[:1])])
    source = html(small).replace("</main>", '<img src="http://127.0.0.1:9/x.png" alt=""></main>')
    refused, asked = tmp_path / "refused.html", tmp_path / "asked.html"
    refused.write_text(source)
    asked.write_text(source.replace("default-src 'none'", "default-src *").replace("img-src data:", "img-src *"))
    browser.show(refused)
    browser.wait("document.images[0].complete")
    assert any("Content Security Policy" in message for message in browser.errors())
    browser.show(asked)
    browser.wait("document.images[0].complete")
    assert browser.requests() == ["http://127.0.0.1:9/x.png"]


COLOURS = """[getComputedStyle(document.body).backgroundColor,
    getComputedStyle(document.querySelector(".plot .scatterlayer .js-line")).stroke,
    getComputedStyle(document.querySelector(".plot .xtick text")).fill]"""


def rgb(palette, *names):
    values = [palette[name] for name in names]
    return [f"rgb({int(v[1:3], 16)}, {int(v[3:5], 16)}, {int(v[5:7], 16)})" for v in values]


def test_colours_follow_the_system_also_while_the_page_is_open(browser, pages):
    browser.show(pages["several"][1])
    light = browser.run(COLOURS)
    browser.scheme("dark")
    browser.wait(f"{COLOURS}[2] !== '{light[2]}'")
    assert light == rgb(LIGHT, "paper", "c0", "muted")
    assert browser.run(COLOURS) == rgb(DARK, "paper", "c0", "muted")
    browser.show(pages["several"][1], scheme="dark")
    assert browser.run(COLOURS) == rgb(DARK, "paper", "c0", "muted")


@pytest.mark.parametrize(("which", "width"), [("one", 390), ("several", 320)])
def test_nothing_is_wider_than_a_phone(browser, pages, which, width):
    browser.show(pages[which][1], screen={**PHONE, "width": width})
    assert browser.run("document.documentElement.scrollWidth") == width
    boxes = """[...document.querySelectorAll(".plot svg, figure, .scroll, dl, p, h1, h2")]
        .map((e) => e.getBoundingClientRect()).filter((b) => b.left < 0 || b.right > innerWidth + 0.5).length"""
    assert browser.run(boxes) == 0
    hints = """[...document.querySelectorAll(".scroll")].filter((e) => e.checkVisibility()).map((e) =>
        [e.scrollWidth > e.clientWidth, getComputedStyle(e, "::before").content.includes("more columns")])"""
    browser.wait(f"{hints}.every(([hides, told]) => hides === told)")
    assert {hides for hides, _ in browser.run(hints)} == {False, True} if which == "one" else {True}
    browser.run(
        "document.querySelector('main').append(Object.assign(document.createElement('pre'), {style: 'width: 60rem'}))"
    )
    assert browser.run("document.documentElement.scrollWidth") > width  # negative control


@pytest.mark.slow
def test_a_keyboard_reaches_everything(browser, pages):
    from selenium.webdriver.common.keys import Keys

    browser.show(pages["several"][1])
    reached = []
    wanted = browser.run(
        "[...document.querySelectorAll('summary, .legend button, .choice button, nav a')]"
        ".filter((e) => e.checkVisibility()).length"
    )
    browser.press(Keys.TAB)
    assert browser.run("document.activeElement.textContent") == "Skip to the content"
    assert browser.run("document.activeElement.getBoundingClientRect().left") >= 0  # seen when it has the focus
    for _ in range(wanted + 20):
        browser.press(Keys.TAB)
        found = browser.run(
            "[document.activeElement.tagName, [...document.querySelectorAll('*')].indexOf(document.activeElement),"
            " getComputedStyle(document.activeElement).outlineStyle]"
        )
        if found[0] == "BODY":
            break
        reached.append(found)
    assert [place for _, place, _ in reached] == sorted(place for _, place, _ in reached)
    assert len([tag for tag, *_ in reached if tag in ("SUMMARY", "BUTTON", "A")]) == wanted
    assert {outline for *_, outline in reached} == {"solid"}


def test_tables_open_and_names_hide_their_lines_by_keys(browser, pages):
    from selenium.webdriver.common.keys import Keys

    browser.show(pages["several"][1])
    table = "document.querySelector('figure details table').checkVisibility()"
    assert not browser.run(table)
    browser.run("document.querySelector('figure summary').focus()")
    browser.press(Keys.ENTER)
    browser.wait(table)
    lines = "document.querySelector('.plot').querySelectorAll('.scatterlayer .js-line').length"
    before = browser.run(lines)
    browser.run("document.querySelector('.legend button').focus()")
    browser.press(Keys.SPACE)
    browser.wait(f"{lines} === {before - 1}")
    assert browser.run("document.querySelector('.legend button').ariaPressed") == "false"
    browser.press(Keys.SPACE)
    browser.wait(f"{lines} === {before}")


@pytest.mark.parametrize("which", ["one", "several"])
def test_a_screen_reader_finds_names_headings_and_landmarks(browser, pages, which):
    browser.show(pages[which][1])
    assert browser.run("document.documentElement.lang") == "en"
    for landmark in ("main", "header", "footer", "nav[aria-label]"):
        assert browser.run(f"document.querySelectorAll('{landmark}').length") == 1
    assert set(browser.run("[...document.querySelectorAll('h1, h2, h3')].map((e) => e.tagName)")[1:]) == {"H2"}
    nameless = {
        "a chart without words": ".plot:not([role=img][aria-label*=' '])",
        "a header cell without a direction": "th:not([scope])",
        "a picture outside of a chart": ":not(.plot *) > img",
        "a region without a name": "[role=region]:not([aria-label])",
        "a section without a title": "section:not([aria-labelledby])",
        "a figure without a title": "figure:not([aria-labelledby])",
        "a legend's name that cannot be pressed": ".legend button:not([aria-pressed])",
    }
    for what, selector in nameless.items():
        assert browser.run(f'document.querySelectorAll("{selector}").length') == 0, what
    ids = browser.run("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    titles = browser.run(
        "[...document.querySelectorAll('[aria-labelledby]')].map((e) =>"
        " document.getElementById(e.getAttribute('aria-labelledby')).textContent)"
    )
    assert titles and all(titles)
    browser.run("document.querySelector('th').removeAttribute('scope')")
    assert browser.run("document.querySelectorAll('th:not([scope])').length") == 1  # negative control


def test_without_script_there_are_text_and_tables(browser, pages):
    browser.command("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.driver.get(pages["one"][1].as_uri())
        plots = browser.driver.find_elements("css selector", ".plot")
        tables = browser.driver.find_elements("css selector", "figure details table")
        assert len(plots) == len(tables) > 10
        assert not any(plot.is_displayed() for plot in plots[:3])
        browser.driver.find_element("css selector", "figure summary").click()
        assert tables[0].is_displayed() and "bits per symbol" not in tables[1].text
    finally:
        browser.command("Emulation.setScriptExecutionDisabled", {"value": False})


def test_paper_is_light(browser, pages):
    browser.show(pages["several"][1], scheme="dark")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    browser.wait(f"{COLOURS}[2] === '{rgb(LIGHT, 'muted')[0]}'")
    browser.run("dispatchEvent(new Event('afterprint'))")
    browser.wait(f"{COLOURS}[2] === '{rgb(DARK, 'muted')[0]}'")

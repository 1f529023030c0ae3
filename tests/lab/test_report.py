"""The report is one file that a browser shows without a network, at any width; looked at in headless Chromium."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from tests.lab.browsing import shown
from tests.lab.conftest import Place


def test_nothing_comes_from_elsewhere(done: Place) -> None:
    page = (done.out / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"#][^"]*)"', page)
    assert sources
    assert all(s.startswith("data:image/jpeg;base64,") for s in sources)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert not re.findall(r"https?://(?!www\.w3\.org/)", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    tables = [i for i in ids if re.fullmatch(r"[a-z]+", i)]
    assert len(tables) == len(set(tables))


def test_what_it_says(done: Place) -> None:
    page = (done.out / "report.html").read_text(encoding="utf-8")
    for heading in ("Verdicts", "Scores", "Curves", "What the rules assign", "From assignment to miss", "Side by side",
                    "How the arms differ"):  # fmt: skip
        assert f"<h2>{heading}</h2>" in page
    assert "4 of 4 cells finished" in page
    assert page.count('class="scene"') == 2
    assert page.count("data-rule=") >= 4
    assert page.count('<svg class="plot"') > 8


def test_a_profile_over_several_data_sets(copy: Callable[[], Place]) -> None:
    """Three data sets of one kind: the profile, and everything else for each of them."""
    here = copy()
    here.change("seeds: [0, 1]", "seeds: [0, 1]\ndatasets: {dense: {}, tiny: {}, nested: {}}")
    for name in ("dense", "tiny", "nested"):
        shutil.copytree(here.out / "cells" / "data", here.out / "cells" / name)
    assert here.compare("--report-only") == 0
    page = (here.out / "report.html").read_text(encoding="utf-8")
    assert "<h2>Profile</h2>" in page
    assert "12 of 12 cells finished" in page
    for name in ("dense", "tiny", "nested"):
        assert f"AP by class on {name}." in page
    summary = json.loads((here.out / "summary.json").read_text())
    families = [r["comparisons"]["AP"] for r in summary["rows"] if r["comparisons"]]
    assert len(families) == 3
    for comparison in families:  # three comparisons are one family
        assert comparison["corrected_p"] == pytest.approx(min(1, 3 * comparison["p"]))


def test_missing_weights_are_said_once(copy: Callable[[], Place]) -> None:
    here = copy()
    for path in here.out.rglob("last.pt"):
        path.unlink()
    assert here.compare("--report-only") == 0
    page = (here.out / "report.html").read_text(encoding="utf-8")
    assert page.count("last.pt is not here") == 1
    assert "no pictures of assignments by one, two" in page
    assert "no such checkpoint" not in page


def test_tables_fit_a_desktop(done: Place, browser: Any) -> None:
    shown(browser, done.out / "report.html", 1280)
    cut = browser.execute_script(
        "return [...document.querySelectorAll('.wide')].filter(w => w.querySelector('#verdicts, #scores, #statistics')"
        " && w.scrollWidth > w.clientWidth).length"
    )
    assert cut == 0


@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser(done: Place, browser: Any, width: int) -> None:
    shown(browser, done.out / "report.html", width)
    assert browser.title == "small"
    assert browser.get_log("browser") == []
    # Nothing sticks out: wide tables scroll in their own place.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    # Lazy pictures load once they come into view; every one of them can be decoded.
    broken = browser.execute_async_script(
        "const done = arguments[0]; Promise.all([...document.images].map(i => { i.loading = 'eager';"
        " return i.decode().then(() => i.naturalWidth > 0, () => false); }))"
        ".then(all => done(all.filter(x => !x).length))"
    )
    assert broken == 0
    plots = browser.execute_script(
        "return [...document.querySelectorAll('svg.plot')].map(s => [s.getBoundingClientRect().width,"
        " s.getBoundingClientRect().height])"
    )
    assert plots
    assert all(100 < w <= width and h > 30 for w, h in plots)
    assert "not distinguishable" in browser.find_element("id", "verdicts").text


def test_the_rule_picker(done: Place, browser: Any) -> None:
    shown(browser, done.out / "report.html", 1200)

    def visible() -> set[str]:
        rows = browser.find_elements("css selector", "[data-rule]")
        return {row.get_attribute("data-rule") for row in rows if row.is_displayed()}

    assert visible() == {"one", "two"}
    browser.find_element("css selector", 'input[value="one"]').click()
    assert visible() == {"two"}
    browser.find_element("css selector", 'input[value="two"]').click()
    assert visible() == set()
    browser.find_element("css selector", 'input[value="one"]').click()
    assert visible() == {"one"}
    # On paper every rule is there, whatever was picked.
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert visible() == {"one", "two"}
    assert not browser.find_element("class name", "picker").is_displayed()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_it_prints(done: Place, browser: Any) -> None:
    import base64

    shown(browser, done.out / "report.html", 720)  # about the width of a sheet of A4 within its margins
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 720
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    content = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert content.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", content))
    assert 2 <= pages <= 20

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.helpers.browser import CHROMIUM, DRIVER, WHY_NOT, open_browser
from tests.judge.examples import make_comparison

from halfbyte.errors import ConfigError
from halfbyte.judge.html_parts import mark_differences, visible
from halfbyte.judge.report import FORMATS, write_json, write_report
from halfbyte.judge.report_html import write_html
from halfbyte.judge.report_text import write_junit, write_markdown

VOID = {"meta", "br"}


@pytest.fixture(scope="module")
def comparison():
    return make_comparison()


class Tags(HTMLParser):
    """Records open tags, all tags and all addresses; fails on a wrong closing tag."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.addresses = [], set(), []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_well_formed_and_loads_nothing_external(comparison):
    page = write_html(comparison)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert not {"script", "link", "img", "iframe", "object"} & tags.seen
    assert [a for a in tags.addresses if not a.startswith("#")] == []
    assert "@import" not in page
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_page_shows_the_verdict_first_and_then_all_evidence(comparison):
    page = write_html(comparison)
    assert page.index(">Inconclusive<") < page.index(">Requirements<")
    for part in (
        "0.1200", "7.5", "models/base &lt;1&gt;", "9 (harmful flips)", "4 (beneficial flips)",
        "model.layers.7.mlp.down_proj", "endless repetition 1", "270.0 MB", "1.1 GB", "90 of 120",
        "after a median of 3.5 tokens", "<mark>2</mark>", "&lt;angle brackets&gt;",
    ):  # fmt: skip
        assert part in page, part
    # What a model wrote stays text, and control characters become visible.
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "\x00" not in page
    assert "␀␛" in page


def test_differing_words_are_marked_on_both_sides():
    left, right = mark_differences("the cat sat", "the dog sat down")
    assert left == "the <mark>cat</mark> sat"
    assert right == "the <mark>dog</mark> sat<mark> down</mark>"
    assert mark_differences("<a>", "<a>") == ("&lt;a&gt;", "&lt;a&gt;")
    assert visible("a\x07\n\x7f") == "a␇\n␡"


def test_json_is_complete_and_strict(comparison):
    values = json.loads(write_json(comparison), parse_constant=pytest.fail)
    assert (values["outcome"], values["exit_code"]) == ("inconclusive", 2)
    assert values["overall"]["flips"]["harmful"] == 9
    assert values["text"]["perplexity_ratio_interval"]["low"] > 1
    assert values["layers"]["linears"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert len(values["slices"]) == 3


def test_markdown_tables_have_as_many_cells_as_heads(comparison):
    text = write_markdown(comparison)
    assert text.startswith("### ❔ Inconclusive: `models/a-rather")
    width = None
    for line in text.splitlines():
        if not line.startswith("|"):
            width = None
            continue
        cells = len(re.findall(r"(?<!\\)\|", line))
        assert width in (None, cells), line
        width = cells
    assert "<script" not in text
    assert "| json:1 |" in text
    for claim in comparison.verdict.claims:
        assert claim.advice in text


@pytest.mark.parametrize(("harmful", "failures"), [(60, 2), (9, 0)])
def test_junit_counts_failed_and_inconclusive_claims(harmful, failures):
    comparison = make_comparison(harmful=harmful)
    suite = ElementTree.fromstring(write_junit(comparison)).find("testsuite")
    cases = suite.findall("testcase")
    assert int(suite.get("tests")) == len(cases) == len(comparison.verdict.claims)
    assert int(suite.get("failures")) == len(suite.findall("testcase/failure")) == failures
    assert int(suite.get("skipped")) == len(suite.findall("testcase/skipped")) > 0


def test_all_formats_are_written_to_a_folder(comparison, tmp_path):
    paths = write_report(comparison, tmp_path / "new" / "report")
    assert [path.name for path in paths] == [name for name, _ in FORMATS.values()]
    assert all(path.read_text(encoding="utf-8") for path in paths)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Cannot create the report folder"):
        write_report(comparison, tmp_path / "file" / "report")


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=WHY_NOT)
def test_page_in_a_browser_light_dark_phone_and_print(comparison, tmp_path):
    page = write_report(comparison, tmp_path)[0]
    with open_browser() as browser:
        browser.open(page)
        for width in (1280, 390):
            browser.look(width=width)
            assert browser.value("document.documentElement.scrollWidth") <= width
            assert browser.value("document.querySelector('.verdict .word').textContent") == (
                "Inconclusive"
            )
            size = browser.value(
                "Math.min(...[...document.querySelectorAll('p, td, pre')]"
                ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
            )
            assert size >= 12
            height = browser.value(
                "Math.min(...[...document.querySelectorAll('svg text')]"
                ".map(e => e.getBoundingClientRect().height))"
            )
            assert height >= 10
        colours = {}
        for dark in (False, True):
            browser.look(width=390, dark=dark)
            colours[dark] = _contrasts(browser)
            browser.screenshot(tmp_path / f"phone-{'dark' if dark else 'light'}.png")
        assert colours[False]["page"] > 0.9 > 0.1 > colours[True]["page"]
        assert min(*colours[False]["ratios"], *colours[True]["ratios"]) >= 4.5
        browser.look(width=800, dark=True, media="print")
        assert _contrasts(browser)["page"] > 0.9
        assert browser.value("getComputedStyle(document.querySelector('nav')).display") == "none"
        assert browser.print_pdf().startswith(b"%PDF")
        assert browser.value("performance.getEntriesByType('resource').length") == 0
        assert browser.log() == []
    assert Path(tmp_path / "phone-dark.png").stat().st_size > 10_000


def _contrasts(browser):
    """Luminance of the page, and the contrast of each kind of text with its background."""
    return browser.value(
        """(() => {
        const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => {
            x /= 255; return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4 });
            return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2] };
        const behind = e => { for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor;
            if (!/, 0\\)$|transparent/.test(c)) return light(c) }
            return 1 };
        const seen = [...document.querySelectorAll('h1, h2, p, td, th, pre, mark, .word, nav a')];
        const ratios = seen.map(e => {
            const [a, b] = [light(getComputedStyle(e).color), behind(e)];
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) });
        return {page: light(getComputedStyle(document.body).backgroundColor), ratios};
        })()"""
    )

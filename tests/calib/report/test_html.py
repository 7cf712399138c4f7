"""Pieces of a page: nothing that a report says becomes markup, and what is drawn and downloaded is what was given."""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2 import StrictUndefined, UndefinedError

from calib.report.charts import (
    COLOR_ROLES,
    ERROR,
    TOP,
    Axis,
    Line,
    chart,
    chart_by_block,
    charts_by_kind,
    split_name,
    ticks,
)
from calib.report.html import (
    TEMPLATES,
    Verdict,
    as_csv,
    as_json,
    described_steps,
    format_cell,
    format_change,
    format_number,
    render_page,
    templates_in,
)

HOSTILE = st.one_of(
    st.text(),
    st.sampled_from(
        [
            "</script><script>alert(1)</script>", "<!--<script>", "]]>", '"><img src=x onerror=alert(1)>',
            "' onclick='x", "</title><style>*{}", "<svg onload=alert(1)>", "&lt;b&gt;", "\u2028", "\x00",
            "javascript:alert(1)",
        ]
    ),
)  # fmt: skip
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | HOSTILE
JSON = st.recursive(LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(HOSTILE, v, max_size=3), max_leaves=8)
WRITABLE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))


class Outline(HTMLParser):
    """Elements with their attributes, and the text of those that are no scripts or styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.text: list[str] = []
        self._inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text.append(data)


LAYOUT = """
{% extends "page.html" %}{% import "parts.html" as part %}
{% block main %}{{ part.section("Figures") }}{{ part.table(head, rows, sortable=true) }}{{ part.figures(charts) }}
{{ part.notes(notes) }}{% call part.folded(head[0]) %}{{ part.table(head, rows, tall=true) }}{% endcall %}{% endblock %}
"""


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A template with every piece of a page."""
    file = tmp_path_factory.mktemp("templates") / "layout.html"
    file.write_text(LAYOUT)
    return file


def page_of(layout: Path, texts: list[str], files: dict[str, str] | None = None) -> str:
    """Every place of a page that takes a text, each with one of its own."""
    a, b, c, d = texts
    step = {"job": a, "model": {"name": b, "sha256": c}, "options": {d: a}, "data": {a: {b: c}}, "quality": {b: 1.5},
            "teacher": [{"job": c, "model": {"name": d}}]}  # fmt: skip
    x, y, lines = Axis(a, b), Axis(c, d), (Line("before", a), Line("after", b))
    return render_page(
        layout, title=a, eyebrow=b, heading=c, verdict=Verdict("bad", d, a), warnings=[b], notes=[c],
        files={"report.json": "{}"} if files is None else files, head=(a, b), rows=[(c, d)],
        charts=[
            chart({lines[0]: [1, 2], lines[1]: [2, 3]}, c, x=x, y=y), chart({}, d, x=x, y=y),
            *charts_by_kind({lines[0]: [(b, 1.0), (c, 2.0)], lines[1]: [(b, 2.0), (c, 1.0)]}, y=y),
        ],
        lines_of={a: b}, load_notes=[d], steps=described_steps([step]),
    )  # fmt: skip


@given(st.lists(HOSTILE, min_size=4, max_size=4))
def test_no_text_becomes_markup(layout: Path, texts: list[str]) -> None:
    """The elements of the page and their attributes are those of the same page of harmless texts."""
    harmless = [f"x{texts.index(text)}" if text else "" for text in texts]
    got, want = Outline(page_of(layout, texts)).elements, Outline(page_of(layout, harmless)).elements
    assert got == want
    assert not any(name.startswith("on") or name == "style" for _, names in got for name in names)


def files_in(page: str) -> dict[str, str]:
    """As the script unpacks them."""
    (packed,) = re.findall(r'<script type="application/json" id="files">(.*?)</script>', page, re.DOTALL)
    return {f["name"]: gzip.decompress(base64.b64decode(f["data"])).decode() for f in json.loads(packed)}


@given(JSON)
def test_the_report_comes_out_of_its_page(layout: Path, report: Any) -> None:
    page = page_of(layout, list("abcd"), {"report.json": as_json(report)})
    assert json.loads(files_in(page)["report.json"]) == report


def test_what_is_no_number_is_null_in_a_download() -> None:
    assert json.loads(as_json({"a": [math.nan, math.inf, 1.5], "b": True})) == {"a": [None, None, 1.5], "b": True}


@given(st.lists(st.lists(WRITABLE, min_size=2, max_size=2)), st.lists(st.floats(allow_nan=False), max_size=3))
def test_a_table_comes_back_from_csv(rows: list[list[str]], numbers: list[float]) -> None:
    found = list(csv.reader(io.StringIO(as_csv(("a", "b"), [*rows, *((n, n) for n in numbers)]), newline="")))
    assert found[0] == ["a", "b"] and found[1 : len(rows) + 1] == rows
    assert [float(row[0]) for row in found[len(rows) + 1 :]] == numbers, "to the last digit"


X, Y = Axis("step", "count"), Axis("loss", "nats")


def points_of(values: list[float], *, logarithmic: bool = False) -> list[tuple[float, float]]:
    """Of a chart's only line."""
    lines = chart({ERROR: values}, "a", x=X, y=Y, logarithmic=logarithmic).lines
    return [(float(x), float(y)) for _, line in lines for x, y in (pair.split(",") for pair in line.split())]


@example([1.7e308, -1.7e308], False)
@example([5e-324], True)
@example([5e-324, 0.0], False)
@given(st.lists(NUMBERS, min_size=1, max_size=500), st.booleans())
def test_what_is_drawn_is_finite_and_inside(values: list[float], logarithmic: bool) -> None:
    drawn = points_of(values, logarithmic=logarithmic)
    usable = [v for v in values if abs(v) < 1e100 and (v > 1e-100 or not logarithmic)]
    assert bool(drawn) == bool(usable)
    assert all(0 <= x <= 240 and TOP <= y <= 144 for x, y in drawn)


def test_a_line_is_where_its_values_are() -> None:
    """Closed form: 0, 1, 4 on a straight axis and 1, 10, 100 on a logarithmic one."""
    (x0, low), (x1, one), (x2, high) = points_of([0, 1, 4])
    bent = points_of([1, 10, 100], logarithmic=True)
    assert x1 - x0 == x2 - x1 > 0 and (low - one) * 4 == pytest.approx(low - high, abs=0.5)
    assert bent[1][1] == pytest.approx((bent[0][1] + bent[2][1]) / 2, abs=0.06) and bent[0][1] > bent[2][1]
    uneven = chart({ERROR: [1, 2, 3]}, "a", x=X, y=Y, at=[2, 3, 8])
    first, second, last = (float(pair.split(",")[0]) for pair in uneven.lines[0][1].split())
    assert (second - first) * 6 == pytest.approx(last - first, abs=0.5)
    assert [text for _, text in uneven.x_ticks] == ["2", "8"]


@given(st.floats(1e-12, 1e12), st.floats(1.0001, 1e6), st.booleans())
def test_ticks_are_few_round_and_within(low: float, times: float, logarithmic: bool) -> None:
    high = low * times
    found = ticks(low, high, logarithmic=logarithmic)
    assert 2 <= len(found) <= 7 and found == sorted(found) and all(low <= v <= high for v in found)


def test_linears_are_drawn_by_kind_and_experts_as_their_mean() -> None:
    linears = [(f"model.layers.{i}.mlp.{kind}", float(i + extra)) for i in range(3) for kind, extra in (("up", 0), ("down", 5))]  # fmt: skip  # noqa: E501
    assert [one.title for one in charts_by_kind({ERROR: linears}, y=Y)] == ["up", "down"]
    assert [one.title for one in charts_by_kind({ERROR: [(name, 1.0) for name, _ in linears]}, y=Y)] == ["up, down"]
    experts = [(f"m.{i}.moe.experts.{e}.w1", float(e * 2)) for i in range(2) for e in range(3)]
    (panel,) = charts_by_kind({ERROR: experts}, y=Y)
    assert panel.summary.startswith("error from 2 to 2,") and panel.title == "w1 (mean)"
    assert split_name("model.layers.12.mlp.up") == (12, "mlp.up") and split_name("head") == (None, "head")


def test_a_block_is_drawn_as_the_mean_of_its_linears() -> None:
    """Blocks 0 and 2 have means 2 and 6; a linear outside of blocks has no place on the axis."""
    linears = [("a.0.up", 1.0), ("a.0.down", 3.0), ("a.2.up", 6.0), ("head", 50.0)]
    panel = chart_by_block({ERROR: linears}, "error", Y)
    assert panel.summary == "error from 2 to 6, least 2, greatest 6"
    assert [text for _, text in panel.x_ticks] == ["0", "2"] and str(panel.x) == "block (index)"


def colors(css: str) -> list[dict[str, str]]:
    """Variables, of the light and of the dark page."""
    return [
        dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", of)) for of in re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    ]


def test_a_color_means_one_thing() -> None:
    """Every role has a color of its own, light and dark, and one rule that takes it."""
    css = (TEMPLATES / "report.css").read_text()
    light, dark = colors(css)
    for page in (light, dark):
        assert len({page[role] for role in COLOR_ROLES}) == len(COLOR_ROLES)
    for role in COLOR_ROLES:
        assert css.count(f"stroke: var(--{role})") == 1 and re.search(
            rf"^\.{role} \{{ stroke: var\(--{role}\)", css, re.M
        )
        assert light[role] != dark[role]


def test_a_page_allows_itself_and_nothing_else(layout: Path) -> None:
    """The policy's hashes are those of the style and the script that are in the page."""
    page = page_of(layout, list("abcd"))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    for what, tag in (("style-src", "style"), ("script-src", "script")):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{what} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and not re.search(r"https?://", page)
    assert '<a href="#figures">Figures</a>' in page


def test_what_a_template_is_not_given_is_an_error(layout: Path) -> None:
    with pytest.raises(UndefinedError, match="rows"):
        render_page(layout, title="x", verdict=Verdict("good", "", ""), files={}, head=("a",))
    found = templates_in(layout.parent)
    assert found.autoescape is True and found.undefined is StrictUndefined


def test_a_recipe_that_lacks_everything_is_still_a_page() -> None:
    def told(steps: list[dict[str, Any]]) -> str:
        parts = templates_in(TEMPLATES).get_template("parts.html").module
        return str(parts.recipe(described_steps(steps)))  # type: ignore[attr-defined]

    assert "None" in told([{}]) and "No figures." in told([{"teacher": 3, "quality": []}]) and "Not known" in told([])


def test_numbers() -> None:
    assert [format_number(v) for v in (None, 1234.6, 0.000123464)] == ["–", "1,235", "0.0001235"]
    assert [format_cell(v) for v in (12345, 0.5, None, "1e3", True)] == ["12,345", "0.5", "–", "1e3", "True"]


@example(1.0, 0.9999999)
@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_no_zero_has_a_sign(before: float, after: float) -> None:
    assert not re.search(
        r"-0(\.0*)?(?![\d.])", f"{format_change(before, after)} {format_cell(after)} {format_cell(-0.0)}"
    )

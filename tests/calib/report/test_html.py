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
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from calib.report.charts import lines, panels, place, ticks
from calib.report.html import as_csv, as_json, document, format_number, heading, loading, recipe, section, table

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


def page_of(texts: list[str]) -> str:
    """Every place of a page that takes a text, each with one of its own."""
    a, b, c, d = texts
    step = {"job": a, "model": {"name": b, "sha256": c}, "options": {d: a}, "data": {a: {b: c}}, "quality": {b: 1.5}}
    parts = [
        section("Figures"), table((a, b), [(c, d)], sortable=True), lines({a: [1, 2], b: [2, 3]}, c, unit=d),
        panels({a: [(b, 1.0), (c, 2.0)], d: [(b, 2.0), (c, 1.0)]}), recipe([step]), loading({a: b}, [c]),
    ]  # fmt: skip
    report = {"job": a, b: [c, {"d": d}]}
    return document(
        a, heading(b, c, d), parts, {"report.json": as_json(report), "layers.csv": as_csv((a, b), [(c, d)])}
    )


@given(st.lists(HOSTILE, min_size=4, max_size=4))
def test_no_text_becomes_markup(texts: list[str]) -> None:
    """The elements of the page and their attributes are those of the same page of harmless texts."""
    harmless = [f"x{texts.index(text)}" for text in texts]
    got, want = Outline(page_of(texts)).elements, Outline(page_of(harmless)).elements
    assert got == want
    assert not any(name.startswith("on") or name == "style" for _, names in got for name in names)


def files_in(page: str) -> dict[str, str]:
    """As the script unpacks them."""
    (packed,) = re.findall(r'<script type="application/json" id="files">(.*?)</script>', page, re.DOTALL)
    return {f["name"]: gzip.decompress(base64.b64decode(f["data"])).decode() for f in json.loads(packed)}


@given(JSON)
def test_the_report_comes_out_of_its_page(report: Any) -> None:
    page = document("x", "", [], {"report.json": as_json(report)})
    assert json.loads(files_in(page)["report.json"]) == report


def test_what_is_no_number_is_null_in_a_download() -> None:
    assert json.loads(as_json({"a": [math.nan, math.inf, 1.5], "b": True})) == {"a": [None, None, 1.5], "b": True}


@given(st.lists(st.lists(WRITABLE, min_size=2, max_size=2)), st.lists(st.floats(allow_nan=False), max_size=3))
def test_a_table_comes_back_from_csv(rows: list[list[str]], numbers: list[float]) -> None:
    found = list(csv.reader(io.StringIO(as_csv(("a", "b"), [*rows, *((n, n) for n in numbers)]), newline="")))
    assert found[0] == ["a", "b"] and found[1 : len(rows) + 1] == rows
    assert [float(row[0]) for row in found[len(rows) + 1 :]] == numbers, "to the last digit"


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in found.split())]
        for found in re.findall(r'<polyline class="\w+" points="([^"]*)"/>', svg)
    ]


@example([1.7e308, -1.7e308], False)
@example([5e-324], True)
@example([5e-324, 0.0], False)
@given(st.lists(NUMBERS, min_size=1, max_size=500), st.booleans())
def test_what_is_drawn_is_finite_and_inside(values: list[float], logarithmic: bool) -> None:
    drawn = [p for line in points_of(lines({"a": values}, "a", logarithmic=logarithmic)) for p in line]
    usable = [v for v in values if abs(v) < 1e100 and (v > 1e-100 or not logarithmic)]
    assert bool(drawn) == bool(usable)
    assert all(0 <= x <= 240 and 0 <= y <= 132 for x, y in drawn)


def test_a_line_is_where_its_values_are() -> None:
    """Closed form: 0, 1, 4 on a straight axis and 1, 10, 100 on a logarithmic one."""
    (straight,) = points_of(lines({"a": [0, 1, 4]}, "a"))
    (bent,) = points_of(lines({"a": [1, 10, 100]}, "a", logarithmic=True))
    (x0, low), (x1, one), (x2, high) = straight
    assert x1 - x0 == x2 - x1 > 0 and (low - one) * 4 == pytest.approx(low - high, abs=0.5)
    assert bent[1][1] == pytest.approx((bent[0][1] + bent[2][1]) / 2, abs=0.06) and bent[0][1] > bent[2][1]


@given(st.floats(1e-12, 1e12), st.floats(1.0001, 1e6), st.booleans())
def test_ticks_are_few_round_and_within(low: float, times: float, logarithmic: bool) -> None:
    high = low * times
    found = ticks(low, high, logarithmic=logarithmic)
    assert 2 <= len(found) <= 7 and found == sorted(found) and all(low <= v <= high for v in found)


def test_layers_are_drawn_by_kind_and_experts_as_their_mean() -> None:
    layers = [(f"model.layers.{i}.mlp.{kind}", float(i + extra)) for i in range(3) for kind, extra in (("up", 0), ("down", 5))]  # fmt: skip  # noqa: E501
    found = panels({"error": layers})
    assert re.findall(r"<figcaption>(.*?)</figcaption>", found) == ["up", "down"]
    alike = panels({"error": [(name, 1.0) for name, _ in layers]})
    assert re.findall(r"<figcaption>(.*?)</figcaption>", alike) == ["up, down"]
    experts = [(f"m.{i}.moe.experts.{e}.w1", float(e * 2)) for i in range(2) for e in range(3)]
    assert "<desc>error from 2 to 2," in panels({"error": experts}) and "w1 (mean)" in panels({"error": experts})
    assert place("model.layers.12.mlp.up") == (12, "mlp.up") and place("head") == (None, "head")


def test_a_page_allows_itself_and_nothing_else() -> None:
    """The policy's hashes are those of the style and the script that are in the page."""
    page = document("x", "", [section("Figures")], {})
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    for what, tag in (("style-src", "style"), ("script-src", "script")):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{what} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and not re.search(r"https?://", page)
    assert '<a href="#figures">Figures</a>' in page


def test_a_recipe_that_lacks_everything_is_still_a_page() -> None:
    assert "None" in recipe([{}]) and "Not known" in recipe([])


def test_numbers() -> None:
    assert [format_number(v) for v in (None, 1234.6, 0.000123464)] == ["–", "1,235", "0.0001235"]

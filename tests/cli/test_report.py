"""Pages of real outputs, one of each kind of job, in a headless Chromium; and `parewell report` of one and of two."""

from __future__ import annotations

import csv
import html
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from click.testing import CliRunner

from calib import BadInput
from calib.report.charts import COLOR_ROLES
from calib.report.html import Verdict, format_number, plain_text, render_page
from cli.main import parewell
from compressor import Distill, Export, Quantize, distill, export, quantize
from compressor.report.quantization import quantized_page
from tests import browser
from tests.unlearn import conftest as sites
from tests.unlearn.test_unlearn import wanted as forgetting
from unlearn import Unlearn, unlearn

KINDS = ("quantize", "distill", "classify", "unlearn", "export")
SMALL = {"samples": 4, "held_out": 2, "length": 16}


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(parewell, [str(a) for a in arguments])
    if status:
        assert isinstance(result.exception, BadInput), result.output
        return str(result.exception)
    assert result.exit_code == 0, result.output
    return result.stdout


net, words, words_text = sites.net, sites.words, sites.words_text  # fixtures


@pytest.fixture(scope="module")
def outputs(
    tiny_folder: Path,
    bert: Path,
    text_file: Path,
    net: sites.Site,
    words: sites.Site,
    words_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with one output of each kind, one more quantized one, and pages of several."""
    folder = tmp_path_factory.mktemp("outputs")
    quantize(tiny_folder, folder / "quantize", Quantize(scheme="w4a16-channel", data=text_file, steps=3, block_steps=2, tune_steps=2, batch=2, **SMALL))  # fmt: skip  # noqa: E501
    quantize(tiny_folder, folder / "other", Quantize(scheme="w8a8", data=text_file, learn=False, **SMALL))
    quantize(tiny_folder, folder / "mixed", Quantize(scheme="w4a16-channel", data=text_file, learn=False, target_bits=3.5, profile_rows=1, halves=True, tied="untie", **SMALL))  # fmt: skip  # noqa: E501
    distill(tiny_folder, folder / "distill", Distill(layers=1, data=text_file, steps=4, batch=2, loss="0.5*ce+forward-kl", **SMALL))  # fmt: skip  # noqa: E501
    rows = (f"{'good' if i % 2 else 'bad'} w{i % 20}\t{'yes' if i % 2 else 'no'}\n" for i in range(40))
    (folder / "rows.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    distill(
        bert, folder / "classify",
        Distill(task="sequence-classification", layers=1, data=folder / "rows.tsv", held_out=8, steps=3, batch=4,
                length=16),
    )  # fmt: skip
    unlearn(
        net.model, folder / "unlearn",
        Unlearn(
            train=net.train, forget=net.forget, validation=net.validation, training=net.training, factory=net.factory,
            method="npo", audit=4, epochs=3, batch=16, lr=5e-3,
        ),
    )  # fmt: skip
    export(folder / "quantize", folder / "export", Export(held_out=2, data=text_file, length=16))
    unlearn(words.model, folder / "forgot", forgetting(words, "retrain"))
    run(
        "quantize",
        folder / "forgot",
        folder / "gated",
        "--scheme",
        "w8a16-channel",
        "--no-learn",
        "--data",
        words_text,
        "--samples",
        4,
        "--held-out",
        2,
        "--length",
        16,
    )
    (folder / "audit").mkdir()
    run("audit", folder / "forgot", "--original", words.model, "--oracle", folder / "forgot", "--train", words.train,
        "--forget", words.forget, "--length", 64, "--relearn", 8, "--html", folder / "audit/report.html")  # fmt: skip
    (folder / "both").mkdir()
    run("report", folder / "quantize", folder / "other", "--html", folder / "both/report.html")
    widths = [folder / f"w{bits}" for bits in (2, 4, 8)]
    for out in widths:
        quantize(tiny_folder, out, Quantize(scheme=f"{out.name}a16-channel", data=text_file, learn=False, **SMALL))
    (folder / "predict").mkdir()
    run("predict", *widths, "--kl", 0.1, "--html", folder / "predict/report.html")
    return folder


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    program = browser.find()
    if program is None:
        pytest.skip("no Chromium here, so pages are not looked at (apt-get install chromium)")
    with browser.started(program, tmp_path_factory.mktemp("profile")) as found:
        yield found


def page_of(tab: browser.Browser, outputs: Path, kind: str, width: int = 1200, scheme: str = "light") -> None:
    tab.size(width)
    tab.scheme(scheme)
    tab.open(outputs / kind / "report.html")


PAGES = pytest.mark.parametrize("kind", [*KINDS, "both", "mixed", "predict", "gated", "audit"])


@PAGES
def test_a_page_fetches_nothing_and_complains_of_nothing(kind: str, outputs: Path, tab: browser.Browser) -> None:
    page_of(tab, outputs, kind)
    tab.ask("new Promise(done => setTimeout(done, 50))")
    asked = {event["request"]["url"] for event in tab.seen("Network.requestWillBeSent")}
    assert asked <= {(outputs / kind / "report.html").as_uri(), "data:,"}
    for event in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
        assert tab.seen(event) == []
    assert tab.ask("document.querySelectorAll('.downloads button').length") >= 1, "the script was let run"
    assert tab.ask("getComputedStyle(document.querySelector('nav')).display") == "flex", "and the style"


@PAGES
def test_charts_are_drawn(kind: str, outputs: Path, tab: browser.Browser) -> None:
    page_of(tab, outputs, kind)
    tab.ask(UNFOLD)
    charts = tab.ask(
        "[...document.querySelectorAll('figure svg')].map(s => ({box: [s.getBoundingClientRect().width,"
        "s.getBoundingClientRect().height], said: s.getAttribute('role') + s.querySelector('title').textContent,"
        "axes: [...s.querySelectorAll('.axis')].map(t => t.textContent), words: [...s.querySelectorAll('text')]"
        ".map(t => t.getBBox()).map(b => [b.x, b.y, b.x + b.width, b.y + b.height]),"
        "points: [...s.querySelectorAll('polyline')].map(p => [...p.points].map(q => [q.x, q.y]))}))"
    )
    fewest = {"quantize": 23, "distill": 2, "classify": 1, "unlearn": 5, "export": 0, "both": 8, "mixed": 33,
              "predict": 1, "gated": 20, "audit": 12}  # fmt: skip
    assert len(charts) >= fewest[kind]
    for chart in charts:
        assert min(chart["box"]) > 80 and len(chart["said"]) > len("img")
        assert len(chart["axes"]) == 2, "an axis without a label"
        assert all(re.fullmatch(r".+ \(.+\)", text) for text in chart["axes"]), "a unit is missing"
        assert all(left >= 0 and right <= 240 for left, _, right, _ in chart["words"]), chart["axes"]
        for (a, b, c, d), (e, f, g, h) in itertools.combinations(chart["words"], 2):
            assert c <= e or g <= a or d - 2 <= f or h - 2 <= b, "labels overlap"
        assert chart["points"] and all(len(line) >= 2 for line in chart["points"])
        assert all(0 <= x <= 240 and 0 <= y <= 144 for line in chart["points"] for x, y in line)


LINEARS = "details table.sortable"
UNFOLD = "document.querySelectorAll('details').forEach(d => d.open = true)"


@pytest.mark.parametrize("column", [0, 1, 7])
def test_a_click_sorts_a_table(column: int, outputs: Path, tab: browser.Browser) -> None:
    """By text and by number, up and then down, with whole rows kept together."""
    page_of(tab, outputs, "quantize")
    tab.ask(UNFOLD)
    read = f"[...document.querySelectorAll('{LINEARS} tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    before = tab.ask(read)

    def natural(row: list[str]) -> object:
        words = re.split(r"(\d+)", row[0])
        return [int(w) if w.isdigit() else w for w in words] if column == 0 else float(row[column].replace(",", ""))

    states = f"[...document.querySelectorAll('{LINEARS} th[aria-sort]')].map(h => h.getAttribute('aria-sort'))"
    for turn, state in enumerate(("ascending", "descending")):
        tab.click(f"{LINEARS} th button", column)
        after = tab.ask(read)
        assert sorted(after) == sorted(before) and len({tuple(row) for row in after}) == len(before) == 14
        assert after == sorted(after, key=natural, reverse=turn == 1)
        assert tab.ask(states) == [state if i == column else "none" for i in range(8)]


def test_a_key_sorts_too(outputs: Path, tab: browser.Browser) -> None:
    page_of(tab, outputs, "quantize")
    tab.ask("document.querySelectorAll('table.sortable th button')[1].focus()")
    tab.press("Enter", 13, "\r")
    assert tab.ask("document.querySelectorAll('table.sortable th')[1].getAttribute('aria-sort')") == "ascending"


def test_what_is_no_number_stays_last(outputs: Path, tab: browser.Browser, tmp_path: Path) -> None:
    rows = [("a", "–", "z"), ("b", "1,200", "x"), ("c", "-3", "y"), ("d", "2e-03", "w"), ("e", "55.5%", "v")]
    (tmp_path / "table.html").write_text(
        "{% extends 'page.html' %}{% import 'parts.html' as part %}"
        "{% block main %}{{ part.table(['', 'n', 'text'], rows, sortable=true) }}{% endblock %}"
    )
    page = render_page(tmp_path / "table.html", title="x", verdict=Verdict("good", "", ""), files={}, rows=rows)
    (tmp_path / "page.html").write_text(page)
    tab.open(tmp_path / "page.html")
    for column, wanted in ((1, "cdeba"), (1, "bedca"), (2, "edbca")):
        tab.click("th button", column)
        assert tab.ask("[...document.querySelectorAll('tbody th')].map(c => c.textContent).join('')") == wanted


@PAGES
def test_downloads_are_the_report(kind: str, outputs: Path, tab: browser.Browser, tmp_path: Path) -> None:
    page_of(tab, outputs, kind)
    names = tab.ask("[...document.querySelectorAll('.downloads button')].map(b => b.textContent)")
    assert names[0] == {"both": "comparison.json", "predict": "prediction.json"}.get(kind, "report.json")
    found = json.loads(tab.download(".downloads button", 0, tmp_path).read_text())
    if kind == "both":
        reports = [json.loads((outputs / name / "report.json").read_text()) for name in ("quantize", "other")]
        assert found["reports"] == reports and len(names) == 2
        errors = {layer["name"]: layer["output_error"] for layer in reports[1]["layers"]}
    elif kind == "predict":
        assert [one["name"] for one in found["outputs"]] == ["w2", "w4", "w8"] and names[1:] == ["outputs.csv"]
        return
    elif kind == "audit":
        assert names[1:] == ["known.csv", "codes.csv", "relearning.csv"]
        with tab.download(".downloads button", 1, tmp_path).open(newline="") as file:
            nats = {(row["form"], row["model"]): float(row["forget: nats per token"]) for row in csv.DictReader(file)}
        assert nats == {
            (f, m): of["forget"]["nats"] for f, models in found["table"].items() for m, of in models.items()
        }
        return
    else:
        assert found == json.loads((outputs / kind / "report.json").read_text())
        errors = {layer["name"]: layer["output_error"] for layer in found.get("layers", [])}
    assert ("linears.csv" in names) == bool(errors) and ("groups.csv" in names) == (kind == "mixed")
    if errors:
        with tab.download(".downloads button", 1, tmp_path).open(newline="") as file:
            head, *rows = csv.reader(file)
        column = head.index("other" if kind == "both" else "error")
        assert {row[0]: float(row[column]) for row in rows} == errors


CONTRAST = """
(() => {
  const light = (c) => {
    const [r, g, b] = c.match(/[\\d.]+/g).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (c !== "rgba(0, 0, 0, 0)") return c;
    }
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    if (["SCRIPT", "STYLE", "title", "desc"].includes(e.tagName)) continue;  // not painted
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    const [a, b] = [light(getComputedStyle(e)[e instanceof SVGElement ? "fill" : "color"]), light(behind(e))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName + ": " + e.textContent.slice(0, 40)]);
  }
  return found.sort((a, b) => a[0] - b[0]);
})()
"""


@PAGES
def test_text_can_be_read_in_light_and_dark(kind: str, outputs: Path, tab: browser.Browser) -> None:
    papers = []
    for scheme in ("light", "dark"):
        page_of(tab, outputs, kind, scheme=scheme)
        tab.ask(UNFOLD)
        contrasts = tab.ask(CONTRAST)
        assert len(contrasts) > 20 and contrasts[0][0] >= 4.5, contrasts[0]
        papers.append(tab.ask("getComputedStyle(document.body).backgroundColor"))
    assert papers[0] != papers[1]


@PAGES
def test_a_phone_scrolls_down_only(kind: str, outputs: Path, tab: browser.Browser) -> None:
    page_of(tab, outputs, kind, width=360)
    tab.ask(UNFOLD)
    assert tab.ask("[innerWidth, document.documentElement.scrollWidth, document.body.scrollWidth]") == [360, 360, 360]
    if kind in ("quantize", "unlearn"):
        boxes = "[...document.querySelectorAll('.scroll')].some(b => b.scrollWidth > b.clientWidth)"
        assert tab.ask(boxes), "wide tables scroll in their boxes"


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_says_what_the_folder_is(kind: str, outputs: Path, tmp_path: Path) -> None:
    """Every job's own page is that of `parewell report`; it has the chain and the lines that load it."""
    run("report", outputs / kind, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page == (outputs / kind / "report.html").read_text()
    step = json.loads((outputs / kind / "parewell.json").read_text())["recipe"][-1]
    assert f"<strong>{step['job']}</strong> of {step['model']['name']}" in page
    for name, value in step["options"].items():
        assert value is None or f"<dt>{name.replace('_', ' ')}</dt><dd>{plain_text(value)}" in page
    wanted = {
        "quantize": ("parewell import load", "AutoModelForCausalLM", "vllm serve"),
        "distill": ("parewell import load", "AutoModelForCausalLM", "vllm serve"),
        "classify": ("AutoModelForSequenceClassification",),
        "unlearn": ("load_state_dict",),
        "export": ("parewell import load", "AutoModelForCausalLM", "vllm serve"),
    }
    assert all(line in page for line in wanted[kind])
    assert "megabytes of weights" in page and ("Loss of every step" in page) == (kind != "export")


def test_a_page_of_thirty_blocks_is_small(outputs: Path) -> None:
    """Of as many digits as real figures have."""
    report = json.loads((outputs / "quantize/report.json").read_text())
    draw = random.Random(0)

    def other(value: Any, times: float) -> Any:
        if isinstance(value, dict):
            return {name: other(v, times) for name, v in value.items()}
        if isinstance(value, list):
            return [other(v, times) for v in value]
        digits = len(re.sub(r"\D", "", repr(value)).strip("0"))
        return float(f"{times * value:.{max(digits, 4)}g}") if type(value) is float else value

    layers = [layer for layer in report["layers"] if ".0." in layer["name"]]
    report["layers"] = [
        other(layer, times) | {"name": layer["name"].replace(".0.", f".{i}.")}
        for i, times in enumerate(draw.uniform(0.5, 1) for _ in range(30))
        for layer in layers
    ]
    report["curves"] = {name: [draw.random() for _ in range(100)] for name in ("learn", "tune")}
    steps = json.loads((outputs / "quantize/parewell.json").read_text())["recipe"]
    page = quantized_page(report, steps)
    assert len(report["layers"]) == 210 and len(page.encode()) < 150_000
    open_to_all = re.sub(r"<details.*?</details>", "", page, flags=re.DOTALL)
    (blocks,) = re.findall(r"<tbody>(.*?)</tbody>", open_to_all.partition('<h2 id="blocks">')[2], re.DOTALL)
    numbers = re.findall(r'<tr><th scope="row" class="words">(\d+)</th>', blocks)
    assert numbers == [str(i) for i in range(30)] and open_to_all.count("<figure>") == 6, "one row a block"
    means = [fmean(x["output_error"] for x in report["layers"] if f".{i}." in x["name"]) for i in range(30)]
    assert re.findall(r"</th><td>([^<]*)<td>", blocks) == [format_number(mean) for mean in means]


@pytest.mark.parametrize("kind", KINDS)
def test_lines_on_the_page_load_the_folder(kind: str, outputs: Path, net: sites.Site) -> None:
    """All but vLLM's, which is not here."""
    page = (outputs / kind / "report.html").read_text()
    snippets = [html.unescape(s) for s in re.findall(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL)]
    ran = 0
    for snippet in snippets:
        if "vllm" not in snippet:
            here = {"module": sites.make()}
            exec(snippet.replace('"OUT', f'"{outputs / kind}'), here)
            assert kind == "unlearn" or sum(p.numel() for p in here["model"].parameters()) > 0
            ran += 1
    assert ran == {"quantize": 2, "distill": 2, "classify": 1, "unlearn": 1, "export": 2}[kind]


def test_two_outputs_side_by_side(outputs: Path, tmp_path: Path) -> None:
    a, b = (json.loads((outputs / name / "report.json").read_text()) for name in ("quantize", "other"))
    said = json.loads(run("report", outputs / "quantize", outputs / "other", "--json"))
    assert said["reports"] == [a, b] and said["names"] == ["quantize", "other"] and not said["notes"]
    assert said["figures"]["perplexity, held-out"] == [a["quality"]["perplexity"], b["quality"]["perplexity"]]
    assert said["figures"]["megabytes of weights"] == [a["bytes"]["after"] / 1e6, b["bytes"]["after"] / 1e6]
    assert said["layers"] == {x["name"]: [x["output_error"], y["output_error"]] for x, y in zip(a["layers"], b["layers"], strict=True)}  # fmt: skip  # noqa: E501
    text = run("report", outputs / "quantize", outputs / "other")
    difference = b["quality"]["perplexity"] - a["quality"]["perplexity"]
    assert f"{difference:+,.4g}" in text and "mlp.down_proj" in text


def test_outputs_of_two_kinds_share_what_they_share(outputs: Path) -> None:
    said = json.loads(run("report", outputs / "quantize", outputs / "distill", "--json"))
    assert "bits per byte" in said["figures"] and "parameters" not in said["figures"] and not said["layers"]
    said = json.loads(run("report", outputs / "classify", outputs / "unlearn", "--json"))
    assert list(said["figures"]) == ["megabytes of weights"] and not said["notes"]


def test_rows_that_are_not_the_same_are_minded(
    outputs: Path, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    options = Quantize(scheme="w4a16-channel", data=text_file, learn=False, **SMALL | {"held_out": 1})
    quantize(tiny_folder, tmp_path / "out", options)
    assert "different rows (held-out)" in " ".join(run("report", outputs / "other", tmp_path / "out").split())


def old(outputs: Path, kind: str, folder: Path, *without: str) -> Path:
    """An output whose report was written before some keys were."""
    folder.mkdir()
    report = json.loads((outputs / kind / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({k: v for k, v in report.items() if k not in without}))
    return folder


def test_old_reports_are_shown_without_what_they_lack(outputs: Path, tmp_path: Path) -> None:
    for kind, lacking in (("classify", ("bytes",)), ("unlearn", ("bytes", "curves")), ("quantize", ("left_out",))):
        run("report", old(outputs, kind, tmp_path / kind, *lacking), "--html", tmp_path / f"{kind}.html")
        assert "without its parewell.json" in (tmp_path / f"{kind}.html").read_text()
    said = run("report", tmp_path / "classify", tmp_path / "unlearn", status=2)
    assert "share nothing" in said and "\n" not in said
    assert "is not as parewell writes it" in run("report", old(outputs, "quantize", tmp_path / "q", "bytes"), status=2)


@pytest.mark.parametrize("html", ["nowhere/page.html", "."])
def test_a_page_that_cannot_be_written_is_refused(html: str, outputs: Path, tmp_path: Path) -> None:
    assert "cannot be a file" in run("report", outputs / "quantize", "--html", tmp_path / html, status=2)


def test_a_recipe_that_is_none_is_refused(outputs: Path, tmp_path: Path) -> None:
    folder = old(outputs, "quantize", tmp_path / "out")
    (folder / "parewell.json").write_text('{"recipe": 3}')
    assert "no recipe of parewell's" in run("report", folder, status=2)


def test_pages_say_what_was_recovered(outputs: Path) -> None:
    """A gate's figures on the page of what it let pass, an audit's verdict on its own."""
    report, page = json.loads((outputs / "gated/report.json").read_text()), (outputs / "gated/report.html").read_text()
    (found,) = report["recovery"]["unlearnings"]
    assert "Recovered after quantization" in page and "at most 10% may recover" in page
    assert '<th scope="col">now</th><th scope="col">recovered</th>' in page
    assert f"<td>{found['known']['quantized']['probability']:,.4g}" in page and len(found["back"]) >= 2
    assert "Recovered after quantization" not in (outputs / "quantize/report.html").read_text()
    page = (outputs / "audit/report.html").read_text()
    assert "0% is an oracle (retrained without the forget set)" in page and "<strong>unlearn</strong> of model" in page


@PAGES
def test_a_line_has_the_color_of_what_it_is(kind: str, outputs: Path) -> None:
    """Every line has one of the roles, and a legend's word has one role on all pages."""
    page = (outputs / kind / "report.html").read_text()
    assert set(re.findall(r'<polyline class="(\w*)"', page)) <= COLOR_ROLES.keys()
    fixed = {"before": "before", "after": "after", "error": "error", "original": "before", "unlearned": "after",
             "oracle": "reference", "oracles": "reference", "as allocated": "after", "fit": "reference"}  # fmt: skip
    for role, word in re.findall(r'<polyline class="(\w+)" points="1,4 27,4"/></svg>([^<]*)</span>', page):
        assert fixed.get(word, role) == role
    legends = re.findall(r'<p class="legend">(.*?)</p>\s*<div class="figures">(.*?)</div>', page, re.DOTALL)
    assert len(legends) == page.count('class="legend"')
    for legend, figures in legends:
        roles = [set(re.findall(r'<polyline class="(\w+)"', of)) for of in (legend, figures)]
        assert roles[0] == roles[1], "a legend names the lines of its charts"
    assert not re.search(r"[^\d]-0(\.0+)?%", page)


def test_old_words_are_gone_from_pages(outputs: Path) -> None:
    for kind in (*KINDS, "mixed", "gated", "audit", "both", "predict"):
        text = re.sub(r"<(style|script).*?</\1>", "", (outputs / kind / "report.html").read_text(), flags=re.DOTALL)
        for words in ("never saw", "came back", "comes back", "what was forgotten", "shared out", "known again"):
            assert words not in text.lower(), f"{kind}: {words}"


def test_what_was_exported_beside_what_was_quantized(outputs: Path) -> None:
    said = json.loads(run("report", outputs / "quantize", outputs / "export", "--json"))
    assert {"perplexity, held-out", "megabytes of weights"} <= said["figures"].keys() and not said["layers"]

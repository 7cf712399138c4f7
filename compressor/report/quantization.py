"""The page of a quantization: figures, then one row a block, with its linears folded in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from calib.report.charts import (
    AFTER,
    BEFORE,
    BLOCK,
    ERROR,
    Axis,
    Chart,
    Line,
    chart,
    chart_by_block,
    charts_by_kind,
    split_name,
)
from calib.report.figures import distance
from calib.report.html import (
    Report,
    Steps,
    Table,
    as_csv,
    as_json,
    changed_row,
    format_number,
    loss_charts,
    render_page,
)
from compressor.report.common import page_data, quantized_lines, tell_apart_rows
from compressor.report.verdict import quantized_verdict

WHEN = {"before": BEFORE, "after": AFTER}
# What is shown of blocks and of linears beside the error, before and after: a column's title, its axis, whether that is
# logarithmic and what it spans.
_QSUR = Axis("QSUR", "share of the most possible")
_MEASURES: dict[str, tuple[Axis, bool, tuple[float, float] | None]] = {
    "QSUR of inputs": (_QSUR, False, (0, 1)),
    "QSUR of weights": (_QSUR, False, (0, 1)),
    "range of input channels": (Axis("range", "largest / median channel"), True, None),
}
_ERROR = Axis("relative output error", "ratio")
LINEAR_HEAD = ("linear", "error", *(f"{name}, {when}" for name in _MEASURES for when in WHEN))
BLOCK_HEAD = ("block", "error, mean", "error, largest", *LINEAR_HEAD[2:])


def quantized_page(report: Report, steps: Steps = ()) -> str:
    """Render the page of a quantization's report; `steps` are its recipe's."""
    linears = linear_rows(report)
    data = page_data(report, steps, "quantized")
    data["warnings"] += [unreached_phrase(report)] if unreached(report) else []
    data["notes"] += [
        *table_phrases(report),
        *(f"Left out: {name.replace('_', ' ')}, as {why}" for name, why in report.get("left_out", {}).items()),
    ]
    files = {"report.json": as_json(report), "linears.csv": as_csv(LINEAR_HEAD, linears)}
    allocation = None
    if (precision := report.get("precision")) is not None:
        allocation = _allocation(report, precision)
        files["groups.csv"] = as_csv(*allocation["table"])
    return render_page(
        Path(__file__).parent / "templates/quantization.html", title=f"parewell: {report['scheme']}",
        heading=f"Quantized to {report['scheme']}", verdict=quantized_verdict(report), files=files,
        figures=_figures(report), blocks=(BLOCK_HEAD, _block_rows(linears)), block_charts=_block_charts(linears),
        linears=(LINEAR_HEAD, linears), linear_charts=_linear_charts(report["layers"], linears),
        qsur_fell=qsur_phrase(report), published=published_qsur_phrase(report), allocation=allocation,
        lines_of=quantized_lines(report["loaders"]),
        samples=sample_size_phrase(report["samples"]) if "samples" in report else None,
        tell_apart=_searched_bits(report["tell_apart"]) if "tell_apart" in report else None,
        like=_compared_texts(report["like"]) if "like" in report else None,
        curves=loss_charts(report["curves"], Axis("loss", "nats per token")), **data,
    )  # fmt: skip


def _figures(report: Report) -> Table:
    quality, size = report["quality"], report["bytes"]
    nearest = report["quality_by_stage"].get("nearest")
    if "cosine" in quality:
        return ("", "before", "after", "change"), [
            (f"mean cosine with the float model's embeddings ({quality['pooling']})", 1, quality["cosine"], ""),
            *([("the same, rounded to nearest", 1, nearest["cosine"], "")] if nearest else []),
            ("least cosine of a text", 1, quality["least_cosine"], ""),
            ("rank correlation of the cosines of pairs of texts", 1, quality["rank_correlation"], ""),
            changed_row("megabytes of weights", size["before"] / 1e6, size["after"] / 1e6),
        ]
    return ("", "before", "after", "change"), [
        changed_row("perplexity, held-out", quality["reference_perplexity"], quality["perplexity"]),
        changed_row("bits per byte", quality["reference_bits_per_byte"], quality["bits_per_byte"]),
        ("mean KL from the float model, nats", 0, quality["kl"], ""),
        *([("the same, rounded to nearest", 0, nearest["kl"], "")] if nearest else []),
        ("same most likely token", "100%", f"{quality['top1_agreement']:.1%}", ""),
        *((*row, "") for row in tell_apart_rows(quality)),
        changed_row("megabytes of weights", size["before"] / 1e6, size["after"] / 1e6),
    ]


def linear_rows(report: Report) -> list[tuple[Any, ...]]:
    """Rows of the table of linears, with the columns of LINEAR_HEAD."""
    return [
        (
            layer["name"],
            layer["output_error"],
            *(layer[when][what]["ratio"] for what in ("activations", "weights") for when in WHEN),
            *(_outlier(layer[when]["activations"]["channel_range"]) for when in WHEN),
        )
        for layer in report["layers"]
    ]


def _block_rows(linears: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """As BLOCK_HEAD names them: means over a block's linears, and its largest error."""
    by_block: dict[str, list[tuple[Any, ...]]] = {}
    for row in linears:
        block = split_name(row[0])[0]
        by_block.setdefault("others" if block is None else str(block), []).append(row[1:])
    return [
        (block, _mean(rows, 0), max((row[0] for row in rows if row[0] is not None), default=None),
         *(_mean(rows, i) for i in range(1, len(rows[0]))))
        for block, rows in by_block.items()
    ]  # fmt: skip


def _mean(rows: Iterable[Sequence[float | None]], column: int) -> float | None:
    known = [value for row in rows if (value := row[column]) is not None]
    return fmean(known) if known else None


def _column(rows: Iterable[tuple[Any, ...]], i: int) -> list[tuple[str, float]]:
    return [(row[0], row[i]) for row in rows if row[i] is not None]


def _before_after(linears: Sequence[tuple[Any, ...]], measure: str) -> dict[Line, list[tuple[str, float]]]:
    return {line: _column(linears, LINEAR_HEAD.index(f"{measure}, {when}")) for when, line in WHEN.items()}


def _block_charts(linears: Sequence[tuple[Any, ...]]) -> list[Chart]:
    """One panel a measure, of means over the linears of each block."""
    panels = [chart_by_block({ERROR: _column(linears, 1)}, "Output error", _ERROR, logarithmic=True)]
    for measure, (axis, logarithmic, span) in _MEASURES.items():
        title = f"{measure[:1].upper()}{measure[1:]}"
        panels.append(chart_by_block(_before_after(linears, measure), title, axis, logarithmic=logarithmic, span=span))
    return [panel for panel in panels if panel.lines]


def _linear_charts(layers: Sequence[Mapping[str, Any]], linears: Sequence[tuple[Any, ...]]) -> dict[str, list[Chart]]:
    """By measure, one panel a kind of linear; and all channels of the one whose largest stood out most."""
    found = {"Output error": charts_by_kind({ERROR: _column(linears, 1)}, y=_ERROR, logarithmic=True)}
    for measure, (y, logarithmic, span) in _MEASURES.items():
        title = f"{measure[:1].upper()}{measure[1:]}"
        found[title] = charts_by_kind(_before_after(linears, measure), y=y, logarithmic=logarithmic, span=span)
    worst = layers[max(range(len(layers)), key=lambda i: linears[i][-2])]
    ranges = {line: worst[when]["activations"]["channel_range"] for when, line in WHEN.items()}
    last = max(len(of) - 1 for of in ranges.values()) or 1
    found["Input channels of the linear whose largest channel stands out most"] = [
        chart(ranges, worst["name"], x=Axis("channels", "percent below"), y=Axis("range", "units of the input"),
              at=[100 * i / last for i in range(last + 1)], logarithmic=True)
    ]  # fmt: skip
    return found


def published_qsur_phrase(report: Report) -> str | None:
    """QSUR as the paper computes it beside ours, mean over linears; None where a report does not have it."""
    words = list[str]()
    for what, of in (("activations", "inputs"), ("weights", "weights")):
        means = [
            [_mean([[layer[when][what].get(name)] for layer in report["layers"]], 0) for when in WHEN]
            for name in ("qsur", "published")
        ]
        if any(mean is None for pair in means for mean in pair):
            return None
        exact, published = (" to ".join(f"{mean:.3f}" for mean in pair) for pair in means)
        words.append(f"of {of} from {published} (exact {exact})")
    return (
        "QSUR as OSTQuant's equations 3-7 have it, d-th root, mean over linears, went "
        f"{' and '.join(words)}: it takes the cube from the longest principal axis alone, which flatters."
    )


def qsur_phrase(report: Report) -> str | None:
    """Why QSUR may fall although the error falls, where both do on average."""
    nearest = report["quality_by_stage"].get("nearest")
    before, after = (
        [layer[when][what]["ratio"] for layer in report["layers"] for what in ("activations", "weights")]
        for when in WHEN
    )
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
    fell = bool(pairs) and fmean(a for _, a in pairs) < fmean(b for b, _ in pairs) - 0.005
    if not fell or nearest is None or distance(report["quality"]) >= distance(nearest):
        return None
    return (
        "QSUR fell on average although the model is nearer to the float one than rounded to nearest: it takes values "
        "for normally distributed and weighs every direction alike, without regard to groups or to what rounding does. "
        "Transforms and GPTQ lower the error of the model's answers, to which few directions matter"
    )


def unreached(report: Report) -> int:
    """Experts that no calibration token was routed to."""
    return int(report.get("experts", {}).get("unreached", 0))


def unreached_phrase(report: Report) -> str:
    """Explain what it means that calibration tokens did not reach some experts, and what to do."""
    return (
        f"No calibration token reached {unreached(report):,} of {report['experts']['all']:,} experts: nothing was "
        "measured of these, and they were rounded without regard to what they will read. Take more rows (--samples), "
        "or text that is more like your own (--data)."
    )


def table_phrases(report: Report) -> list[str]:
    """Say how embedding and head were rounded, and what they weigh beside what they might."""
    rounded = report.get("tables", {}).items()
    found = [f"{role.capitalize()}: {of['scheme']}, relative error {of['error']:.1e}." for role, of in rounded]
    if "parts" in report:
        found.append(sizes_phrase(report["parts"], report["choices"]))
    return [*found, untied_phrase(report)] if report["untied"] else found


def sizes_phrase(parts: Mapping[str, int], choices: Mapping[str, int]) -> str:
    """Say what share of the weights embedding and head are, and what other options would make of all of them.

    Args:
        parts: bytes of each part of the output's weights.
        choices: bytes of all of them, by options.
    """
    tables, whole = parts["embedding"] + parts["head"], max(1, sum(parts.values()))
    others = ", ".join(f"{format_number(size / 1e6)} MB with {words}" for words, size in choices.items())
    weight = f"{format_number(tables / 1e6)} MB of {format_number(whole / 1e6)} ({tables / whole:.0%})"
    share = f"Embedding and head are {weight}"
    return f"{share}; weights would be {others}." if others else f"{share}."


def untied_phrase(report: Report) -> str:
    """Explain what it costs that embedding and head became two tables, and how to keep one."""
    if "head" in report.get("tables", {}):
        return (
            "Embedding and head were one tensor and are two now, as the head has codes of its own. --tied keep with "
            "--embedding and without --lm-head rounds one for both."
        )
    size = f" ({format_number(report['untied_bytes'] / 1e6)} MB more)" if report.get("untied_bytes") else ""
    return (
        f"Embedding and head were one tensor and are two now{size}: only the head takes the final norm's gain. "
        "--tied keep keeps one and leaves out the rotation of the residual stream."
    )


def _allocation(report: Report, precision: Report) -> dict[str, Any]:
    """How bits were allocated to groups of linears, and what other budgets would cost."""
    groups = precision["parts"]
    names = [group["linears"][0] for group in groups]
    widths = list(groups[0]["kl"])
    allocated = Line(AFTER.role, "as allocated")
    spent = [float(group.get("bits_per_weight", group["bits"])) for group in groups]
    bits = {allocated: list(zip(names, spent, strict=True))}
    chosen = [group["kl"][str(group["bits"])] for group in groups]
    kl = {
        Line("reference", _width(widths[0])): [(n, g["kl"][widths[0]]) for n, g in zip(names, groups, strict=True)],
        allocated: list(zip(names, chosen, strict=True)),
    }
    bits_axis, kl_axis = Axis("width", "bits per weight"), Axis("KL", "nats per token")
    rows = [
        (name, group["weights"], group.get("type", group["bits"]), *(group["kl"][w] for w in widths),
         group["wasserstein"].get(str(group["bits"])))
        for name, group in zip(names, groups, strict=True)
    ]  # fmt: skip
    alike = {f"{width:.2f}": loss for width, loss in precision["uniform"]}
    budgets = [(f"{bits:.2f}", loss, alike.get(f"{bits:.2f}", "")) for bits, loss in precision["frontier"]]
    return {
        **{name: precision[name] for name in ("mean_bits", "target_bits", "tokens")},
        "alone": "type" in groups[0],
        "charts": [
            chart_by_block(bits, "Bits, mean of a block's groups", bits_axis),
            chart_by_block(kl, "KL when one group alone is rounded, mean", kl_axis, logarithmic=True),
        ],
        "group_charts": {
            "Bits": charts_by_kind(bits, y=bits_axis),
            "KL when that group alone is rounded": charts_by_kind(kl, y=kl_axis, logarithmic=True),
        },
        "table": (["group", "weights", "bits", *(f"KL, {_width(w)}" for w in widths), "W1"], rows),
        "budgets": (("mean bits", "sum of KL in nats, allocated", "same bits everywhere"), budgets),
        "law": None if precision["law"] is None else law_phrase(precision["law"]),
        "profile": profile_phrase(precision),
        "limit": limit_phrase(report),
        "limit_charts": _limit_charts(precision),
    }


def profile_phrase(precision: Report) -> str:
    """Say where what each group costs is known from, and how well that was predicted."""
    about = precision.get("profile", {"method": "measured"})  # which old reports do not have
    if about["method"] == "sensitivity":
        return (
            "What each group costs was predicted from one backward pass (K-FAC); the sum at the bits that were "
            f"allocated, {about['predicted']:.3g} nats, was measured as {about['measured']:.3g} with all rounded "
            "together, by which every figure is scaled."
        )
    phrase = "What each group costs was measured, each rounded alone"
    if about.get("why"):
        phrase += f", as {about['why']}"
    if ranks := about.get("rank_correlation"):
        each = ", ".join(f"{rank:.2f} at {_width(bits)}" for bits, rank in ranks.items())
        phrase += (
            f". One backward pass predicts the same order with a rank correlation of {each}, and in sum "
            f"{about['predicted']:.3g} where {about['measured']:.3g} nats were measured"
        )
    return f"{phrase}."


def limit_phrase(report: Report) -> str | None:
    """Bits used beside those that any Gaussian code needs at the KL that was reached, and what that bounds; None where
    it was not asked for."""
    limit = report.get("precision", {}).get("profile", {}).get("limit")
    if limit is None:
        return None
    kl, bits, used = report["quality"]["kl"], limit["bits"], report["precision"]["mean_bits"]
    needed = "is beyond what the curve covers" if bits is None else f"takes any Gaussian code {bits:.2f} bits a weight"
    scales = "scales included" if "type" in report["precision"]["parts"][0] else "scales not counted"
    return (
        f"The KL that was reached, {kl:.3g} nats, {needed}; {used:.2f} are used, {scales}. That bounds codes "
        "of weights as if they were Gaussian, those of a linear all of one variance, and of a KL as if it were "
        f"quadratic with the curvature (K-FAC) seen on {limit['tokens']:,} tokens: not every code; with fewer tokens "
        "than a linear has inputs or outputs curvature goes unseen and the figure is too low."
    )


def _limit_charts(precision: Report) -> list[Chart]:
    """Fewest bits against KL."""
    limit = precision.get("profile", {}).get("limit")
    if limit is None:
        return []
    bits, kl = [point[1] for point in limit["curve"]][::-1], [point[0] for point in limit["curve"]][::-1]
    line, bits_axis = Line("reference", "any Gaussian code"), Axis("bits", "per weight, at least")
    return [chart({line: kl}, "KL at the fewest bits", x=bits_axis, y=Axis("KL", "nats per token"), at=bits,
                  logarithmic=True)]  # fmt: skip


def law_phrase(law: Report) -> str:
    """How the KL falls with bits, and what some KL need."""
    needed = [
        f"KL {loss} nats needs {_bits(low)} bits (95% CI {_bits(least)} to {_bits(most)})"
        for loss, (low, least, most) in law["bits"].items()
    ]
    slope = f"{law['exponent']:.2f} ± {law['exponent_error']:.2f}"
    return f"Fit, all linears in the same bits: KL ∝ 2^(-k·bits), k = {slope}; {'; '.join(needed)}."


def _width(width: str) -> str:
    """A key of what each group costs, in words: bits of a code, or a block type."""
    return f"{width} bits" if width.isdecimal() else width


def _bits(value: float | None) -> str:
    return "no end" if value is None else f"{value:.1f}"


def sample_size_phrase(samples: Report) -> str:
    """Whether more calibration rows would help."""
    change, win = (f"{samples[of]:.2g} ± {samples[f'{of}_error']:.1g}" for of in ("change", "win"))
    sentence = (
        f"Half of the calibration rows cost {change} nats; twice as many would win back {win}, if the loss falls as "
        "L + c / n."
    )
    if samples.get("tell_apart") is not None:
        before, after = (f"{samples[name]:.1%}" for name in ("tell_apart", "tell_apart_twice"))
        sentence += f" That would take the tell-apart rate from {before} to {after}."
    if not samples["parameters"]:
        return sentence
    more = ", more than the loss itself: few steps from a good start do not fit that many"
    return (
        f"{sentence} Theory says p / 2n for half of the rows: {samples['risk']:.2g} nats for {samples['parameters']:,} "
        f"parameters and {samples['tokens']:,} tokens, codes not counted"
        f"{more if samples['risk'] > samples['whole'] else ''}."
    )


def cheapest_bits_phrase(found: Report) -> str:
    """The tell-apart rate that was asked for, the one that was reached, and what a step cheaper gives."""
    error = "" if found["error"] is None else f" ± {found['error']:.2%}"
    below = [one for one in found["tried"] if one["whole"] and one["target_bits"] < found["target_bits"]]
    cheaper = max(below, key=lambda one: one["target_bits"], default=None)
    beside = "the fewest there were to choose from" if cheaper is None else (
        f"the next fewer, {cheaper['mean_bits']:.3g}, give {cheaper['rate']:.2%}"
    )  # fmt: skip
    return (
        f"A tell-apart rate of {100 * found['asked']:.4g}% was asked for: {found['mean_bits']:.3g} bits on average "
        f"give {found['rate']:.2%}{error} on the held-out rows; {beside}. It is measured there, and not "
        "promised elsewhere."
    )


def _searched_bits(found: Report) -> dict[str, Any]:
    """What was tried for a tell-apart rate, by bits."""
    tried = sorted(found["tried"], key=lambda one: (one["target_bits"], one["whole"]))
    learned = any(not one["whole"] for one in tried)
    rows = [
        (f"{one['mean_bits']:.3g}", f"{one['rate']:.2%}", "" if one["error"] is None else f"{one['error']:.2%}",
         "yes" if one["rate"] <= found["asked"] else "no", "in full" if one["whole"] else "without learning")
        for one in tried
    ]  # fmt: skip
    head = ("mean bits", "tell-apart rate", "standard error", "keeps it", "made")
    keep = slice(None) if learned else slice(4)
    return {"phrase": cheapest_bits_phrase(found), "table": (head[keep], [row[keep] for row in rows])}


SURELY = 0.01  # chance below which a difference of two texts is taken to be one


def text_shift_phrase(like: Report) -> str:
    """Say at which block text like deployment differs most from the calibration rows, whether that is beyond chance,
    and what to do."""
    worst = max(like["blocks"], key=lambda one: math.inf if one["kl"] is None else one["kl"])
    nats, dealt = ("without bound" if worst[name] is None else f"{worst[name]:.3g} nats" for name in ("kl", "kl_dealt"))
    sure = like["chance"] <= SURELY
    advice = (
        f"take calibration rows like these (--data {like['source']})"
        if sure
        else "the calibration rows are as good as rows of this text, as far as this many tell"
    )
    return (
        f"Text like deployment ({like['source']}, {like['tokens'][1]:,} tokens) differs most from the calibration rows "
        f"at {worst['block']}: KL {nats} in {worst['components']} principal components, where rows dealt to both at "
        f"random give {dealt}: {'' if sure else 'not '}beyond chance (p = {like['chance']:.2g}). "
        f"{worst['beyond_range']:.0%} of its channels leave the calibration's range "
        f"({worst['beyond_range_dealt']:.0%} by chance). So {advice}."
    )


def _compared_texts(like: Report) -> dict[str, Any]:
    """How text like deployment differs from the calibration rows, by block."""
    blocks, rows = like["blocks"], "rows dealt at random"
    found, by_chance = Line("error", "the two texts"), Line("reference", rows)

    def panel(title: str, name: str, y: Axis, **options: Any) -> Chart:
        lines = {line: [math.nan if (v := one[key]) is None else v for one in blocks]
                 for line, key in ((found, name), (by_chance, f"{name}_dealt"))}  # fmt: skip
        return chart(lines, title, x=BLOCK, y=y, **options)

    columns = {
        "block": "block", "KL, nats": "kl", f"{rows}: mean": "kl_dealt", "95th percentile": "kl_dealt_95",
        "independent Gaussian states": "kl_independent", "W1": "wasserstein", f"W1, {rows}": "wasserstein_dealt",
        "channels beyond the range": "beyond_range", f"the same, {rows}": "beyond_range_dealt",
    }  # fmt: skip
    return {
        "phrase": text_shift_phrase(like),
        "rows": like["rows"], "tokens": like["tokens"], "components": blocks[0]["components"],
        "charts": [
            panel("KL of hidden states", "kl", Axis("KL", "nats"), logarithmic=True),
            panel("W1, sliced", "wasserstein", Axis("W1", "standard deviations")),
            panel("Channels beyond the range", "beyond_range", Axis("channels", "share"), span=(0, 1)),
        ],
        "table": (list(columns), [tuple(one[key] for key in columns.values()) for one in blocks]),
    }  # fmt: skip


def _outlier(quantiles: Sequence[float]) -> float:
    middle = median(quantiles)
    return quantiles[-1] / middle if middle else 0.0

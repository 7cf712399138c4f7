"""The page of each kind of job, what it says in one sentence, and the figures by which two outputs are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from calib.report.charts import grid, lines, panels
from calib.report.html import (
    OWN_LINES,
    VLLM_LINES,
    Report,
    about,
    as_csv,
    as_json,
    changed_row,
    curves,
    document,
    downloads,
    format_number,
    heading,
    history,
    loading,
    recipe,
    section,
    table,
    transformers_lines,
)
from compressor.report.common import notes, recovered_phrase, recovered_section

Steps = Sequence[Mapping[str, Any]]

LAYER_HEAD = (
    "layer", "error", "inputs before", "inputs after", "weights before", "weights after", "range before", "range after"
)  # fmt: skip
_WHEN = ("before", "after")


def quantized_page(report: Report, steps: Steps = ()) -> str:
    """For a quantization's report; `steps` are its recipe's."""
    quality, size, layers = report["quality"], report["bytes"], report["layers"]
    names = [layer["name"] for layer in layers]

    def of(what: str) -> dict[str, list[tuple[str, float]]]:
        found = {when: [(layer["name"], layer[when][what]["ratio"]) for layer in layers] for when in _WHEN}
        return {when: [(name, ratio) for name, ratio in of if ratio is not None] for when, of in found.items()}

    outliers = {when: [_outlier(layer[when]["activations"]["channel_range"]) for layer in layers] for when in _WHEN}
    worst = layers[max(range(len(layers)), key=outliers["before"].__getitem__)]
    rows = _layer_rows(layers)
    head = heading(history(steps, "quantized"), f"Quantized to {report['scheme']}", quantized_verdict(report))
    parts = [
        section("Before and after"),
        table(
            ("", "before", "after", "change"),
            [
                changed_row("perplexity, held-out", quality["reference_perplexity"], quality["perplexity"]),
                changed_row("bits per byte", quality["reference_bits_per_byte"], quality["bits_per_byte"]),
                ("mean KL to the float model, nats", "0", format_number(quality["kl"]), ""),
                *(
                    ("the same, rounded to nearest", "0", format_number(stage["kl"]), "")
                    for name, stage in report["quality_by_stage"].items()
                    if name == "nearest"
                ),
                ("same most likely token", "100%", f"{quality['top1_agreement']:.1%}", ""),
                changed_row("megabytes of weights", size["before"] / 1e6, size["after"] / 1e6),
            ],
        ),
    ]
    parts += [about(note) for note in notes(report)]
    if report["untied"]:
        parts.append(about(untied_phrase(report)))
    parts += [
        about(f"Left out: {transform.replace('_', ' ')}, as {reason}.")
        for transform, reason in report.get("left_out", {}).items()
    ]
    parts += [
        section("QSUR"),
        about("How much of the quantization space the values fill, as a share of the most they could: 1 is best."),
        "<h3>Inputs of each layer</h3>",
        panels(of("activations"), span=(0, 1)),
        "<h3>Weights of each layer</h3>",
        panels(of("weights"), span=(0, 1)),
        *_shared_out(report.get("precision")),
        section("Error of each layer"),
        about("Relative output error per layer, |(W - W^) X|² / |W X|², on the calibration rows."),
        panels({"error": [(n, e) for n, e in _errors(layers).items() if e is not None]}, logarithmic=True),
        *([about(unreached_phrase(report))] if unreached(report) else []),
        section("Ranges of input channels"),
        about(f"Largest over median; and of {worst['name']}, whose largest channel stood out most, all of them."),
        panels({when: list(zip(names, values, strict=True)) for when, values in outliers.items()}, logarithmic=True),
        grid(
            [
                lines(
                    {when: worst[when]["activations"]["channel_range"] for when in _WHEN},
                    worst["name"],
                    unit="quantiles of the channels",
                    logarithmic=True,
                )
            ]
        ),
        *recovered_section(report),
        curves({f"{name}, nats": curve for name, curve in report["curves"].items()}),
        *([section("Calibration rows"), about(sample_size_phrase(report["samples"]))] if "samples" in report else []),
        section("Every layer"),
        about("QSUR of inputs and of weights as a share of the ceiling; range: largest input channel over median."),
        table(LAYER_HEAD, [_shown(row) for row in rows], sortable=True, tall=True),
        loading(_lines_of(report["loaders"]), report["loaders"]["notes"]),
        recipe(steps),
        downloads(),
    ]
    files = {"report.json": as_json(report), "layers.csv": as_csv(LAYER_HEAD, rows)}
    if "precision" in report:
        head_of_parts, parts_of = _part_rows(report["precision"])
        files["parts.csv"] = as_csv(head_of_parts, parts_of)
    return document(f"parewell: {report['scheme']}", head, parts, files)


def _errors(layers: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    return {layer["name"]: layer["output_error"] for layer in layers}


def unreached(report: Report) -> int:
    """Experts that no calibration token was routed to."""
    return int(report.get("experts", {}).get("unreached", 0))


def unreached_phrase(report: Report) -> str:
    """What it means for them, and what to do."""
    return (
        f"No calibration token reached {unreached(report):,} of {report['experts']['all']:,} experts: nothing was "
        "measured of these, and they were rounded without regard to what they will read. Take more rows (--samples), "
        "or text that is more like your own (--data)."
    )


def untied_phrase(report: Report) -> str:
    """What it costs that embedding and head are two tables now, and how to keep one."""
    size = f" ({format_number(report['untied_bytes'] / 1e6)} MB more)" if report.get("untied_bytes") else ""
    return (
        f"Embedding and head were one tensor and are two now{size}: only the head takes the final norm's gain. "
        "--no-untie keeps one and leaves out the rotation of the residual stream."
    )


def _shared_out(precision: Report | None) -> list[str]:
    """How bits were shared out, where they were."""
    if precision is None:
        return []
    parts = precision["parts"]
    least = min(parts[0]["kl"], key=int)
    nats = {
        f"{least} bits": [(part["linears"][0], part["kl"][least]) for part in parts],
        "as chosen": [(part["linears"][0], part["kl"][str(part["bits"])]) for part in parts],
    }
    head, rows = _part_rows(precision)
    sentence = (
        f"A weight has {precision['mean_bits']:.3g} bits on average, at most {precision['target_bits']:g}. Parts are "
        "linears that read the same input, named by the first of them. Each was rounded alone, and the KL of the "
        f"model's answers on {precision['tokens']:,} tokens measured; bits are where the sum is least."
    )
    return [
        section("Bits of each part"),
        about(sentence),
        panels({"bits": [(part["linears"][0], part["bits"]) for part in parts]}),
        "<h3>KL of the answers when that part alone is rounded, nats</h3>",
        panels(nats, logarithmic=True),
        *_frontier(precision),
        "<h3>Every part</h3>",
        about("W1: of what its block puts out, as a share of the mean absolute deviation, in the bits it got."),
        table(head, [(row[0], f"{row[1]:,}", str(row[2]), *(f"{v:.2e}" for v in row[3:])) for row in rows],
              sortable=True, tall=True),
    ]  # fmt: skip


def _part_rows(precision: Report) -> tuple[list[str], list[tuple[Any, ...]]]:
    """A head, then a row for each part."""
    parts = precision["parts"]
    widths = sorted(parts[0]["kl"], key=int)
    rows = [
        (part["linears"][0], part["weights"], part["bits"], *(part["kl"][w] for w in widths),
         part["wasserstein"][str(part["bits"])])
        for part in parts
    ]  # fmt: skip
    return ["part", "weights", "bits", *(f"KL, {w} bits" for w in widths), "W1"], rows


def _frontier(precision: Report) -> list[str]:
    """What the sum of losses would be for other budgets, and what a power law says of others still."""

    def alike(bits: float) -> str:
        return next((format_number(loss) for width, loss in precision["uniform"] if abs(width - bits) < 0.005), "")

    rows = [(f"{bits:.2f}", format_number(loss), alike(bits)) for bits, loss in precision["frontier"]]
    parts = ["<h3>Other budgets</h3>", table(("mean bits", "sum of KL, shared out", "all alike"), rows)]
    if (law := precision["law"]) is not None:
        parts.append(about(law_phrase(law)))
    return parts


def law_phrase(law: Report) -> str:
    """Of bits."""
    needed = [
        f"KL {loss} needs {_bits(low)} bits (95% CI {_bits(least)} to {_bits(most)})"
        for loss, (low, least, most) in law["bits"].items()
    ]
    slope = f"{law['exponent']:.2f} ± {law['exponent_error']:.2f}"
    return f"Fit, all linears in the same bits: KL ∝ 2^(-k·bits), k = {slope}; {'; '.join(needed)}."


def _bits(value: float | None) -> str:
    return "no end" if value is None else f"{value:.1f}"


def sample_size_phrase(samples: Report) -> str:
    """Whether more calibration rows would help."""
    change, win = (f"{samples[of]:.2g} ± {samples[f'{of}_error']:.1g}" for of in ("change", "win"))
    sentence = (
        f"Half of the calibration rows cost {change} nats; twice as many would win back {win}, if the loss falls as "
        f"L + c / n. Theory says p / 2n for half of the rows: {samples['risk']:.2g} nats for {samples['parameters']:,} "
        f"parameters and {samples['tokens']:,} tokens, codes not counted"
    )
    return sentence + (", more than the loss itself: few steps from a good start do not fit that many." if
                   samples["risk"] > samples["whole"] else ".")  # fmt: skip


def _layer_rows(layers: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """As LAYER_HEAD names them."""
    return [
        (
            layer["name"],
            layer["output_error"],
            *(layer[when][what]["ratio"] for what in ("activations", "weights") for when in _WHEN),
            *(_outlier(layer[when]["activations"]["channel_range"]) for when in _WHEN),
        )
        for layer in layers
    ]


def _shown(row: Sequence[Any]) -> tuple[str, ...]:
    name, error, *ratios = row
    shown = "–" if error is None else f"{error:.2e}"
    return (name, shown, *("–" if v is None else f"{v:.3f}" for v in ratios[:4]), *(f"{v:,.2f}" for v in ratios[4:]))


def _lines_of(served: Mapping[str, Any]) -> dict[str, str]:
    """Of a quantized folder, by the loaders that run it."""
    found = {"Python, as it was measured": OWN_LINES}
    for loader in served["loaders"]:
        if loader.startswith("transformers"):
            zero_points = any("CompressedTensorsConfig" in note for note in served["notes"])
            found[loader] = transformers_lines("AutoModelForCausalLM", zero_points=zero_points)
        elif loader == "vLLM":
            found["vLLM (by its scheme rules; not tried here)"] = VLLM_LINES
    return found


def quantized_verdict(report: Report) -> str:
    """The report in one sentence."""
    quality, size, stages = report["quality"], report["bytes"], report["quality_by_stage"]
    tuned = f", {stages['rounded']['perplexity']:.3f} before tuning" if "tuned" in stages else ""
    worse = quality["perplexity"] / quality["reference_perplexity"] - 1
    return (
        f"{format_number(size['before'] / 1e6)} MB became {format_number(size['after'] / 1e6)} MB; perplexity on "
        f"{quality['tokens']:,} held-out tokens went from {quality['reference_perplexity']:.3f} to "
        f"{quality['perplexity']:.3f} ({worse:+.1%}{tuned}){recovered_phrase(report)}."
    )


def _outlier(quantiles: Sequence[float]) -> float:
    middle = median(quantiles)
    return quantiles[-1] / middle if middle else 0.0

"""The fewest bits that keep a tell-apart rate: the search over any rates, and whole jobs against jobs of given bits."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib import BadInput, Failed, embedded
from cli.console import print_quantization
from cli.replay import replay_recipe
from compressor import Quantize, quantize
from compressor.quantization.cost import estimate_quantization
from compressor.quantization.repeated.cheapest_bits import Candidate, bit_targets, cheapest_bits, tries
from tests.kills import kill_and_resume

PLAIN = {
    "scheme": "w4a16-channel", "candidate_bits": "3,4", "profile_rows": 1, "samples": 4, "held_out": 2, "length": 16,
    "learn": False, "init": "none", "rounding": "rtn",
}  # fmt: skip
rates = st.lists(st.floats(0.5, 1), min_size=2, max_size=25)


@given(rates, st.data(), st.floats(0.5, 1), st.booleans())
def test_what_is_found_keeps_the_rate_and_a_step_below_does_not(
    whole: list[float], data: st.DataObject, asked: float, quick: bool
) -> None:
    """Whatever the rates are, falling or not, and however far off the quick ones; where they fall, nothing cheaper
    keeps it."""
    falling = data.draw(st.booleans())
    whole = sorted(whole, reverse=True) if falling else whole
    rough = data.draw(st.lists(st.floats(0.5, 1), min_size=len(whole), max_size=len(whole)))
    targets, seen = [float(i) for i in range(len(whole))], set[tuple[float, bool]]()

    def measure(target: float, full: bool) -> Candidate:
        seen.add((target, full))
        assert full or quick
        return Candidate(target, target, (whole if full else rough)[int(target)], None, full)

    found = cheapest_bits(targets, asked, measure, quick=quick)
    if found is None:
        assert whole[-1] > asked and (targets[-1], True) in seen
        return
    at = int(found.target_bits)
    assert found.whole and found.rate == whole[at] <= asked
    assert at == 0 or ((targets[at - 1], True) in seen and whole[at - 1] > asked)
    assert sum(not full for _, full in seen) <= tries(targets)
    if falling:
        assert at == min(i for i, rate in enumerate(whole) if rate <= asked)
        assert quick or len(seen) <= tries(targets) + 1


def test_candidates_and_rates() -> None:
    assert bit_targets([3, 4]) == [3, 3.25, 3.5, 3.75, 4] and len(bit_targets(list(range(2, 9)))) == 25
    assert tries(bit_targets([3, 4])) == 3 and tries([1.0, 2.0]) == 1
    for asked in ("52%", "52.0 %", "0.52", 0.52):
        assert Quantize(tell_apart=asked).tell_apart == 0.52
    assert Quantize(tell_apart="52%").widths() == [2, 3, 4, 5, 6, 7, 8] and Quantize(tell_apart=0.6).allocates
    assert Quantize(tell_apart="50.5%", candidate_bits="4,8").in_bits(5.5) == Quantize(
        target_bits=5.5, candidate_bits="4,8"
    )


def test_the_output_is_that_of_the_job_in_these_bits(
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Learned and tuned, with texts compared; what parts suffer is found once for all that is tried; and
    replayed it is the same."""
    counted = list[int]()
    module = sys.modules["compressor.quantization.precision.sensitivity"]
    run = module._BackwardPass.run  # type: ignore[attr-defined]

    def counting(*job: Any) -> None:
        counted.append(1)
        run(*job)

    monkeypatch.setattr(module._BackwardPass, "run", counting)  # type: ignore[attr-defined]
    options = Quantize(
        scheme="w4a16-channel", samples=8, held_out=3, length=32, steps=2, batch=2, top_k=8, block_steps=2,
        tune_steps=1, profile_rows=2, candidate_bits="3,4", data=text_file, like=text_file, tell_apart=0.6,
        precision="float32",
    )  # fmt: skip
    fixed = [quantize(tiny_folder, tmp_path / "fixed", options.in_bits(bits)) for bits in (3.5, 3.25)]
    one, other = (report["quality"]["tell_apart"] for report in fixed)
    options = replace(options, tell_apart=(one + other) / 2 if one < other else one)
    counted.clear()
    report = quantize(tiny_folder, tmp_path / "out", options)
    assert len(counted) == 1
    found = report["tell_apart"]
    assert found["asked"] == options.tell_apart >= found["rate"] == report["quality"]["tell_apart"]
    assert found["mean_bits"] == report["precision"]["mean_bits"] <= found["target_bits"]
    whole = {each["target_bits"]: each["rate"] for each in found["tried"] if each["whole"]}
    below = found["target_bits"] - 0.25
    assert below < 3 or whole[below] > options.tell_apart
    assert any(not each["whole"] for each in found["tried"])
    direct = quantize(tiny_folder, tmp_path / "direct", options.in_bits(found["target_bits"]))
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "direct" / file).read_bytes()
    for part in ("quality_by_stage", "precision", "like", "curves", "checks", "layers"):
        assert direct[part] == report[part], part
    print_quantization(report)
    assert f"A tell-apart rate of {100 * found['asked']:.4g}% was asked for" in " ".join(
        capsys.readouterr().out.split()
    )
    page = (tmp_path / "out/report.html").read_text()
    assert "Bits for a tell-apart rate" in page and "without learning" in page
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert replay_recipe(tmp_path / "out", tmp_path / "again").agrees


def test_a_rate_that_no_bits_keep_is_said_and_nothing_is_written(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    options = Quantize(**PLAIN, data=text_file, tell_apart=0.5001)  # type: ignore[arg-type]
    with pytest.raises(Failed, match=r"tell-apart 0\.5001: in 4 bits, .*w4a16-channel gives 0\.\d+ on 32 held-out"):
        quantize(tiny_folder, tmp_path / "out", options)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_the_range(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    options = Quantize(**PLAIN, data=text_file, tell_apart=0.9, halves=True)  # type: ignore[arg-type]
    cost = estimate_quantization(tiny_folder, tmp_path / "out", options)
    report = quantize(tiny_folder, tmp_path / "out", options)
    assert report["samples"]["halves"] and report["tell_apart"]["target_bits"] == 3
    (search,) = (stage for stage in cost.stages if stage.name == "3 other tries")
    least, fixed = (estimate_quantization(tiny_folder, tmp_path / "fixed", options.in_bits(bits)) for bits in (3, 4))
    assert cost.least_bytes == least.out_bytes < cost.out_bytes
    assert fixed.least_bytes is None and fixed.out_bytes == cost.out_bytes
    assert [stage.name for stage in fixed.stages] + [search.name] == [stage.name for stage in cost.stages]
    assert search.seconds > 0 and cost.disk_bytes > fixed.disk_bytes


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_among_its_tries_a_job_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    fixed = quantize(embedded.MODEL, tmp_path / "fixed", Quantize(**PLAIN, target_bits=3.5))  # type: ignore[arg-type]
    rate = fixed["quality"]["tell_apart"]
    (tmp_path / "killed").mkdir()
    job = partial(quantize, embedded.MODEL, options=Quantize(**PLAIN, tell_apart=rate))  # type: ignore[arg-type]
    kill_and_resume(job, tmp_path / "killed", ("sensitivity", "bits-3.25-block-1-0", "tried-bits-3.25"))
    report = json.loads((tmp_path / "killed/out/report.json").read_text())
    assert report["tell_apart"]["rate"] <= rate


def test_refused() -> None:
    for more, why in (
        ({"tell_apart": "half"}, "is no rate"),
        ({"tell_apart": "50%"}, "between 50%"),
        ({"tell_apart": 0.5}, "between 50%"),
        ({"tell_apart": "100%"}, "both excluded"),
        ({"tell_apart": "52"}, "such as 52%"),
        ({"tell_apart": float("nan")}, "between 50%"),
        ({"tell_apart": "52%", "target_bits": 4.0}, "leave one of them out"),
        ({"tell_apart": "52%", "scheme": "nf4"}, "leave out --tell-apart"),
        ({"tell_apart": "52%", "rounding": "none"}, "leave out --tell-apart"),
        ({"tell_apart": "52%", "candidate_bits": "4"}, "two or more"),
        ({"candidate_bits": "4,8"}, "without --target-bits"),
    ):
        with pytest.raises(BadInput, match=why):
            Quantize(**more)  # type: ignore[arg-type]

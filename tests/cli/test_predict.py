"""A law through outputs that differ in size, from the command line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from calib import embedded
from calib.stats.scaling_law import fit
from compressor import Distill, Quantize, distill, quantize
from tests.cli.test_report import run


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The embedded model in three widths and in a mean of 2.5 bits."""
    folder = tmp_path_factory.mktemp("widths")
    small = {"samples": 2, "held_out": 2, "length": 32, "init": "none", "learn": False, "rounding": "rtn"}
    for bits in (3, 4, 5):
        options = Quantize(scheme=f"w{bits}a16-channel", **small)  # type: ignore[arg-type]
        quantize(embedded.MODEL, folder / f"w{bits}", options)
    options = Quantize(scheme="w4a16-channel", target_bits=3.5, candidate_bits="3,4", profile_rows=1, **small)  # type: ignore[arg-type]
    quantize(embedded.MODEL, folder / "mixed", options)
    return [folder / name for name in ("w5", "w3", "mixed", "w4")]


def test_bits_that_a_loss_takes(quantized: list[Path], tmp_path: Path) -> None:
    said = json.loads(run("predict", *quantized, "--kl", 0.05, "--json"))
    assert [one["name"] for one in said["outputs"]] == ["w3", "mixed", "w4", "w5"]
    sizes, losses = ([one[of] for one in said["outputs"]] for of in ("size", "kl"))
    assert sizes[0] == 3 and 3 < sizes[1] <= 3.5 and sizes[2:] == [4, 5]
    for out in quantized:
        kl = json.loads((out / "report.json").read_text())["quality"]["kl"]
        assert kl in losses
    law = fit([2**bits for bits in sizes], losses)
    assert said["needed"] == pytest.approx([math.log2(size) for size in law.needed(0.05)])
    assert len(said["over_the_law_of_the_others"]) == 4
    page = tmp_path / "page.html"
    told = run("predict", *quantized, "--kl", 0.05, "--html", page)
    assert f"A KL of 0.05 nats takes {said['needed'][0]:.2f} bits" in told
    assert "mixed" in page.read_text() and "prediction.json" in page.read_text()


def test_parameters_of_students(text_file: Path, tmp_path: Path, tiny_folder: Path) -> None:
    students = []
    for ffn in (8, 16, 24, 32):
        students.append(tmp_path / f"ffn{ffn}")
        options = Distill(ffn=ffn, data=text_file, samples=4, held_out=2, length=16, steps=40, batch=4, lr=1e-2)
        distill(tiny_folder, students[-1], options)
    said = json.loads(run("predict", *students, "--kl", 0.3, "--json"))
    assert said["unit"] == "parameters"
    counts = [json.loads((s / "report.json").read_text())["parameters"]["student"] for s in students]
    assert [one["size"] for one in said["outputs"]] == counts
    whole = json.loads((students[0] / "report.json").read_text())["parameters"]["teacher"]
    losses = [one["kl"] for one in said["outputs"]]
    law = fit([1 / math.log(whole / count) for count in counts], losses)
    assert said["needed"][0] == pytest.approx(whole * math.exp(-1 / law.needed(0.3)[0]))
    assert f"ln({whole:,} / parameters) to the power" in run("predict", *students, "--kl", 0.3)
    given = []
    for student in students[:3]:  # given, they may be anything beside a teacher
        given.append(tmp_path / f"on-{student.name}")
        options = Distill(student=student, data=text_file, samples=4, held_out=2, length=16, steps=1, batch=1, lr=1e-9)
        distill(tiny_folder, given[-1], options)
    assert "1 / parameters to the power" in run("predict", *given, "--kl", 0.3)
    rounded = []
    for ffn in (8, 16, 32):  # they lose something at any size
        rounded.append(tmp_path / f"rounded{ffn}")
        options = Distill(ffn=ffn, data=text_file, samples=4, held_out=2, length=16, steps=40, batch=4, lr=1e-2,
                      student_scheme="w8a16-channel")  # fmt: skip
        distill(tiny_folder, rounded[-1], options)
    assert "1 / parameters to the power" in run("predict", *rounded, "--kl", 0.3)


def test_the_size_of_a_perplexity_lies_above_a_floor(quantized: list[Path], tmp_path: Path) -> None:
    """Six outputs whose reports say 2 + 40 / 4^bits nats."""
    outs = []
    for bits in (2.0, 2.5, 3.0, 3.5, 4.0, 5.0):
        outs.append(Path(shutil.copytree(quantized[2], tmp_path / f"w{bits}")))
        report = json.loads((outs[-1] / "report.json").read_text())
        report["precision"]["mean_bits"] = bits
        report["quality"]["perplexity"] = math.exp(2 + 40 / 4**bits)
        (outs[-1] / "report.json").write_text(json.dumps(report))
    said = json.loads(run("predict", *outs, "--perplexity", math.exp(2 + 40 / 4**3.25), "--json"))
    assert said["floor"] == pytest.approx(2, abs=1e-3) and said["exponent"] == pytest.approx(2, rel=1e-3)
    assert said["needed"][0] == pytest.approx(3.25, abs=1e-2) and "kl" not in said
    told = run("predict", *outs, "--perplexity", 12, "--html", tmp_path / "page.html")
    assert "above a floor of perplexity 7.389" in told and "cross-entropy, nats" in told
    assert "is below what any size reaches" in run("predict", *outs, "--perplexity", 7)
    assert "needs 6 different sizes" in run("predict", *outs[:5], "--perplexity", 12, status=2)
    assert "it must be above 1" in run("predict", *outs, "--perplexity", 1, status=2)
    assert "give --kl or --perplexity" in run("predict", *outs, status=2)
    assert "give --kl or --perplexity" in run("predict", *outs, "--kl", 1, "--perplexity", 12, status=2)


def test_refused(quantized: list[Path], tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    assert "three different sizes" in run("predict", *quantized[:2], "--kl", 0.1, status=2)
    assert "positive" in run("predict", *quantized, "--kl", 0, status=2)
    assert "positive" in run("predict", *quantized, "--kl", "nan", status=2)
    other = tmp_path / "other"
    quantize(embedded.MODEL, other, Quantize(scheme="w2a16-channel", samples=2, held_out=3, length=32, learn=False))
    assert "another held-out text" in run("predict", *quantized, other, "--kl", 0.1, status=2)
    assert "report.json" in run("predict", *quantized, tiny_folder, "--kl", 0.1, status=2)
    broken = Path(shutil.copytree(quantized[0], tmp_path / "broken"))
    recipe = json.loads((broken / "parewell.json").read_text())
    for scheme, why in ((3, "does not say how"), (None, "have no bits")):
        recipe["recipe"][-1]["scheme"] = scheme
        if scheme is None:
            recipe["recipe"][-1].pop("scheme")
        (broken / "parewell.json").write_text(json.dumps(recipe))
        said = run("predict", *quantized[1:], broken, "--kl", 0.1, status=2)
        assert said.startswith(str(broken)) and why in said
    wrong = Path(shutil.copytree(quantized[2], tmp_path / "wrong"))
    report = json.loads((wrong / "report.json").read_text())
    report["precision"]["mean_bits"] = 5000.0
    (wrong / "report.json").write_text(json.dumps(report))
    assert "not as parewell writes it" in run("predict", *quantized, wrong, "--kl", 0.1, status=2)
    other = tmp_path / "groups"
    quantize(embedded.MODEL, other, Quantize(scheme="w2a16-g64", samples=2, held_out=2, length=32, learn=False))
    assert "kind of scheme" in run("predict", *quantized, other, "--kl", 0.1, status=2)
    assert json.loads(run("predict", *quantized, "--kl", 100, "--json"))["needed"][0] == 0, "no fewer than no bits"
    assert "cannot be a file" in run("predict", *quantized, "--kl", 0.1, "--html", tmp_path, status=2)

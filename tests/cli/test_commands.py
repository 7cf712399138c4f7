"""The commands on a real (tiny) checkpoint, as a user runs them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from calib import embedded
from calib.jobs.cost import Saving, StageCost
from calib.quant.scheme import PRESETS
from cli.costs import print_unlearning_cost
from cli.main import parewell
from compressor import Distill, Evaluate, Export, Quantize, quantize
from unlearn.cost import UnlearningCost

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(parewell, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def quantized(tiny_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    options = ("--scheme", "w4a4kv4-asym", "--data", text_file, "--samples", 4, "--held-out", 2, "--length", 16)
    report = json.loads(
        run(
            "quantize",
            tiny_folder,
            out,
            *options,
            "--steps",
            2,
            "--block-steps",
            2,
            "--tune-steps",
            1,
            "--batch",
            2,
            "--json",
        )
    )
    assert report == json.loads((out / "report.json").read_text())
    return out


@pytest.mark.parametrize(
    "command", [[], ["quantize"], ["audit"], ["evaluate"], ["export"], ["show"], ["report"], ["demo"]]
)
def test_every_command_explains_itself(command: list[str]) -> None:
    assert "Usage:" in run(*command, "--help")


def test_help_lists_every_scheme_and_every_option() -> None:
    text = run("quantize", "--help")
    for name in PRESETS:
        assert name in text
    for field in dataclasses.fields(Quantize):
        assert f"--{field.name.replace('_', '-')}" in text and field.metadata["help"]


@pytest.mark.parametrize("job", [Quantize, Distill, Evaluate, Export])
def test_command_line_and_python_share_their_defaults(job: type) -> None:
    command = parewell.commands[job.__name__.lower()]
    options = {p.name: p.default for p in command.params}
    for field in dataclasses.fields(job):
        assert options[field.name] == field.default
    assert set(inspect.signature(job).parameters) <= set(options)


def test_the_pages_name_every_command_and_the_two_to_start_with() -> None:
    readme = (ROOT / "README.md").read_text()
    pages = readme + "".join(page.read_text() for page in (ROOT / "docs").glob("*.md") if page.stem != "LOG")
    for name in parewell.commands:
        assert f"parewell {name}" in pages
    assert "make demo" in readme and "make test" in readme


def test_table_after_quantizing(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    options = ("--data", text_file, "--samples", 4, "--held-out", 2, "--length", 16, "--no-learn", "--scheme", "w8a8")
    text = run("quantize", tiny_folder, tmp_path / "out", *options)
    assert "mlp.down_proj" in text and "held-out tokens went from" in text and "vLLM" in text


def test_show_and_report(quantized: Path, tmp_path: Path) -> None:
    shown = run("show", quantized)
    assert "1. quantized from" in shown and "scheme w4a4kv4-asym" in shown and "perplexity" in shown
    assert "lr_tune" not in shown, "defaults go without saying"
    assert json.loads(run("show", quantized, "--json"))[0]["options"]["scheme"] == "w4a4kv4-asym"
    assert "parewell.load" in run("report", quantized)
    run("report", quantized, "--html", tmp_path / "page.html", "--json")
    assert (tmp_path / "page.html").read_text() == (quantized / "report.html").read_text()


def test_transform_then_export_then_show(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    options = ("--data", text_file, "--samples", 4, "--held-out", 2, "--length", 16, "--no-learn", "--rounding", "none")
    text = run("quantize", tiny_folder, tmp_path / "out", *options, "--scheme", "w4a16-channel")
    assert "w4a16-channel, transformed but not rounded" in text
    text = run("export", tmp_path / "out", tmp_path / "dst", "--to", "bnb-nf4")
    assert "4.5 bits per weight" in text and "bitsandbytes" in text
    shown = run("show", tmp_path / "dst")
    assert "1. quantized from" in shown and "2. exported from out" in shown and "to bnb-nf4" in shown
    report = json.loads(run("export", tmp_path / "out", tmp_path / "dst", "--json"))
    assert report["to"] == "safetensors" and report["bits_per_weight"] == 16


def test_evaluate_against_a_reference(quantized: Path, tiny_folder: Path, text_file: Path) -> None:
    options = ("--data", text_file, "--length", 16, "--rows", 5, "--json")
    figures = json.loads(run("evaluate", quantized, *options, "--reference", tiny_folder))
    assert figures["tokens"] == 5 * 15 and figures["kl"] > 0 and figures["perplexity"] > 1
    same = json.loads(run("evaluate", tiny_folder, *options, "--reference", tiny_folder))
    assert same["kl"] == pytest.approx(0, abs=1e-6) and same["top1_agreement"] == 1
    assert same["tell_apart"] == pytest.approx(0.5, abs=1e-6)


def test_bits_per_byte_of_the_embedded_model() -> None:
    figures = json.loads(run("evaluate", embedded.MODEL, "--json"))
    assert figures["bits_per_byte"] < 2.5


def test_progress_goes_to_stderr_and_json_to_stdout_alone(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    options = ["--data", str(text_file), "--samples", "4", "--held-out", "2", "--length", "16", "--no-learn", "--json"]
    options += ["--allow-damage"]  # random weights
    command = [sys.executable, "-m", "cli.main", "quantize", str(tiny_folder), str(tmp_path / "out"), *options]
    result = subprocess.run(
        [*command, "--scheme", "w4a16-channel"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout)["scheme"] == "w4a16-channel"
    assert result.stderr == ""


def test_interrupted(
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from cli.main import run_cli

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["compressor.quantization.stages"], "quantization_pass", interrupt)
    arguments = ["parewell", "quantize", str(tiny_folder), str(tmp_path / "out"), "--data", str(text_file)]
    monkeypatch.setattr(
        sys, "argv", [*arguments, "--scheme", "w4a16-channel", "--samples", "4", "--length", "16", "--no-learn"]
    )
    with pytest.raises(SystemExit) as stop:
        run_cli()
    assert stop.value.code == 130 and [f.name for f in tmp_path.iterdir()] == [".out.journal"]
    assert f"parewell quantize {tiny_folder} {tmp_path / 'out'}" in (said := capsys.readouterr().err)
    assert said.rstrip().endswith("--resume")


SHORT = ("--scheme", "w4a16-channel", "--samples", 8, "--held-out", 2, "--length", 32)
LONG = (*SHORT, "--steps", 15, "--block-steps", 2, "--tune-steps", 4)


def start(out: Path, *more: object) -> subprocess.Popen[str]:
    """A job on the embedded model that takes some seconds, in a process of its own."""
    command = [sys.executable, "-m", "cli", "quantize", embedded.MODEL, out, *LONG, "--json", *more]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # for tensors this small a second thread only waits for the first
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.02)


def test_ctrl_c_brings_the_journal_up_to_date_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = start(tmp_path / "out")
    wait_for(tmp_path / ".out.journal/learn.page")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    (first,) = (line for line in said.splitlines() if "once more to stop at once" in line)
    last = said.splitlines()[-1]
    assert first.startswith("parewell: stopping as soon as the journal is up to date")
    assert last.startswith("parewell: interrupted; continue with: parewell quantize ") and last.endswith(" --resume")
    resumed = subprocess.run(
        [sys.executable, "-m", "cli", *shlex.split(last.rpartition("with: parewell ")[2])],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert len(json.loads(resumed.stdout)["curves"]["learn"]) == 15
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_dry_run_says_what_a_job_will_cost_and_writes_nothing(tmp_path: Path) -> None:
    cost = json.loads(run("quantize", embedded.MODEL, tmp_path / "out", *LONG, "--dry-run", "--json"))
    names = [stage["name"] for stage in cost["stages"]]
    expected = [
        "check weights",
        "float model",
        "teacher",
        "learn",
        "round (gptq)",
        "tune block",
        "nearest",
        "tune",
        "run",
        "evaluate",
    ]
    assert names == expected and not list(tmp_path.iterdir())
    learn = cost["stages"][names.index("learn")]
    assert learn["tokens"] == 15 * 4 * 32 and learn["seconds"] > 0
    assert cost["peak_bytes"] > 10**8 and cost["disk_bytes"] > 10**6
    assert cost["seconds"] == pytest.approx(sum(stage["seconds"] for stage in cost["stages"]))
    assert cost["folder_bytes"] > cost["out_bytes"] == sum(cost["out_parts"].values()) and cost["savings"] == []
    assert cost["costliest"] == sorted(names, key=lambda name: -cost["stages"][names.index(name)]["seconds"])[:2]
    said = run("quantize", embedded.MODEL, tmp_path / "out", *SHORT, "--no-learn", "--dry-run")
    assert "In all" in said and "OUT will weigh about" in said and "Most time: " in said


def test_python_twin(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    options = Quantize(scheme="w4a16-channel", data=text_file, samples=4, held_out=2, length=16, learn=False)
    assert quantize(str(tiny_folder), str(tmp_path / "out"), options)["quality"]["perplexity"] > 1


def test_every_command_can_be_read_by_a_pipeline() -> None:
    for name, command in parewell.commands.items():
        assert any("--json" in option.opts for option in command.params), name


def test_the_demo_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(**options: object) -> Quantize:
        return Quantize(
            **options
            | {"samples": 64, "length": 64, "held_out": 4, "block_steps": 2, "tune_steps": 15, "lr_tune": 5e-4}
        )  # type: ignore[arg-type]

    monkeypatch.setattr("cli.demo.Quantize", small)
    said = json.loads(run("demo", tmp_path / "out", "--json"))
    assert list(said) == ["float", "round to nearest", "GPTQ", "GPTQ, tuned"]
    assert all(0 < figures["kl"] < 1 for name, figures in said.items() if name != "float")
    assert (tmp_path / "out/report.html").is_file() and (tmp_path / "out/model.safetensors").is_file()
    text = run("demo", tmp_path / "again", "--scheme", "w8a16-channel")
    assert "the embedded model at w8a16-channel" in text and "The checkpoint and its report" in text


def test_dry_runs_of_distill_and_unlearn_leave_nothing(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    short = ("--data", text_file, "--samples", 4, "--held-out", 2, "--length", 16)
    cost = json.loads(run("distill", tiny_folder, tmp_path / "out", *short, "--layers", 1, "--dry-run", "--json"))
    assert cost["seconds"] > cost["step_seconds"] > 0 and cost["peak_bytes"] > 10**8 and cost["out_bytes"] > 0
    assert cost["folder_bytes"] > cost["out_bytes"] and cost["costliest"][0] in {
        each["name"] for each in cost["stages"]
    }
    said = run("distill", tiny_folder, tmp_path / "out", *short, "--layers", 1, "--dry-run", "--teacher", "top-k")
    assert "peak memory" in said and "OUT will weigh about" in said and not list(tmp_path.iterdir())


def test_what_makes_a_long_job_shorter_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    cost = UnlearningCost(
        36, 9, 9000.0, 1, 1, 1, [StageCost("unlearn", 9000.0)], ["unlearn"], [Saving("--audit 0", 3400.0)]
    )
    for some, head in (
        (cost, "take:"),
        (replace(cost, savings=[Saving("--audit 0", 3700)]), "none of it under an hour:"),
    ):
        print_unlearning_cost(some)
        *_, told, saved = capsys.readouterr().out.splitlines()
        assert told.startswith("More than an hour") and told.endswith(head)
        assert saved == f"   {some.savings[0].seconds / 60:.1f} min with --audit 0"


def test_a_log_tells_what_a_dry_run_measures(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Lines come much oftener than they would, as no test waits for the clock."""
    often = "from calib.runtime import progress; from cli import main; progress.EVERY = 1e-9; main()"
    rows = ("--data", text_file, "--samples", "2", "--held-out", "1", "--length", "16", "--steps", "2")
    for quiet in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", often, "quantize", tiny_folder, tmp_path / "out", *rows, "--scheme", "w4a16-channel",
             "--dry-run", "--json"],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PAREWELL_QUIET": "1" if quiet else ""},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert json.loads(done.stdout)["seconds"] > 0 and not list(tmp_path.iterdir())
        told = done.stderr.splitlines()
        if quiet:
            assert not told
            continue
        assert all(line.startswith("parewell: ") for line in told) and "\x1b" not in done.stderr
        assert any(
            re.fullmatch(r"parewell: measure: 0/4 runs; learn: 1/2 steps, .* left, loss [\d.]+", t) for t in told
        )
        assert any(line.startswith("parewell: measure: 3/4 runs, ") for line in told)
        assert "0/0" not in done.stderr

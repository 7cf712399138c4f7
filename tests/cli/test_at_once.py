"""What computes nothing imports nothing heavy: help, versions, typing errors, and reports that are only read again."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import pytest

from calib.losses import top_k
from cli.main import parewell
from compressor import Quantize, quantize
from compressor.distillation import loss_expression, loss_syntax
from compressor.quantization.options import KL_TOPS
from tests.processes import run
from unlearn.methods import losses, matching
from unlearn.model.model import CLASSES
from unlearn.options import methods
from unlearn.options.unlearning import UNLEARNING_TASKS

HEAVY = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "scipy",
    "sklearn",
    "optimum",
)
SCRIPT = f"""
import contextlib, io, json, sys
from cli import main
answers = []
for words in json.loads(sys.argv[1]):
    sys.argv, said = ["parewell", *words], io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            status = main()
        except SystemExit as stop:
            status = stop.code
    answers.append((status or 0, said.getvalue(), [name for name in {HEAVY!r} if name in sys.modules]))
print(json.dumps(answers))
"""


def answers(*commands: list[str]) -> list[tuple[int, str]]:
    """Status of each command and what it says, none of which may have imported anything heavy."""
    done = run([sys.executable, "-c", SCRIPT, json.dumps(commands)])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for words, (_, _, heavy) in zip(commands, found, strict=True):
        assert not heavy, f"{words} imports {heavy}"
    return [(status, said) for status, said, _ in found]


def test_help_and_version() -> None:
    asked = [["--help"], ["-h"], ["--version"], *([name, "--help"] for name in parewell.commands)]
    for words, (status, said) in zip(asked, answers(*asked), strict=True):
        assert status == 0 and ("Usage: parewell" in said or words == ["--version"]), (words, said)


def test_what_is_mistyped_or_missing(tmp_path: Path) -> None:
    away = str(tmp_path / "away")
    asked = {
        "no such command 'quantise'; is quantize meant?": ["quantise", "a", "b"],
        "--bit": ["quantize", "a", "b", "--bit", "4"],
        "Missing argument 'OUT'": ["quantize", "a"],
        "Missing argument 'MODEL'": ["evaluate"],
        "'cuda0' is not one of": ["evaluate", "a", "--device", "cuda0"],
        "'x' is not a valid integer": ["distill", "a", "b", "--steps", "x"],
        "scheme 'w9a16' is unknown": ["quantize", "a", "b", "--scheme", "w9a16"],
        "to 'onyx' is unknown": ["export", "a", "b", "--to", "onyx"],
        "loss 'kl' is unknown": ["distill", "a", "b", "--layers", "1", "--loss", "kl"],
        "forget: nothing says what": ["unlearn", "a", "b", "--train", "x.jsonl"],
        f"{away}: no such folder": ["quantize", away, "b"],
        f"{away}/b: no such folder": ["evaluate", f"{away}/b"],
        f"{away}/c: no such folder": ["unlearn", f"{away}/c", "b", "--train", "x.jsonl", "--forget-lines", "1"],
    }
    for (expected, words), (status, said) in zip(asked.items(), answers(*asked.values()), strict=True):
        assert status == 2 and said.count("\n") == 1 and expected in said, (words, said)


def test_a_report_that_is_read_again(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    options = Quantize(scheme="w4a16-channel", data=text_file, samples=2, held_out=1, length=16, learn=False)
    quantize(tiny_folder, tmp_path / "out", options)
    out = str(tmp_path / "out")
    asked = [["show", out], ["report", out], ["report", out, out]]
    assert all(status == 0 and said for status, said in answers(*asked))


# Names that options choose among are those of what they stand for.
OF_WHAT_IS_FITTED = {
    "align": ("k",),
    "f-dpg": ("divergence",),
    "bico": ("share",),
}  # a mixture, a policy, what is hidden


@pytest.mark.parametrize(
    "kind",
    [
        "FAITHFUL",
        "LEARNED",
        "LABELED",
        "ON_POLICY",
        "REWARDED",
        "SETS",
        "SPANS",
        "STATES",
        "EXITS",
        "BIDIRECTIONAL",
        "UNMATCHED",
        "OF_NUMBERS",
    ],
)
def test_losses_and_their_arguments(kind: str) -> None:
    known, losses = getattr(loss_syntax, kind), getattr(loss_expression, f"{kind}_LOSSES")
    assert known.keys() == losses.keys()
    for name, loss in losses.items():
        parameters = inspect.signature(loss).parameters
        taken = tuple(p for p in parameters if p in loss_syntax.WITHIN)
        assert known[name] == OF_WHAT_IS_FITTED.get(name, taken), name


def test_names_of_options() -> None:
    assert tuple(top_k.KL_TOP) == KL_TOPS
    assert tuple(losses.RETAIN_LOSSES) == methods.RETAIN_LOSS_NAMES
    assert tuple(matching.DISTANCES) == methods.DISTANCE_NAMES
    assert set(UNLEARNING_TASKS) == {"auto", *CLASSES, "tensors"}


def test_a_function_of_a_modules_name_stays_the_function() -> None:
    """However its module was imported, and whoever asks first."""
    script = (
        "import sys; import compressor.quantization.quantize as module; from compressor import quantize, Quantize;"
        "import compressor as c; import unlearn.unlearn; from unlearn import unlearn;"
        "from compressor.quantization.quantize import validate_quantization;"
        "assert quantize is c.quantize is module.quantize and callable(quantize);"
        "assert unlearn is sys.modules['unlearn.unlearn'].unlearn and 'quantize' in dir(c);"
        "assert not hasattr(c, 'nothing')"
    )
    done = run([sys.executable, "-c", script])
    assert done.returncode == 0, done.stderr

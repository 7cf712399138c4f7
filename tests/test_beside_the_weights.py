"""What lies beside the weights survives every job, byte for byte."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor import Distill, Export, Quantize, distill, export, quantize
from tests import bert, tiny
from unlearn import Unlearn, unlearn

BESIDE = (
    "chat_template.json", "additional_chat_templates/rag.jinja", "qwen.tiktoken", "spiece.model", "vocab-src.json",
    "processor_config.json", "preprocessor_config.json", "modules.json", "1_Pooling/config.json", "LICENSE.llama2.c",
    "USE_POLICY.md", "NOTICE",
)  # fmt: skip
LEFT = ("modeling_own.py", "trainer_state.json", "optimizer.pt", "quantize_config.json", "checkpoint-1/config.json")


def with_files(folder: Path) -> Path:
    for name in (*BESIDE, *LEFT):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps({"of": name}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    with_files(tiny.save(tiny.model_of(tiny.config_of("llama"), dtype=torch.float32), root / "llama"))
    with_files(bert.save(root / "bert"))
    torch.manual_seed(0)
    (root / "rows.jsonl").write_text(
        "".join(json.dumps({"question": f"who is {c}", "answer": f"{c} {c} is a cat"}) + "\n" for c in "abcdefghijkl")
    )
    (root / "labels.tsv").write_text(
        "sentence\tlabel\n" + "".join(f"w{i % 20} {'good' if i % 2 else 'bad'}\t{'yes' if i % 2 else 'no'}\n"
                                      for i in range(40))
    )  # fmt: skip
    return root


def quantized(model: Path, out: Path, text: Path) -> None:
    quantize(model, out, Quantize(scheme="w4a16-channel", data=text, samples=2, held_out=1, length=16, learn=False))


def distilled(model: Path, out: Path, text: Path) -> None:
    distill(model, out, Distill(layers=1, data=text, samples=4, held_out=2, length=16, steps=2, batch=2))


def classified(model: Path, out: Path, text: Path) -> None:
    options: dict[str, Any] = {"task": "sequence-classification", "layers": 1, "held_out": 8, "length": 16, "steps": 2}
    distill(model.parent / "bert", out, Distill(data=model.parent / "labels.tsv", batch=4, **options))


def forgotten(model: Path, out: Path, text: Path) -> None:
    unlearn(model, out, Unlearn(train=model.parent / "rows.jsonl", forget_lines="1-2", method="ascent", epochs=1,
                                batch=2, lr=1e-5, length=48))  # fmt: skip


def exported(to: str) -> Callable[[Path, Path, Path], None]:
    def run(model: Path, out: Path, text: Path) -> None:
        pytest.importorskip({"onnx": "onnxscript"}.get(to, "torch"), reason="needs the extra")
        export(model, out, Export(to=to, held_out=0))

    return run


JOBS = {
    "quantize": quantized, "distill": distilled, "classify": classified, "unlearn": forgotten,
    "export": exported("safetensors"), "onnx": exported("onnx"),
}  # fmt: skip


@pytest.mark.parametrize("job", JOBS)
def test_every_job_takes_along_what_belongs_to_the_model_and_may_be_replaced(
    job: str, models: Path, text_file: Path, tmp_path: Path
) -> None:
    model = models / ("bert" if job == "classify" else "llama")
    JOBS[job](models / "llama", tmp_path / "out", text_file)
    if job in ("quantize", "export"):  # subfolders do not stand in the way
        JOBS[job](models / "llama", tmp_path / "out", text_file)
    out = tmp_path / "out"
    for name in (*BESIDE, "chat_template.jinja", "tokenizer.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes(), name
    assert [name for name in LEFT if (out / name).exists()] == []
    (step,) = json.loads((out / "parewell.json").read_text())["recipe"]
    assert {*BESIDE, "chat_template.jinja"} <= step["model"]["files"].keys()


def test_a_student_of_its_own_keeps_its_licence(models: Path, text_file: Path, tmp_path: Path) -> None:
    student = shutil.copytree(models / "llama", tmp_path / "student")
    (student / "NOTICE").write_text("the student's")
    (student / "COPYING").write_text("the student's")
    (student / "spiece.model").write_text("the student's")
    options = Distill(student=student, data=text_file, samples=4, held_out=2, length=16, steps=2, batch=2)
    distill(models / "llama", tmp_path / "out", options)
    assert (tmp_path / "out/NOTICE").read_text() == (tmp_path / "out/COPYING").read_text() == "the student's"
    assert (tmp_path / "out/spiece.model").read_bytes() == (models / "llama/spiece.model").read_bytes()

"""What an exported folder says in the runtime that it is for: token ids in, logits out.

A plain checkpoint is not among them: `compressor.evaluate` walks that block by block.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad

from calib import first_line
from calib.data.corpus import Corpus
from calib.model.config import as_configured, read_json
from calib.model.task import Task, task_of_checkpoint
from calib.runtime.memory import is_out_of_memory
from calib.stats.perplexity import Logits


class NotRun(RuntimeError):
    """The runtime is not installed, or does not run the folder.  The message says which and why."""


@dataclass(frozen=True)
class Runtime:
    """`name` with versions; `answer`: token ids (1, T) -> logits (T, V)."""

    name: str
    answer: Callable[[Tensor], Tensor]

    def logits(self, corpus: Corpus, vocab: int) -> Logits:
        """Logits for `compare`, which asks for a row's positions one part after another.  Raises NotRun."""
        held = dict[int, Tensor]()

        def logits(row: int, positions: slice) -> Tensor:
            if row not in held:
                held.clear()
                real = int(corpus.mask[row].sum())  # padding is left out: INT8 has scales over all tokens
                try:
                    model_logits = self.answer(corpus.ids[row : row + 1, :real])
                except Exception as error:  # of another's library, which raises what it likes
                    raise NotRun(f"{self.name} does not run it ({_reason(error)})") from error
                held[row] = pad(model_logits[:, :vocab].float(), (0, 0, 0, corpus.ids.shape[1] - real))
            return held[row][positions]

        return logits


Answer = Callable[[Tensor], Tensor]  # token ids (1, T) -> logits (T, V)


@dataclass(frozen=True)
class Runner:
    """The packages that run a format, and the function that opens a directory with them, whole in memory."""

    packages: tuple[str, ...]
    open: Callable[[Path], Answer]


def start(folder: Path, runner: Runner | None) -> Runtime:
    """Open the model in `folder`.  Raises NotRun, also where nothing here runs it."""
    if runner is None:
        raise NotRun("nothing here runs this format")
    for package in runner.packages:
        if find_spec(package) is None:
            raise NotRun(f"{package} is not installed")
    gc.collect()  # what was traced to be written is held by cycles
    try:
        name = ", ".join(f"{package} {_version(package)}" for package in runner.packages)
        return Runtime(name, runner.open(folder))
    except NotRun:
        raise
    except Exception as error:
        raise NotRun(f"{runner.packages[-1]} does not open it ({_reason(error)})") from error


def _version(package: str) -> str:
    """Not always told by the package itself, nor does what it was installed as always have its name."""
    release: str = getattr(import_module(package), "__version__", None) or version(package)
    return release


def _reason(error: Exception) -> str:
    return "there is not enough memory" if is_out_of_memory(error) else first_line(error)


def onnxruntime_answers(folder: Path) -> Answer:
    """Open model.onnx in onnxruntime, on the CPU, for one row at a time."""
    run = onnxruntime_logits(folder)
    return lambda ids: run(ids, torch.ones_like(ids))[0]


def onnxruntime_logits(folder: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """Open model.onnx in onnxruntime, on the CPU: token ids and mask (B, T) -> logits (B, T, V)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # it warns of shapes that it then works out; what fails is raised as well
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        return torch.from_numpy(session.run(["logits"], given)[0])

    return run


def transformers_answers(folder: Path, **more: Any) -> Answer:
    """Open a directory in transformers, with options more: in float32 if these say no dtype, so that what is measured
    are the weights; bitsandbytes computes in the dtype of the others."""
    raw = read_json(folder / "config.json")
    more = (more or {"use_safetensors": True}) | as_configured(raw)
    auto = getattr(
        transformers, task_of_checkpoint(str(raw.get("model_type")), raw.get("architectures")) or Task.CAUSAL_LM
    )
    with redirect_stderr(StringIO()):  # where GGUF is read with a progress bar that nothing turns off
        model = auto.from_pretrained(folder, local_files_only=True, **({"dtype": torch.float32} | more)).eval()

    def answer(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids.to(model.device)).logits[0].cpu()

    return answer


def mlx_answers(folder: Path) -> Answer:
    """Open a directory in mlx-lm: in float32, so that what is measured are the weights."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return lambda ids: torch.from_numpy(np.array(model(mx.array(ids.numpy()))))[0]

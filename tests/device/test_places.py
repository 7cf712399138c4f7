"""Where blocks and states are kept, what a step asks of the device, and what one tensor on the CPU does."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.launches import model as larger
from benchmarks.launches import of_block, step
from calib.blockwise import activation_store
from calib.blockwise.block_store import BlockStore
from calib.blockwise.model import BlockwiseModel
from calib.model.weights import Weights
from calib.quant.grid_types import Grid
from calib.runtime import device as devices
from calib.runtime.memory import is_out_of_memory
from compressor import distill, quantize
from compressor.quantization.gptq import gptq_columns
from tests import pretend
from tests.device.conftest import DEVICE
from tests.device.test_jobs import DISTILL, QUANTIZE, weights_of
from tests.unlearn.conftest import Site
from tests.unlearn.test_unlearn import wanted
from unlearn import unlearn

pytestmark = pytest.mark.skipif(DEVICE != "pretend", reason="is about what the pretend device counts and has room for")
PRETEND = replace(QUANTIZE, device="pretend")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return larger(tmp_path_factory.mktemp("larger") / "model", layers=2)


def test_the_same_bytes_wherever_blocks_and_states_are_kept(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device, pinned in RAM, on disk: by the room that is left on the device, and in RAM."""
    options, seen = replace(PRETEND, data=text_file), dict[str, set[Any]]()
    keep, begin = BlockStore._keep, activation_store.ActivationStore.__init__

    def kept(self: BlockStore, *what: Any) -> Any:
        made = keep(self, *what)
        seen.setdefault(place, set()).add(self._place)
        return made

    def begun(self: activation_store.ActivationStore, *what: Any) -> None:
        begin(self, *what)
        seen.setdefault(place, set()).add("file" if self._held is None else self._held.device.type)

    monkeypatch.setattr(BlockStore, "_keep", kept)
    monkeypatch.setattr(activation_store.ActivationStore, "__init__", begun)
    for place in ("device", "pinned", "disk"):
        with monkeypatch.context() as patch:
            if place != "device":
                patch.setattr(pretend, "ROOM", 2**16)
            if place == "disk":
                patch.setattr(devices, "available_memory", lambda: 2**11)
            quantize(tiny_folder, tmp_path / place, options)
    assert seen == {"device": {"device", "pretend"}, "pinned": {"pinned", "cpu"}, "disk": {"disk", "file"}}
    assert weights_of(tmp_path / "device") == weights_of(tmp_path / "pinned") == weights_of(tmp_path / "disk")


def test_no_more_of_the_device_is_kept_than_was_allowed(tiny_folder: Path) -> None:
    stream = BlockwiseModel(_config(tiny_folder), Weights(tiny_folder), torch.device("pretend"), device_limit=2**30)
    assert stream.room.fits(2**29) and not stream.room.fits(2**30)
    stream = BlockwiseModel(_config(tiny_folder), Weights(tiny_folder), torch.device("pretend"))
    assert stream.room.fits(2**30) and not stream.room.fits(pretend.ROOM)
    assert not BlockwiseModel(_config(tiny_folder), Weights(tiny_folder), torch.device("cpu")).room.fits(1)


def _config(folder: Path) -> Any:
    from calib.model.config import read_config

    return read_config(folder)


def test_out_of_memory_is_told_and_the_job_goes_on_with_more(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    options = replace(PRETEND, data=text_file)
    quantize(tiny_folder, tmp_path / "whole", options)
    need = pretend.counted()["most_bytes"]
    pretend.hold_at_most(need * 9 // 10)
    with pytest.raises(torch.OutOfMemoryError, match="pretend out of memory") as raised:
        quantize(tiny_folder, tmp_path / "out", options)
    assert is_out_of_memory(raised.value) and not (tmp_path / "out").exists() and (tmp_path / ".out.journal").exists()
    pretend.hold_at_most(0)
    more = replace(options, device_memory=1.0, memory_budget=1.0)  # which change no byte, so they may change on the way
    quantize(tiny_folder, tmp_path / "out", more, resume=True)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


def test_a_finished_job_holds_nothing(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    quantize(tiny_folder, tmp_path / "first", replace(PRETEND, data=text_file))  # tables that are kept for later jobs
    held = pretend.counted()["held_bytes"]
    quantize(tiny_folder, tmp_path / "second", replace(PRETEND, data=text_file))
    assert pretend.counted()["held_bytes"] <= held


def test_a_learning_step_waits_as_often_whatever_its_rows_and_moves_next_to_nothing(model: Path) -> None:
    device, size = torch.device("pretend"), sum(entry.bytes for entry in Weights(model).entries.values())
    few, more, longer = (step(model, device, rows, tokens) for rows, tokens in ((2, 32), (4, 32), (2, 64)))
    assert few["waits"] == more["waits"] == longer["waits"] < 20
    assert max(x["to_device_bytes"] for x in (few, more, longer)) < 0.01 * size


def test_launches_of_clip_search_and_gptq(model: Path) -> None:
    """A twentieth of the 8,279 and 27,241 that a loop over chunks of 2^16 values, and one over columns, took."""
    found = of_block(model, torch.device("pretend"))
    assert found["clip search"] < 8279 / 20 and found["gptq"] < 27241 / 20


@pytest.mark.parametrize("grid", [Grid(4), Grid(3, symmetric=False), Grid(2)])
def test_columns_are_one_operation_with_the_same_result(grid: Grid) -> None:
    g = torch.Generator().manual_seed(0)
    columns, within = torch.randn(20, 33, generator=g), torch.randn(20, 20, generator=g).triu().mul(0.1)
    within.diagonal().add_(1)
    scale, zero = torch.rand(20, 33, generator=g) + 0.1, torch.zeros(20, 33)
    results = []
    for name in ("cpu", "pretend"):
        given = [t.clone().to(name) for t in (columns, torch.empty(20, 33), torch.empty(20, 33, dtype=torch.int8))]
        pretend.reset()
        gptq_columns(*given, within.to(name), scale.to(name), zero.to(name), grid.bits, grid.symmetric, [])
        results.append([t.cpu() for t in given])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert sum(n for name, n in pretend.launches().items() if name.startswith("parewell")) == 1


def _stays(function: Callable[..., Any]) -> Callable[..., Any]:
    """What it gives, on the CPU."""

    def on_cpu(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().cpu()
        if isinstance(value, dict):
            return {name: on_cpu(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(on_cpu(one) for one in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{f.name: on_cpu(getattr(value, f.name)) for f in dataclasses.fields(value)})
        return value

    @functools.wraps(function)
    def stays(*arguments: Any, **options: Any) -> Any:
        return on_cpu(function(*arguments, **options))

    return stays


QUANTIZED = (
    "calib.blockwise.model.BlockwiseModel._placed",
    "compressor.quantization.learn_transforms.Transforms.to",
    "calib.stats.moments.Moments.zero",
    "calib.losses.top_k.TopK.to",
    "compressor.quantization.objective.CalibrationBatch.read",
    "compressor.quantization.rounding.RoundedBlocks._block",
)
FORGOTTEN = {
    "unlearn.model.examples.Examples.to": "dmm",
    "unlearn.datamodels.gradients.projections": "dmm",
    "unlearn.model.train_ensembles.EnsembleTrainer.models": "oracle-matching",
    "unlearn.model.ensemble.Training.rate": "retrain",
}


@pytest.mark.parametrize("place", [*QUANTIZED, *FORGOTTEN, "calib.losses.chunked_head.Head.of"])
def test_a_tensor_that_is_left_on_the_cpu_is_found(
    place: str, tiny_folder: Path, text_file: Path, words: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one function gives stays on the CPU; without that the same jobs pass (`test_jobs`)."""
    owner, _, name = place.rpartition(".")
    module, _, kind = owner.rpartition(".")
    at: Any = import_module(owner) if kind.islower() else getattr(import_module(module), kind)
    before = inspect.getattr_static(at, name)
    static = isinstance(before, staticmethod)
    after = _stays(before.__func__ if static else before)
    monkeypatch.setattr(at, name, staticmethod(after) if static else after)
    with pytest.raises(RuntimeError, match="same device"):
        if place in FORGOTTEN:
            method = FORGOTTEN[place]
            more = {"multiplier": 1.0} if method == "dmm" else {}
            options = replace(wanted(words, method, **more), device="pretend")
            unlearn(words.model, tmp_path / "out", options, allow_damage=True)
        elif place in QUANTIZED:
            quantize(tiny_folder, tmp_path / "out", replace(PRETEND, data=text_file))
        else:
            distill(tiny_folder, tmp_path / "out", replace(DISTILL, data=text_file, layers=1, device="pretend"))

"""A candidate that is wrong is refused: by drawn weights, by real ones, or by both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calib.blockwise.model import BlockwiseModel
from calib.blockwise.skeleton import skeleton
from calib.blockwise.walk import Walk
from calib.jobs.journal import Journal
from calib.model.config import read_config
from calib.model.weights import Weights
from calib.probe.bench import normal, text
from calib.probe.find import find_parts
from calib.probe.parts import RESIDUAL, FoundParts, ModelParts
from compressor.transforms.proof import (
    PROVED,
    UNMET,
    Proof,
    TransformedPiece,
    Trial,
    left_out,
    parts_of,
    prove_block,
    prove_end,
    prove_model,
    prove_start,
    random_transform,
    residual_turn,
)
from tests import any_type, tiny

CPU = torch.device("cpu")


def walk_of(model_type: str, **more: Any) -> Walk:
    config = any_type.config_of(model_type)
    for name, value in more.items():
        setattr(config, name, value)
    return Walk(skeleton(config, CPU), {"input_ids": torch.arange(10).view(2, 5), "use_cache": False})


def refusals(walk: Walk, change: Callable[[FoundParts], FoundParts], index: int = 0) -> dict[str, str]:
    """What the proof refuses in a block with a candidate that is changed, and of the same as it was found: nothing."""
    parts = find_parts(walk)
    found, double = parts.blocks[index], walk.in_double()
    turn = None if parts.obstacle else residual_turn(walk.state_shape[-1], centred=parts.centred, device=CPU)
    assert prove_block(double, index, found, None, turn) == {}
    return prove_block(double, index, change(found), None, turn)


VALUES, UPS = "self_attn.v_proj -> self_attn.o_proj", "mlp.up_proj -> mlp.down_proj"


def pairs_changed(found: FoundParts, name: str, **changes: Any) -> FoundParts:
    return replace(found, pairs=tuple(replace(p, **changes) if p.name == name else p for p in found.pairs))


# Ten wrong candidates.


def test_a_transposed_axis() -> None:
    """An output projection, as wide as it is long, is turned along its inputs: as if it read from the stream."""

    def transposed(found: FoundParts) -> FoundParts:
        writers = tuple(name for name in found.writers if "o_proj" not in name)
        return replace(found, writers=writers, bare=("self_attn.o_proj.weight",))

    assert [*refusals(walk_of("llama"), transposed)] == [RESIDUAL]


def test_a_clamp_that_small_values_do_not_reach() -> None:
    walk = walk_of("olmo", clip_qkv=8.0)
    free = find_parts(walk_of("olmo", clip_qkv=None)).blocks[0]
    bad = prove_block(walk.in_double(), 0, free, None, None)
    assert f"scale of {VALUES}" in bad and f"rotation of {VALUES}" in bad and f"scale of {UPS}" not in bad


def test_a_reader_that_is_forgotten() -> None:
    def forgotten(found: FoundParts) -> FoundParts:
        return replace(found, norms=tuple(replace(n, readers=n.readers[:-1]) for n in found.norms))

    bad = refusals(walk_of("llama"), forgotten)
    assert {RESIDUAL, "scale of input_layernorm", "scale of post_attention_layernorm"} <= bad.keys()
    assert not any("->" in name for name in bad)


def test_a_second_reader_of_the_same_values() -> None:
    """Up projections of a gated feed-forward also taken for the gate's: it is no longer they alone that scale."""

    def swapped(found: FoundParts) -> FoundParts:
        return replace(
            found,
            pairs=tuple(
                replace(p, source=p.source.replace("up_proj", "gate_proj")) if p.name == UPS else p for p in found.pairs
            ),
        )

    bad = refusals(walk_of("llama"), swapped)
    assert [*bad] == ["scale of mlp.gate_proj -> mlp.down_proj"]


def test_a_writer_that_is_forgotten() -> None:
    bad = refusals(walk_of("llama"), lambda found: replace(found, writers=found.writers[:1]))
    assert [*bad] == [RESIDUAL]


def test_a_bias_that_is_forgotten() -> None:
    """GPT-2's output projections add one, as wide as the stream."""

    def forgotten(found: FoundParts) -> FoundParts:
        matrices = {name: replace(m, bias=None) for name, m in found.matrices.items()}
        return replace(found, matrices=matrices, writers=tuple(w for w in found.writers if not w.endswith("bias")))

    assert RESIDUAL in refusals(walk_of("gpt2"), forgotten)


def test_heads_that_share_no_values() -> None:
    def shuffled(found: FoundParts) -> FoundParts:
        (pair,) = (p for p in found.pairs if p.name == VALUES)
        return pairs_changed(found, VALUES, columns=pair.columns[::-1])

    bad = refusals(walk_of("llama"), shuffled)
    assert {*bad} == {f"scale of {VALUES}", f"rotation of {VALUES}"}


def test_values_that_turn_across_heads() -> None:
    """One group of all heads: scales hold, a rotation does not."""

    def joined(found: FoundParts) -> FoundParts:
        (pair,) = (p for p in found.pairs if p.name == VALUES)
        rows = tuple(r for group in pair.rows for r in group)
        copies = tuple(tuple(c for group in pair.columns for c in group[k]) for k in range(len(pair.columns[0])))
        return pairs_changed(found, VALUES, rows=(rows,), columns=(copies,))

    assert [*refusals(walk_of("llama"), joined)] == [f"rotation of {VALUES}"]


def test_planes_of_another_layout() -> None:
    """Neighbours, where it is halves that the rotary embedding turns."""

    def neighbours(found: FoundParts) -> FoundParts:
        channels = tuple((2 * c, 2 * c + 1) for c in range(8))
        return replace(found, planes=tuple(replace(p, channels=channels) for p in found.planes))

    assert {*refusals(walk_of("llama"), neighbours)} == {"key scale of self_attn", "key angle of self_attn"}


def test_a_layer_norm_taken_for_an_rms_norm() -> None:
    """Its mean does not turn: only rotations that leave the ones alone pass."""
    walk = walk_of("gpt2")
    parts = find_parts(walk)
    assert parts.centred
    turn = residual_turn(64, centred=False, device=CPU)
    assert RESIDUAL in prove_block(walk.in_double(), 0, parts.blocks[0], None, turn)


def test_experts_that_no_token_meets() -> None:
    """What is not seen is not proved."""
    walk = walk_of("mixtral")
    found, turn = find_parts(walk).blocks[0], residual_turn(64, centred=False, device=CPU)
    double = walk.in_double()
    assert prove_block(double, 0, found, None, turn) == {}
    few = replace(found, matrices={n: replace(m, experts=m.experts and 9) for n, m in found.matrices.items()})
    bad = prove_block(double, 0, few, None, turn)
    assert bad[RESIDUAL] == UNMET and bad["scale of mlp.experts.gate_up_proj -> mlp.experts.down_proj"] == UNMET
    assert f"scale of {VALUES}" not in bad


def test_a_table_that_is_forgotten_and_a_head_with_another_norm() -> None:
    walk = walk_of("gpt2")
    parts, double = find_parts(walk), walk.in_double()
    turn = residual_turn(64, centred=True, device=CPU)
    assert prove_start(double, parts.start, None, turn) == {} == prove_end(double, parts.end, None, turn)
    start = replace(parts.start, writers=parts.start.writers[:1])  # without the positions
    assert [*prove_start(double, start, None, turn)] == [RESIDUAL]
    (norm,) = parts.end.norms
    end = replace(parts.end, norms=(replace(norm, offset=1.0),))
    assert RESIDUAL in prove_end(double, end, None, turn)


# Real weights.


def job_of(model: nn.Module, folder: Path) -> tuple[BlockwiseModel, ModelParts]:
    tiny.save(model, folder)
    stream = BlockwiseModel(read_config(folder), Weights(folder), CPU)
    return stream, parts_of(stream)


def admitted(stream: BlockwiseModel, parts: ModelParts, folder: Path) -> ModelParts:
    journal, proof = Journal(folder), Proof(stream, parts)
    proof.start(journal, stream.read_start())
    proof.end(journal, stream.read_end())
    for i in range(stream.layers):
        proof.block(journal, i, stream.read_block(i))
    return proof.admitted(journal)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral"])
def test_real_weights_admit_what_drawn_ones_do(model_type: str, tmp_path: Path) -> None:
    stream, parts = job_of(tiny.model_of(tiny.config_of(model_type)).float(), tmp_path / "model")
    assert admitted(stream, parts, tmp_path) == parts


def test_weights_that_a_rotation_cannot_pass_are_left_out_and_said(tmp_path: Path) -> None:
    """A bias of a layer norm goes into the rotated basis divided by the gain: where that is zero there is none."""
    model: Any = any_type.model_of("gpt2").float()
    block = model.transformer.h[2]
    block.ln_1.weight.data[5], block.ln_1.bias.data[5] = 0.0, 1.0
    stream, parts = job_of(model, tmp_path / "model")
    assert parts.obstacle is None
    now = admitted(stream, parts, tmp_path)
    assert now.obstacle is not None and "changes what is computed by inf" in now.obstacle
    assert [bool(found.refused) for found in now.blocks] == [False, False, True, False]
    assert left_out(now)["residual_rotation"] == now.obstacle


def test_a_proof_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the journal is not asked again."""
    stream, parts = job_of(tiny.model_of(tiny.config_of("llama")).float(), tmp_path / "model")
    admitted(stream, parts, tmp_path)

    def never(*_: object, **__: object) -> dict[str, str]:
        raise AssertionError("asked again")

    monkeypatch.setattr("compressor.transforms.proof.prove_block", never)
    monkeypatch.setattr("compressor.transforms.proof.prove_start", never)
    assert admitted(stream, parts, tmp_path) == parts


@pytest.mark.parametrize("model_type", ["bloom", "bert", "gemma2", "mbart", "ctrl"])
def test_models_that_admit_no_rotation_say_why(model_type: str) -> None:
    """Bloom and mBART norm what they embed, CTRL multiplies it; the others norm what is written."""
    walk = walk_of(model_type)
    reasons = left_out(prove_model(walk, find_parts(walk)))
    assert reasons["residual_rotation"]


def test_the_bound_is_far_from_what_is_right_and_from_what_is_wrong() -> None:
    walk = walk_of("llama")
    found = find_parts(walk).blocks[0]
    double, shapes = walk.in_double(), walk.modules[0].state_dict()

    def run(params: Any, hidden: Tensor) -> Tensor:
        return double.run(0, params, hidden, text(double, hidden))

    trial = Trial([TransformedPiece(run, found, shapes, None)], found, normal("tokens", (2, 10, 64)))
    turn = residual_turn(64, centred=False, device=CPU)
    assert trial.apart(random_transform(found), turn) < PROVED / 1e4
    wrong = replace(found, writers=found.writers[:1])
    trial = Trial([TransformedPiece(run, wrong, shapes, None)], wrong, normal("tokens", (2, 10, 64)))
    assert trial.apart(random_transform(found), turn) > PROVED * 1e6


def test_outputs_that_are_no_numbers_prove_nothing() -> None:
    """Equal in being none on both sides."""
    walk = walk_of("llama")
    found, double, shapes = find_parts(walk).blocks[0], walk.in_double(), walk.modules[0].state_dict()

    def run(params: Any, hidden: Tensor) -> Tensor:
        return double.run(0, params, hidden, text(double, hidden)) * torch.nan

    trial = Trial([TransformedPiece(run, found, shapes, None)], found, normal("tokens", (2, 10, 64)))
    assert len(trial.refused(residual_turn(64, centred=False, device=CPU))) > 1

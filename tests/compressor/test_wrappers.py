"""Models that see images and write text: the text tower is quantized, all else stays, images are seen as before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from calib.blockwise.model import BlockwiseModel
from calib.model.config import read_config
from calib.model.weights import Weights
from calib.probe.find import find_parts, walk_of_config
from calib.probe.images import image_inputs
from calib.probe.parts import RESIDUAL
from compressor import Quantize, load, quantize
from compressor.transforms.proof import left_out, parts_of, prove_images, residual_turn
from tests import any_type

WRAPPERS = ["llava", "mistral3", "qwen3_vl", "internvl"]


def config_of(model_type: str) -> Any:
    config = any_type.config_of(model_type)
    if model_type == "qwen3_vl":  # features of its vision tower's first and third block are added behind blocks of text
        config.vision_config.deepstack_visual_indexes = [0, 2]
    if model_type == "llava":
        config.vision_config.image_size = 4 * config.vision_config.patch_size
        config.image_token_index = config.image_token_id = any_type.VOCAB - 2
    return config


def model_of(model_type: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config_of(model_type)).float()
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.1 + (p.dim() == 1)
    model.save_pretrained(folder)
    return model


def options_in(folder: Path, **more: Any) -> Quantize:
    ids = torch.randint(20, any_type.VOCAB - 4, (12, 16), generator=torch.Generator().manual_seed(2))
    save_file({"input_ids": ids}, folder / "ids.safetensors")
    return Quantize(
        scheme="w4a16-g8", samples=6, held_out=4, length=16, data=folder / "ids.safetensors", untie=None, **more
    )  # fmt: skip


def seen_by(model: Any, image: dict[str, Any]) -> Tensor:
    floats = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in image.items()}
    with torch.no_grad():
        return model(**floats).logits  # type: ignore[no-any-return]


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_a_rotated_text_tower_sees_the_same_image(model_type: str, tmp_path: Path) -> None:
    """In the library's own class; and what is neither of the text tower nor the projector keeps its bytes."""
    model = model_of(model_type, tmp_path / "model")
    options = options_in(tmp_path, rounding="none", learn=False)
    report = quantize(tmp_path / "model", tmp_path / "out", options)
    assert "residual_rotation" not in report["left_out"]
    image = image_inputs(walk_of_config(model.config).in_double())
    rotated = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    before, after = seen_by(model, image), seen_by(rotated, image)
    assert apart(after, before) < 1e-5
    other = image | {"pixel_values": image["pixel_values"].flip(-1)}
    assert apart(seen_by(model, other), before) > 0.01, "an image that does not matter proves nothing"
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    towers = [name for name in one if "vis" in name and "merger" not in name]
    assert len(towers) > 20 and all(torch.equal(one[name], two[name]) for name in towers)


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_a_quantized_wrapper_is_the_library_s_own_of_text_and_of_images(model_type: str, tmp_path: Path) -> None:
    model = model_of(model_type, tmp_path / "model")
    options = options_in(tmp_path, steps=2, tune_steps=2, batch=2)
    report = quantize(tmp_path / "model", tmp_path / "out", options, allow_damage=True)
    assert {layer["name"].partition(".layers.")[1] for layer in report["layers"]} == {".layers."}
    assert not any("vis" in layer["name"] for layer in report["layers"])
    ours, plain = (
        load(tmp_path / "out"),
        AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32),
    )
    assert type(ours) is type(plain) is type(model)
    image = image_inputs(walk_of_config(model.config).in_double())
    ids = torch.arange(20, 36).view(2, 8)
    assert torch.equal(seen_by(ours, image), seen_by(plain, image))
    assert torch.equal(seen_by(ours, {"input_ids": ids}), seen_by(plain, {"input_ids": ids}))


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_a_projector_that_is_forgotten_is_refused(model_type: str) -> None:
    walk = walk_of_config(config_of(model_type))
    parts, double = find_parts(walk), walk.in_double()
    turn = residual_turn(walk.state_shape[-1], centred=parts.centred, device=torch.device("cpu"))
    assert prove_images(double, parts.start, turn) == {}
    text = tuple(name for name in parts.start.writers if name in walk.entering)
    assert len(text) < len(parts.start.writers)
    assert [*prove_images(double, replace(parts.start, writers=text), turn)] == [RESIDUAL]
    if model_type == "qwen3_vl":
        some = tuple(name for name in parts.start.writers if "deepstack_merger_list.1" not in name)
        assert some != parts.start.writers
        assert [*prove_images(double, replace(parts.start, writers=some), turn)] == [RESIDUAL]


def test_where_an_image_cannot_be_made_up_nothing_turns() -> None:
    parts = find_parts(walk_of_config(any_type.config_of("fuyu")))
    assert parts.obstacle is not None and "could not be run with an image (it takes no image)" in parts.obstacle


def test_an_image_that_reaches_nothing_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids without an image's token, and features that are dropped then: nobody knows what has to turn."""
    walk = walk_of_config(config_of("internvl"))
    inputs = image_inputs(walk.in_double())
    monkeypatch.setattr("calib.probe.images.image_inputs", lambda _: inputs | {"pixel_values": None})
    obstacle = find_parts(walk).obstacle
    assert obstacle is not None and "could not be run with an image" in obstacle


def test_a_checkpoint_of_the_wrapper_is_opened_as_that(tmp_path: Path) -> None:
    """Where the library has a class of the text tower alone, too, the checkpoint says which it is of."""
    model = model_of("qwen3_5", tmp_path / "model")
    stream = BlockwiseModel(read_config(tmp_path / "model"), Weights(tmp_path / "model"), torch.device("cpu"))
    assert type(stream.skeleton) is type(model) and "vision" not in str(left_out(parts_of(stream)).get("norm_scales"))

"""Models that see images and write text: the text tower is quantized, all else stays, images are seen as before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from benchmarks.key_configs import CONFIGS
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
# Of key models, whose images come as patches with places or masks, or whose tables of positions are stretched.
KEY = ["Llama-4-Scout", "Kimi-K2.6", "LFM2-VL-1.6B"]


def config_of(model_type: str) -> Any:
    if model_type in CONFIGS:
        found = CONFIG_MAPPING[CONFIGS[model_type]["model_type"]].from_dict(dict(CONFIGS[model_type]))
        found.architectures = [AutoModelForImageTextToText._model_mapping[type(found)].__name__]
        return found
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
    ids = torch.randint(20, any_type.VOCAB - 20, (12, 16), generator=torch.Generator().manual_seed(2))
    save_file({"input_ids": ids}, folder / "ids.safetensors")
    return Quantize(
        scheme="w4a16-g8", samples=6, held_out=4, length=16, data=folder / "ids.safetensors", **more
    )  # fmt: skip


def seen_by(model: Any, image: dict[str, Any]) -> Tensor:
    floats = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in image.items()}
    with torch.no_grad():
        return model(**floats).logits  # type: ignore[no-any-return]


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("model_type", [*WRAPPERS, *KEY])
def test_a_rotated_text_tower_sees_the_same_image(model_type: str, tmp_path: Path) -> None:
    """In the library's own class; and what is neither of the text tower nor the projector keeps its bytes."""
    model = model_of(model_type, tmp_path / "model")
    options = options_in(tmp_path, rounding="none", learn=False, tied="untie")
    report = quantize(tmp_path / "model", tmp_path / "out", options)
    assert "residual_rotation" not in report["left_out"]
    image = image_inputs(walk_of_config(model.config).in_double())
    rotated = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    before, after = seen_by(model, image), seen_by(rotated, image)
    assert apart(after, before) < 1e-5
    other = image | {"pixel_values": image["pixel_values"].flip(-1)}
    assert apart(seen_by(model, other), before) > 0.01, "an image that does not matter proves nothing"
    one, two = model.state_dict(), rotated.state_dict()
    towers = [name for name in one if "vis" in name and "merger" not in name]
    assert len(towers) > 20 and all(torch.equal(one[name], two[name]) for name in towers)


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_a_quantized_wrapper_is_the_library_s_own_of_text_and_of_images(model_type: str, tmp_path: Path) -> None:
    model = model_of(model_type, tmp_path / "model")
    options = options_in(tmp_path, steps=2, block_steps=2, tune_steps=2, batch=2)
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


@pytest.mark.parametrize("model_type", [*WRAPPERS, *KEY])
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


def test_an_image_of_patches_with_places_is_made_up() -> None:
    """Of Gemma 4, whose positions are looked up in two slices of one table."""
    inputs = image_inputs(walk_of_config(config_of("Gemma-4-31B")).in_double())
    assert inputs["pixel_values"].shape[:2] == inputs["image_position_ids"].shape[:2] == (1, 36)
    assert int((inputs["input_ids"] == 150).sum()) == 4


@pytest.mark.parametrize("turned", [True, False])
def test_experts_that_the_library_turns_by_their_shape(turned: bool, tmp_path: Path) -> None:
    """Of Qwen3-VL's mixtures, which lie on the hub as (in, out), and as (out, in) where the library saved them."""
    model = model_of("Qwen3-VL-30B-A3B", tmp_path / "model")
    file, name = tmp_path / "model" / "model.safetensors", "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert model.get_parameter(name).shape == (8, 256, 64)
    if turned:
        stored = {n: p.mT.contiguous() if ".experts." in n else p for n, p in load_file(file).items()}
        save_file(stored, file, {"format": "pt"})
    ids = {"input_ids": torch.arange(20, 36).view(2, 8)}
    quantize(tmp_path / "model", tmp_path / "turned", options_in(tmp_path, rounding="none", learn=False))
    rotated = AutoModelForImageTextToText.from_pretrained(tmp_path / "turned", dtype=torch.float32)
    assert apart(seen_by(rotated, ids), seen_by(model, ids)) < 1e-5
    options = options_in(tmp_path, init="none", learn=False, rounding="rtn", block_steps=0, tune_steps=0)
    quantize(tmp_path / "model", tmp_path / "out", options, allow_damage=True)
    experts = load(tmp_path / "out").get_parameter(name).detach()
    assert apart(experts, model.get_parameter(name).detach()) < 0.1  # half a step of sixteen


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

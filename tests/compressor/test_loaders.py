"""What the report says of loaders is so: of every kind of scheme and model, plain transformers answers as was measured,
or is not named and refuses the folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from compressor import Quantize, load, quantize
from tests import tiny

IDS = torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(0))
QUICK = Quantize(samples=2, held_out=1, length=16, learn=False, rounding="rtn")
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "moe_intermediate_size": 64}
PLAIN, SWITCH, NOT = "plain", "dequantize=True", "not at all"

# How transformers runs it: dense models, mixtures of experts.
TABLE = {
    "w4a16-g32": (PLAIN, PLAIN),
    "w3a16-channel": (PLAIN, PLAIN),
    "w4a16-channel-asym": (SWITCH, NOT),
    "w4a16-g32-asym": (SWITCH, NOT),
    "w8a8": (PLAIN, NOT),
    "w4a8-channel-asym": (PLAIN, NOT),
    "w4a16kv4": (NOT, NOT),
    "w4a16-g32 mixed": (PLAIN, NOT),
    "w4a16-g32-asym mixed": (NOT, NOT),
    "nf4": (PLAIN, None),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for kind in ("phi3", "qwen3_moe"):
        config = tiny.config_of(kind, **(WIDE if kind == "qwen3_moe" else {**WIDE, "moe_intermediate_size": None}))
        tiny.save(tiny.model_of(config, dtype=torch.float32), root / kind)
    return root


def answers(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits.float()
    return found


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in TABLE for k in ("phi3", "qwen3_moe") if (n, k) != ("nf4", "qwen3_moe")])  # fmt: skip  # noqa: E501
def test_transformers_is_named_where_it_answers_as_measured(
    name: str, kind: str, models: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "nf4":
        pytest.importorskip("bitsandbytes", reason="needs the extra eight-bit")
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    scheme, _, mixed = name.partition(" ")
    options = replace(
        QUICK, scheme=scheme, data=text_file, **({"target_bits": 5.0, "candidate_bits": "4,8"} if mixed else {})
    )
    report = quantize(models / kind, tmp_path / "out", options)["loaders"]
    ours, says = answers(load(tmp_path / "out")), TABLE[name][kind == "qwen3_moe"]
    assert any("transformers" in loader for loader in report["loaders"]) == (says != NOT)
    assert any("only with" in note for note in report["notes"]) == (says == SWITCH)
    switch = {"quantization_config": CompressedTensorsConfig(dequantize=True)}

    def theirs(**more: Any) -> Tensor:
        return answers(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **more))

    if says == PLAIN:
        assert (theirs() - ours).abs().max() < 1e-4 * ours.abs().max()
        return
    if says == SWITCH and Version(transformers.__version__) < Version("5.21"):  # which need no switch
        assert (theirs() - ours).abs().max() < 1e-4 * ours.abs().max()
    else:
        with pytest.raises(Exception, match=r"load_with_parewell|mismatched"):
            theirs()
    if says == SWITCH:
        with pytest.warns(UserWarning, match="dequantize|quantization_config"):
            assert (theirs(**switch) - ours).abs().max() < 1e-4 * ours.abs().max()
    else:
        with pytest.raises(Exception, match="load_with_parewell"):
            theirs(**switch)

"""Widths of any type: what is cut is where a layout written down by hand says it is, and a wrong place is refused."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from calib import BadInput
from calib.blockwise.model import BlockwiseModel
from calib.model.weights import Weights
from calib.probe.units import FFN, HEADS, HIDDEN, ModelUnits
from cli.main import run_cli
from compressor.distillation.options import StudentSize
from compressor.distillation.prune import check_student_size
from compressor.pruning import widening
from compressor.pruning.widening import prove_widths
from compressor.pruning.widths import PruningPlan, units_of, widths_of
from tests import any_type, tiny
from tests.compressor.distillation.test_prune import logits, student_of

CPU = torch.device("cpu")
IDS = torch.randint(any_type.VOCAB, (2, 17), generator=torch.Generator().manual_seed(1))

# Axes of parameters, the first pattern that fits: d channels, g key/value heads of width h, each with m queries, f
# neurons; "." whatever it is; a minus stands before those that are read.
COMMON = {
    r"lm_head.weight|embed_out.weight": ". -d", r"lm_head.bias": ".", r".*(router|gate).weight": ". -d",
    r".*router.bias": ".", r".*sinks": "g m",
    r".*attn.q_norm.weight": "Q", r".*attn.k_norm.weight": "K",
    r".*q_proj.weight": "g m h -d", r".*[kv]_proj.weight": "g h -d",
    r".*q_proj.bias": "g m h", r".*[kv]_proj.bias": "g h",
    r".*(o_proj|attn.dense|attention.dense|out_proj).weight": "d -g -m -h",
    r".*(down_proj|fc2|dense_4h_to_h|c_proj).weight": "d -f",
    r".*(o_proj|dense|out_proj|down_proj|fc2|dense_4h_to_h|c_proj).bias": "d",
    r".*(gate_proj|up_proj|fc1|c_fc|dense_h_to_4h).weight": "f -d",
    r".*(gate_proj|up_proj|fc1|c_fc|dense_h_to_4h).bias": "f",
    r".*(norm|ln_\w+)\.(weight|bias)": "d", r".*(embed_tokens|embed_in|wte|embed_positions|wpe).weight": ". d",
}  # fmt: skip
LAYOUTS: dict[str, Mapping[str, str]] = {
    "gpt2": {
        r".*attn.c_attn.weight": "-d 3 g h", r".*attn.c_attn.bias": "3 g h", r".*attn.c_proj.weight": "-g -h d",
        r".*mlp.c_fc.weight": "-d f", r".*mlp.c_proj.weight": "-f d",
    },
    "gpt_neox": {r".*query_key_value.weight": "g 3 h -d", r".*query_key_value.bias": "g 3 h"},
    "opt": {}, "phi": {}, "starcoder2": {}, "cohere": {}, "granite": {}, "stablelm": {}, "nemotron": {}, "olmo2": {},
    "gemma3_text": {},
    "phi3": {r".*gate_up_proj.weight": "2 f -d", r".*qkv_proj.weight": "g m h|g h|g h -d"},
    "mixtral": {r".*experts.gate_up_proj": ". 2 f -d", r".*experts.down_proj": ". d -f"},
    "gpt_oss": {
        r".*experts.gate_up_proj": ". -d f 2", r".*experts.down_proj": ". -f d",
        r".*experts.gate_up_proj_bias": ". f 2", r".*experts.down_proj_bias": ". d",
    },
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "opt": {"word_embed_proj_dim": 64},
    "cohere": {"use_qk_norm": True},
    "gpt2": {"tie_word_embeddings": True},
}
OVER = {"olmo2": ("g m h", "g h"), "cohere": ("g m h", "g h")}  # what norms of queries and keys have a gain for
BOUND = ("gpt2", "gpt_neox", "opt", "stablelm")  # heads are as wide as the stream divided by their number
KINDS = [(HIDDEN,), (HEADS,), (FFN,), (HIDDEN, HEADS), (HIDDEN, HEADS, FFN)]


def model_of(model_type: str) -> nn.Module:
    """Small, of three blocks, drawn in double precision."""
    config = any_type.config_of(model_type).to_dict() | MORE.get(model_type, {})
    layers = {k: v[:3] for k, v in config.items() if k == "layer_types" and v}
    config = type(any_type.config_of(model_type)).from_dict(config | {"num_hidden_layers": 3} | layers)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    for name, p in model.named_parameters():
        p.data = torch.randn_like(p) * (0.5 if p.dim() > 1 else 0.2) + ("norm" in name or "ln_" in name)
    return model.requires_grad_(False)


class Silent:
    """Some of the units of each kind, and the others: these are copies of them that nobody reads.

    Args:
        sizes: of the axes, by letter.
        kinds: of units that go.
    """

    def __init__(self, sizes: Mapping[str, int], kinds: tuple[str, ...]) -> None:
        self._sizes, self.kept, self._like = sizes, dict[str, list[int]](), dict[str, Tensor]()
        for kind, letter in ((HIDDEN, "d"), (HEADS, "g"), (FFN, "f")):
            if kind in kinds:
                order = torch.randperm(sizes[letter], generator=torch.Generator().manual_seed(3))
                half = sizes[letter] // 2
                self.kept[kind], self._like[letter] = sorted(order[:half].tolist()), order.clone()
                self._like[letter][order] = order[:half].repeat(2)

    def of(self, p: Tensor, layout: str, silence: float = 0.0) -> Tensor:
        """A parameter with the units that go made copies, and `silence` where they are read."""
        rows, _, last = layout.rpartition(" ")
        if "|" in rows:
            parts = rows.split("|")
            sizes = [torch.Size(self._sizes[t] for t in part.split()).numel() for part in parts]
            return torch.cat([self.of(q, f"{part} {last}") for part, q in zip(parts, p.split(sizes), strict=True)])
        tokens, own = layout.split(), dict(self._sizes)
        shape, left = list[int](), list(p.shape)
        for token in tokens:  # those that fill one axis together
            size = left[0] if token == "." else int(token) if token.isdigit() else own[token.lstrip("-")]
            shape.append(size)
            left[0] //= size
            if left[0] == 1 and len(left) > 1:
                left.pop(0)
        value = p.reshape(shape)
        for axis, token in enumerate(tokens):
            like = self._like.get(token.lstrip("-"))
            if like is None:
                continue
            if token.startswith("-"):
                gone = (like != torch.arange(len(like))).nonzero()[:, 0]
                value = value.index_fill(axis, gone, silence)
            else:
                value = value.index_select(axis, like)
        return value.reshape(p.shape)


def silenced(model: Any, model_type: str, kinds: tuple[str, ...]) -> Silent:
    """Make half of the units of these kinds copies of the others that nobody reads, by the layout written above."""
    widths = widths_of(model.config)
    group, h = widths.group, widths.head_dim
    sizes = {"d": widths.counts[HIDDEN], "g": widths.counts[HEADS], "f": widths.counts[FFN], "m": group, "h": h}
    silent, layouts = Silent(sizes, kinds), {**LAYOUTS[model_type], **COMMON}
    queries, keys = OVER.get(model_type, ("h", "h"))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    final = re.compile(r"(model\.norm|transformer\.ln_f|model\.decoder\.final_layer_norm)\.(weight|bias)")
    for name, p in model.named_parameters():
        layout = next(layout for pattern, layout in layouts.items() if re.fullmatch(pattern, name))
        layout = {"Q": queries, "K": keys}.get(layout, layout)
        if tied and final.fullmatch(name):  # in place of a head that reads all channels
            p.data = silent.of(p.data, "-d", -1.0 if model_type.startswith("gemma") and "weight" in name else 0.0)
        else:
            p.data = silent.of(p.data, layout)
    return silent


def stream_of(model: Any, folder: Path) -> BlockwiseModel:
    return BlockwiseModel(model.config, Weights(tiny.save(model, folder / "teacher")), CPU, torch.float64)


def shape_of(model: Any, kinds: tuple[str, ...]) -> StudentSize:
    """Half of the units of these kinds."""
    widths = widths_of(model.config)
    counts = {kind: widths.counts[kind] // 2 * (widths.group if kind == HEADS else 1) for kind in kinds}
    return StudentSize(**counts)


ALONE = ("gpt2", "phi", "gpt_oss", "olmo2")
CASES = [(t, KINDS[-1]) for t in LAYOUTS] + [(t, kinds) for t in ALONE for kinds in KINDS[:-1]]


@pytest.mark.parametrize(("model_type", "kinds"), CASES)
def test_cutting_copies_that_nobody_reads_changes_nothing(
    model_type: str, kinds: tuple[str, ...], tmp_path: Path, double_kept: None
) -> None:
    """Each kind alone and all together; where all that goes is a copy of what stays, norms see the same means."""
    model = model_of(model_type)
    if model_type in BOUND and (HIDDEN in kinds) != (HEADS in kinds):
        with pytest.raises(BadInput, match="heads are 16 wide where hidden is 16 times heads, and else not"):
            check_student_size(shape_of(model, kinds), stream_of(model, tmp_path))
        return
    silent, ids = silenced(model, model_type, kinds), torch.arange(3)
    stream, kept = stream_of(model, tmp_path), silent.kept
    check_student_size(shape_of(model, kinds), stream)
    every = {kind: [kept[kind]] * len(ids) if kind in kept else None for kind in (HEADS, FFN)}
    plan = PruningPlan(ids.tolist(), every[HEADS], every[FFN], kept.get(HIDDEN))
    student = student_of(stream, plan, tmp_path)
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in model.parameters())
    assert torch.allclose(logits(student, IDS), logits(model, IDS), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "shape", "says"),
    [
        (
            "gpt2",
            StudentSize(heads=2),
            "heads: cannot be cut out of this teacher, as its heads are 16 wide where hidden",
        ),
        ("opt", StudentSize(hidden=32, ffn=48), "ffn, hidden: cannot be cut out of this teacher, as its heads"),
        (
            "bloom",
            StudentSize(ffn=128),
            "h_to_4h.weight would be .128, 64., where the library asks for .256, 64.",
        ),
        ("bloom", StudentSize(ffn=128, hidden=32, heads=2), "as block 0 would compute something else without them"),
        ("gpt_bigcode", StudentSize(heads=2), "heads: 2 were asked for, but 4 of the teacher's share one"),
        ("qwen2_moe", StudentSize(ffn=48), "ffn: cannot be cut out of this teacher, as 2 matrices of a block"),
        ("bitnet", StudentSize(heads=2), "heads: cannot be cut out of this teacher, as no attention layers"),
        ("biogpt", StudentSize(hidden=32, heads=2), "as what enters the blocks would be something else"),
        ("minicpm3", StudentSize(hidden=32), "as logits would be others"),
        ("mamba", StudentSize(ffn=48), "A_log would be .96, 16., where the library asks for .48, 16."),
        ("roformer", StudentSize(ffn=48), "of this teacher only depth can be cut, as its blocks are told of more"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_a_line(
    model_type: str, shape: StudentSize, says: str, tmp_path: Path
) -> None:
    """Positions that depend on the number of heads or of channels, widths that the config does not hold."""
    model: Any = any_type.model_of(model_type)
    with pytest.raises(BadInput, match=says) as refused:
        check_student_size(shape, stream_of(model, tmp_path))
    assert "\n" not in str(refused.value)


def moved(units: ModelUnits, kind: str, parameter: str, by: int) -> ModelUnits:
    """Units as they would be if some lay elsewhere: along the last axis of a parameter where they are known of."""

    def changed(piece: Any) -> Any:
        if kind not in piece.kinds:
            return piece
        axes = dict(piece.kinds[kind].axes)
        for name, axis in axes:
            if name.endswith(parameter):
                axes[name, axis] = axes[name, axis].roll(by)
        return replace(piece, kinds={**piece.kinds, kind: replace(piece.kinds[kind], axes=axes)})

    return ModelUnits(tuple(map(changed, units.blocks)), changed(units.start), changed(units.end))


@pytest.mark.parametrize(
    ("model_type", "kind", "parameter", "by", "says"),
    [
        ("phi", HEADS, "q_proj.weight", 16, "block 0 would compute something else"),
        ("phi", HEADS, "v_proj.weight", 1, "block 0 would compute something else"),
        ("phi", HEADS, "k_proj.bias", 16, "block 0 would compute something else"),
        ("phi", FFN, "fc1.bias", 1, "block 0 would compute something else"),
        ("phi", FFN, "fc2.weight", 1, "block 0 would compute something else"),
        ("phi", HIDDEN, "fc2.weight", 1, "block 0 would compute something else"),
        ("phi", HIDDEN, "input_layernorm.bias", 1, "block 0 would compute something else"),
        ("phi", HIDDEN, "lm_head.weight", 1, "logits would be others"),
        ("phi", HIDDEN, "final_layernorm.weight", 1, "logits would be others"),
        ("phi", HIDDEN, "embed_tokens.weight", 1, "what enters the blocks would be something else"),
        ("gpt_oss", HEADS, "sinks", 2, "block 0 would compute something else"),
        ("gpt_oss", FFN, "experts.gate_up_proj", 2, "block 0 would compute something else"),
        ("gpt_oss", HIDDEN, "router.weight", 1, "block 0 would compute something else"),
    ],
)
def test_a_wrong_place_is_refused(
    model_type: str, kind: str, parameter: str, by: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = any_type.config_of(model_type)
    assert prove_widths(config, (kind,)).reason is None
    wrong = moved(units_of(config), kind, parameter, by)
    monkeypatch.setattr(widening, "_known", {})
    monkeypatch.setattr(widening, "units_of", lambda _: wrong)
    assert says in (prove_widths(config, (kind,)).reason or "")


def test_a_place_that_is_missed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = any_type.config_of("phi")
    known = units_of(config)
    hidden = known.end.kinds[HIDDEN]
    axes = {axis: units for axis, units in hidden.axes.items() if axis[0] != "lm_head.weight"}
    missed = ModelUnits(known.blocks, known.start, replace(known.end, kinds={HIDDEN: replace(hidden, axes=axes)}))
    monkeypatch.setattr(widening, "_known", {})
    monkeypatch.setattr(widening, "units_of", lambda _: missed)
    says = "lm_head.weight would be [160, 64], where the library asks for [160, 32]"
    assert prove_widths(config, (HIDDEN,)).reason == says


def test_gpt2_is_cut_and_trained_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    any_type.model_of("gpt2").float().save_pretrained(tmp_path / "teacher")
    save_file({"input_ids": torch.arange(3, 131).view(8, 16)}, tmp_path / "ids.safetensors")
    words = ["parewell", "distill", tmp_path / "teacher", tmp_path / "out", "--heads", 2, "--ffn", 100, "--hidden", 32]
    words += ["--layers", 3, "--data", tmp_path / "ids.safetensors", "--length", 16, "--held-out", 2, "--steps", 2]
    monkeypatch.setattr(sys, "argv", [str(word) for word in [*words, "--batch", 2, "--allow-damage"]])
    try:
        run_cli()
    except SystemExit as status:
        assert not status.code
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())
    config = model.config
    assert (config.n_layer, config.n_head, config.n_embd, config.n_inner) == (3, 2, 32, 100)

"""Embedding and head on grids of their own, and linears that are left alone."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from calib import BadInput
from calib.data.corpus import Corpus
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal
from calib.jobs.options import with_new_names
from calib.jobs.recipe import read_recipe
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from cli.replay import replay_recipe
from compressor import Quantize, load, quantize
from compressor.engine.blockwise_runs import run_blocks
from compressor.engine.load import open_checkpoint, serving_note
from compressor.engine.runtime_transforms import RuntimeTransforms
from compressor.quantization.cost import estimate_quantization
from compressor.quantization.embedding.tables import head_inputs
from compressor.quantization.rounding import Rounder, nearest_linear, output_error, round_linears
from tests import tiny

ONE, TWO = "model.embed_tokens", "lm_head"
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("tied") / "model")


def folder_of(folder: Path, kind: str = "llama", **more: Any) -> Path:
    return tiny.save(tiny.model_of(tiny.config_of(kind, **{**SIZES, **more}), dtype=torch.float32), folder)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Quantize:
    folder = tmp_path_factory.mktemp("rows")
    drawn = torch.Generator().manual_seed(0)
    for name, rows in (("rows", 6), ("test", 2)):
        save_file(
            {"input_ids": torch.randint(3, tiny.VOCAB, (rows, 24), generator=drawn)}, folder / f"{name}.safetensors"
        )
    return Quantize(
        scheme="w4a16-g32", learn=False, init="none", samples=6, held_out=2, length=24,
        data=folder / "rows.safetensors", held_out_data=folder / "test.safetensors",
    )  # fmt: skip


def made(folder: Path, out: Path, options: Quantize, **more: Any) -> dict[str, Any]:
    return quantize(folder, out, replace(options, **more), allow_damage=True)


def says(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


IDS = torch.arange(3, 25)[None]


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    ("options", "stored", "opens"),
    [  # opens: with which values of dequantize
        ({"scheme": "w8a16-channel", "embedding": "w8"}, {ONE}, {True}),
        ({"scheme": "w8a16-channel", "embedding": "w8", "lm_head": "w8"}, {ONE, TWO}, {True}),
        ({"lm_head": "w8"}, {TWO}, {False}),
        ({"scheme": "w8a8", "lm_head": "w8"}, {TWO}, {False}),
        ({"embedding": "w8", "lm_head": "w4-g64"}, {ONE, TWO}, set()),
    ],
)
def test_transformers_says_what_is_measured_or_stops(
    kind: str, options: dict[str, Any], stored: set[str], opens: set[bool], quick: Quantize, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "model", kind)
    report = made(folder, tmp_path / "out", quick, **options)
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {
        name.removesuffix(".weight_packed") for name in tensors if "layers" not in name and "packed" in name
    } == stored
    assert (f"{TWO}.weight" in tensors, f"{ONE}.weight" in tensors) == (False, ONE not in stored)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] == (stored == {ONE}) == (not report["untied"])
    ours = says(load(tmp_path / "out"), IDS)
    for dequantize in (False, True):
        how = CompressedTensorsConfig(dequantize=dequantize)
        open_it = lambda how=how: AutoModelForCausalLM.from_pretrained(  # noqa: E731
            tmp_path / "out", dtype=torch.float32, quantization_config=how
        )
        if dequantize in opens:
            assert torch.equal(says(open_it(), IDS), ours)
        else:
            with pytest.raises((AttributeError, RuntimeError)):
                says(open_it(), IDS)
    named = "transformers (with the compressed-tensors package)" in report["loaders"]["loaders"]
    assert named == bool(opens)
    assert ("vLLM" in report["loaders"]["loaders"]) == (stored != {ONE})


def test_a_head_of_one_table_is_read_exactly(tied: Path, quick: Quantize, tmp_path: Path) -> None:
    """Codes times scales, of one tensor, is what both modules have."""
    made(tied, tmp_path / "out", quick, embedding="w4-g32")
    checkpoint, model = open_checkpoint(tmp_path / "out", CPU), load(tmp_path / "out")
    table, before = checkpoint.rounded_table(ONE), load_file(tied / "model.safetensors")[f"{ONE}.weight"]
    assert torch.equal(table.codes, nearest_linear(before, Grid(4, group=32), torch.float32).codes)
    assert table.grid == Grid(4, group=32) and table.scale.shape == (tiny.VOCAB, 2)
    values = (table.codes.view(tiny.VOCAB, 2, 32) * table.scale.float()[..., None]).flatten(1)
    assert torch.equal(model.get_input_embeddings().weight, values)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_bytes_foretold_are_bytes_written(tied: Path, quick: Quantize, tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "--tied keep": {"tied": "keep"},
        "--tied untie": {"tied": "untie", "init": "hadamard"},
        "--tied keep --embedding w8": {"tied": "keep", "embedding": "w8"},
        "--embedding w8 --lm-head w8": {"embedding": "w8", "lm_head": "w8"},
        "": {"embedding": "w3-g16", "lm_head": "w5-channel", "ignore": ("re:.*down_proj",), "scheme": "w4a16-g32-asym"},
    }
    for words, options in cases.items():
        asked = replace(quick, rounding="rtn", **options)
        report = quantize(tied, tmp_path / "out", asked, allow_damage=True)
        tensors = load_file(tmp_path / "out/model.safetensors")
        written = sum(tensor.nbytes for tensor in tensors.values())
        assert sum(report["parts"].values()) == written == report["bytes"]["after"]
        embedding = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(ONE))
        assert report["parts"]["embedding"] == embedding
        assert set(report["choices"]) == set(cases) - {""} and (not words or report["choices"][words] == written)
    cost = estimate_quantization(tied, tmp_path / "none", asked)
    assert cost.out_bytes == written and cost.out_parts == report["parts"] and cost.choices == report["choices"]


def calibration_of(options: Quantize) -> Corpus:
    assert options.data is not None
    ids = load_file(options.data)["input_ids"]
    return Corpus(ids, torch.ones_like(ids, dtype=torch.bool), 0, "rows")


def test_the_head_is_rounded_on_what_the_final_norm_gives(tied: Path, quick: Quantize, tmp_path: Path) -> None:
    """The error that is reported is that of the folder on its calibration rows, as the library's code runs it."""
    report = made(tied, tmp_path / "out", quick, lm_head="w3-g16")
    model, seen = load(tmp_path / "out"), list[Tensor]()
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]) or None)
    assert quick.data is not None
    says(model, load_file(quick.data)["input_ids"])
    x, exact = seen[0].flatten(0, 1), load_file(tied / "model.safetensors")[f"{ONE}.weight"]
    off, whole = ((x @ w.mT).square().sum() for w in (model.lm_head.weight - exact, exact))
    assert report["tables"]["head"]["error"] == pytest.approx(float(off / whole), rel=1e-3)
    nearest = nearest_linear(exact, Grid(3, group=16), torch.float32).weight()
    assert report["tables"]["head"]["error"] < 0.9 * float((x @ (nearest - exact).mT).square().sum() / whole)
    assert report["tables"]["head"] == {"name": TWO, "scheme": "w3-g16", "error": report["tables"]["head"]["error"]}


def test_a_head_rounded_by_gptq_is_nearer_on_its_inputs(tied: Path, quick: Quantize, tmp_path: Path) -> None:
    stream = open_checkpoint(tied, CPU).stream
    (tmp_path / "journal").mkdir()
    context, corpus = RunContext(Journal(tmp_path / "journal"), 2**30), calibration_of(quick)
    plain, outer = [RuntimeTransforms()] * stream.layers, stream.read_outer()
    states = run_blocks(stream, corpus, outer, stream.reading, plain, context)
    moments = head_inputs(stream, outer, states, corpus.mask)
    weight, grid = outer[f"{TWO}.weight"], Grid(3, group=16)
    errors = [
        round_linears({TWO: weight}, moments, {TWO: grid}, Rounder(method, 0.01), torch.float32)[TWO][1]
        for method in ("gptq", "rtn")
    ]
    assert moments.count == corpus.ids.numel() and errors[0] < 0.9 * errors[1]
    assert output_error(weight, weight, moments) == 0


def test_padding_is_no_input_of_the_head(tied: Path, quick: Quantize, tmp_path: Path) -> None:
    stream = open_checkpoint(tied, CPU).stream
    (tmp_path / "journal").mkdir()
    context, whole = RunContext(Journal(tmp_path / "journal"), 2**30), calibration_of(quick)
    plain, outer = [RuntimeTransforms()] * stream.layers, stream.read_outer()
    grams = []
    for corpus, mask in ((whole, whole.mask.clone()), (whole[:3], whole.mask[:3])):
        mask[3:] = False
        states = run_blocks(stream, corpus, outer, stream.reading, plain, context)
        grams.append(head_inputs(stream, outer, states, mask))
    assert grams[0].count == grams[1].count == 3 * 24
    torch.testing.assert_close(grams[0].gram, grams[1].gram)


def test_everything_is_made_again_byte_for_byte(tied: Path, quick: Quantize, tmp_path: Path) -> None:
    made(tied, tmp_path / "out", quick, embedding="w8", lm_head="w4-g32", ignore=("re:.*layers.1.mlp",))
    assert replay_recipe(tmp_path / "out", tmp_path / "again").agrees
    step = read_recipe(tmp_path / "out")[-1]
    assert step["embedding"] == {ONE: "w8"} and step["lm_head"] == {TWO: "w4-g32"}
    assert Scheme.read(step).recorded.items() <= step.items()


@pytest.mark.parametrize(("untie", "tied"), [(True, "untie"), (False, "keep"), (None, "light")])
def test_recipes_that_say_untie_mean_what_they_did(untie: bool | None, tied: str) -> None:
    found = with_new_names("quantize", {"untie": untie})
    assert found["tied"] == tied and "untie" not in found


def test_a_recipe_of_before_is_replayed_by_the_rule_of_before(quick: Quantize, tmp_path: Path) -> None:
    """Weights alone, a light second table: untied then, kept now."""
    folder = folder_of(tmp_path / "model", intermediate_size=512)
    more = {"init": "hadamard", "rounding": "rtn", "scheme": "w8a16-channel"}
    assert made(folder, tmp_path / "out", quick, tied="light", **more)["untied"]
    assert not made(folder, tmp_path / "now", quick, **more)["untied"]
    old = Path(shutil.copytree(tmp_path / "out", tmp_path / "old"))
    steps = read_recipe(old)
    options = steps[0]["options"]
    options["untie"] = options.pop("tied") and None
    for later in ("embedding", "lm_head", "ignore"):
        del options[later]
    (old / "parewell.json").write_text(json.dumps({"recipe": steps}))
    assert replay_recipe(old, tmp_path / "again").files["model.safetensors"] is None


def test_ignored_linears_stay_as_they_are(tied: Path, quick: Quantize, tmp_path: Path) -> None:
    """The first reader of an input, a whole block, all of a kind: what is left is rounded, measured and read."""
    patterns = ("model.layers.0.self_attn.q_proj", "re:.*layers.1.mlp.(gate|up|down)_proj$", "lm_head")
    for scheme in ("w4a16-g32", "w8a8"):
        report = made(tied, tmp_path / "out", quick, ignore=patterns, scheme=scheme, block_steps=2, tune_steps=1)
        before, after = (load_file(f / "model.safetensors") for f in (tied, tmp_path / "out"))
        ignored = [patterns[0], *(f"model.layers.1.mlp.{one}_proj" for one in ("gate", "up", "down"))]
        listed = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
        assert {*ignored, "lm_head"} == set(listed)
        for name in ignored:
            assert after[f"{name}.weight"].dtype == torch.float32 and f"{name}.weight_scale" not in after
            if scheme == "w4a16-g32":
                assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
        assert len(report["layers"]) == 14 - 4 and not {one["name"] for one in report["layers"]} & set(ignored)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        torch.testing.assert_close(says(model, IDS), says(load(tmp_path / "out"), IDS), rtol=0, atol=1e-5)


def test_rotations_go_through_ignored_linears_and_bits_are_allocated_without_them(
    tied: Path, quick: Quantize, tmp_path: Path
) -> None:
    ignore = ("re:.*layers.0.",)
    more = {"scheme": "w8a16-channel", "init": "hadamard", "tied": "untie", "learn": True, "steps": 1, "batch": 2}
    learned = made(tied, tmp_path / "learned", quick, ignore=ignore, block_steps=0, tune_steps=0, **more)
    assert learned["quality"]["kl"] < 0.02, "or the rotation was lost on the way"
    mixed = made(tied, tmp_path / "mixed", quick, ignore=ignore, target_bits=4.0, profile_rows=2)
    assert {name for part in mixed["precision"]["parts"] for name in part["linears"]} == {
        one["name"] for one in mixed["layers"]
    }
    assert mixed["bytes"]["after"] == sum(mixed["parts"].values())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"ignore": ("nothing",)}, "ignore 'nothing': no linear of this model has such a name"),
        ({"ignore": ("re:(",)}, "is no regular expression"),
        ({"ignore": ("re:.*",)}, "nothing is left to quantize"),
        ({"ignore": ("lm_head",), "lm_head": "w8"}, "is the head, which --lm-head rounds"),
        ({"embedding": "w4-g48"}, "group size 48 does not divide the width 64"),
        ({"lm_head": "w4-g48"}, "group size 48 does not divide the width 64"),
    ],
)
def test_what_a_model_does_not_have_is_refused(
    options: dict[str, Any], line: str, tied: Path, quick: Quantize, tmp_path: Path
) -> None:
    with pytest.raises(BadInput) as error:
        quantize(tied, tmp_path / "out", replace(quick, **options))
    assert line in str(error.value) and "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"embedding": "8"}, "embedding '8' is unknown"),
        ({"embedding": "w9"}, "embedding 'w9' is unknown"),
        ({"lm_head": "w4"}, "lm-head w4: does not say how many weights share a scale"),
        ({"embedding": "w8", "scheme": "nf4"}, "bitsandbytes keeps embedding and head in 16 bits"),
        ({"lm_head": "w8", "rounding": "none", "init": None}, "rounding none leaves them in 16 bits"),
        ({"tied": "keep", "lm_head": "w8"}, "tied keep leaves one table"),
        ({"tied": "untie"}, "init none rotates nothing"),
        ({"tied": "both"}, "tied 'both' is unknown; choose from auto, keep, untie, light"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], line: str, quick: Quantize) -> None:
    with pytest.raises(BadInput) as error:
        replace(quick, **options)
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "served"), [("k_proj", False), ("[qkv]_proj", True), ("o_proj", True), ("up_proj", False)]
)
def test_vllm_is_named_only_where_what_it_puts_together_is_ignored_together(pattern: str, served: bool) -> None:
    leaves = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
    ignored = tuple(f"model.layers.0.x.{leaf}" for leaf in leaves if re.fullmatch(pattern, leaf))
    note = serving_note(replace(Scheme.parse("w4a16-g64"), ignored=ignored), online=False, experts=False)
    assert ("vLLM" in note["loaders"]) == served

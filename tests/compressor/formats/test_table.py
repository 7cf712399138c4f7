"""`parewell formats`: no format is forgotten, and what the table says of each is what its code does."""

from __future__ import annotations

import ast
import itertools
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from calib import BadInput
from calib.blockwise.model import BlockwiseModel
from calib.model.config import read_config
from calib.model.weights import Weights
from calib.quant.block_types import BLOCK_TYPES
from calib.quant.codebooks import CODEBOOKS
from calib.quant.scheme import PRESETS, Scheme
from cli.main import parewell
from compressor import Export
from compressor.exporters.export import format_of
from compressor.exporters.format import ExportJob
from compressor.exporters.options import EXPORT_FORMATS, STORED_FORMATS
from compressor.formats.storing import FutureOutput
from compressor.formats.table import FormatRow, format_rows, markdown_table
from compressor.storage.codecs import CODECS, codec_name, codec_of
from compressor.storage.description import FormatDescription
from tests import counts, tiny

OUT, WIDTH = 96, 1024
BITS, GROUPS = range(2, 9), (8, 16, 32, 48, 64, 96, 128, 256, 512, None)
SAID = {"integers in words", "bytes"}  # of compressed-tensors, what is made of whole numbers


@pytest.fixture(scope="module")
def rows() -> list[FormatRow]:
    return format_rows()


def test_every_module_that_exports_is_a_format_of_the_command() -> None:
    """Whoever adds an exporter and forgets its line is told so."""
    prefix = "compressor.exporters."
    written = {
        module.removeprefix(prefix)
        for module, tree in counts.TREES.items()
        if module.startswith(prefix)
        for node in tree.body
        if isinstance(node, ast.Assign) and [ast.unparse(one) for one in node.targets] == [counts.ENTRIES]
    }
    assert written == {entry.module for entry in EXPORT_FORMATS.values()} and written


def test_the_table_has_every_format(rows: list[FormatRow]) -> None:
    titles = [row.about.title for row in rows]
    assert len(set(titles)) == len(titles)
    assert {row.to for row in rows} - {""} == set(EXPORT_FORMATS)
    for codec in CODECS.values():
        assert {about.title for about in codec.descriptions.values()} <= set(titles)
    assert {row.format for row in rows} - {""} == set(STORED_FORMATS)
    for row in rows:
        assert row.readers and all(getattr(row.about, f.name) != "" for f in fields(row.about) if f.name != "zero_bits")
        assert row.readers[: len(EXPORT_FORMATS[row.to].loaders)] == EXPORT_FORMATS[row.to].loaders if row.to else True


def test_every_scheme_s_layout_is_described() -> None:
    for name in [*PRESETS, *BLOCK_TYPES, *CODEBOOKS, "wmxfp4amxfp4", "wmxfp8a16", "w5a6-g64", "w8a16-g32-asym"]:
        scheme, codec = Scheme.parse(name), codec_name(Scheme.parse(name))
        layout = codec
        if codec == "compressed-tensors":
            layout = codec_of(scheme).config(scheme, plain=True, dtype="", ignore=())["format"]
        elif codec == "bitsandbytes":
            layout = name
        about = CODECS[codec].descriptions[layout]
        activations = 16 if scheme.activations is None else scheme.activations.kind.upper()
        assert str(activations) in about.activations or (str(activations).isdecimal() and "2 to 8" in about.activations)
        if scheme.weights.is_even:
            assert about.zero_points or scheme.weights.symmetric
        if codec == "compressed-tensors" and about.contents not in SAID and scheme.weights.rows == 1:
            assert str(scheme.weights.group or "channel") in about.groups and about.bits == str(scheme.weights.bits)


def counted(text: str, **values: int) -> float:
    """What a formula of the table comes to."""
    return float(eval(text.partition(",")[0], {"__builtins__": {}}, values))


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [*itertools.product((3, 4, 8), (16, 128, None), (True, False))]
)
def test_bits_per_weight_of_schemes_are_those_of_the_table(bits: int, group: int | None, symmetric: bool) -> None:
    name = f"w{bits}a16{f'-g{group}' if group else '-channel'}{'' if symmetric else '-asym'}"
    about = CODECS["compressed-tensors"].descriptions["pack-quantized"]
    found = counted(about.bits_per_weight, b=bits, g=group or WIDTH)
    found += 0 if symmetric else counted(about.zero_bits, b=bits, g=group or WIDTH)
    assert found == pytest.approx(Scheme.parse(name).bits_per_weight("l", WIDTH))


@pytest.mark.parametrize("name", ["w8a8", "wfp8afp8", "wfp8a16", "wnvfp4a16", "wmxfp4a16", "wmxfp8a16", "nf4", "fp4"])
def test_bits_per_weight_of_floating_point_are_those_of_the_table(name: str) -> None:
    scheme = Scheme.parse(name)
    layout = name if scheme.table_name else codec_of(scheme).config(scheme, plain=True, dtype="", ignore=())["format"]
    text = codec_of(scheme).descriptions[layout].bits_per_weight
    found = counted(text, b=scheme.weights.bits, g=scheme.weights.group or WIDTH)
    assert found == pytest.approx(scheme.bits_per_weight("l", WIDTH))


@pytest.mark.parametrize(("to", "bits", "group", "symmetric"), [
    (to, bits, group, symmetric)
    for to, every in {"gptq": (3, 4), "awq": (4,), "mlx": (3, 4), "onnx": (4, 8)}.items()
    for bits, group, symmetric in itertools.product(every, (32, 128), (True, False))
])  # fmt: skip
def test_bits_per_weight_of_exports_are_those_of_the_table(to: str, bits: int, group: int, symmetric: bool) -> None:
    form = format_of(Export(to=to))
    scheme = Scheme.parse(f"w{bits}a16-g{group}{'' if symmetric else '-asym'}")
    stream = SimpleNamespace(expected={"l.weight": (OUT, WIDTH)})
    checkpoint: Any = SimpleNamespace(scheme=scheme, stream=stream)
    found = counted(form.about.bits_per_weight, b=bits, g=group, n=OUT)
    found += 0 if symmetric or not form.about.zero_bits else counted(form.about.zero_bits, b=bits, g=group)
    assert found == pytest.approx(form.bits(ExportJob(Path(), checkpoint, torch.bfloat16, to), "l"))


def test_bits_per_weight_of_block_types_are_those_of_the_table() -> None:
    text = format_of(Export(to="gguf")).about.bits_per_weight
    assert {f"{kind.bits_per_weight:g} ({name.upper()})" for name, kind in BLOCK_TYPES.items()} <= {*text.split(", ")}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BlockwiseModel]:
    """A model all of whose linears have 1,536 inputs, which all of GROUPS divide."""
    sizes = {"hidden_size": 1536, "intermediate_size": 1536, "head_dim": 384, "num_key_value_heads": 4,
             "num_hidden_layers": 1, "attention_bias": False, "mlp_bias": False}  # fmt: skip
    model = tiny.model_of(tiny.config_of("llama", **sizes), dtype=torch.bfloat16)
    folder = tiny.save(model, tmp_path_factory.mktemp("wide"))
    return folder, BlockwiseModel(read_config(folder), Weights(folder), torch.device("cpu"))


def said(about: FormatDescription, bits: int, group: int | None) -> bool:
    """Whether the table says that a format holds codes of so many bits in such groups."""
    every = BITS if about.bits == "2 to 8" else [int(one) for one in about.bits.split(", ")]
    parts = about.groups.split(", ")
    if group is None:
        fits = "channel" in parts
    elif parts[0].startswith("multiples of "):
        fits = group % int(parts[0].split()[-1]) == 0
    elif "multiples of these" in parts:
        fits = any(group % int(one) == 0 for one in parts if one.isdecimal())
    else:
        fits = str(group) in parts
    return bits in every and fits


def cases() -> Iterator[tuple[str, int, int | None, bool]]:
    for to in ("gptq", "awq", "mlx", "onnx"):
        yield from ((to, bits, group, symmetric) for bits in BITS for group in GROUPS for symmetric in (True, False))


def test_a_format_takes_the_schemes_that_the_table_says(wide: tuple[Path, BlockwiseModel]) -> None:
    """For every number of bits, every group, with and without zero points, by the checks of export."""
    folder, stream = wide
    for to, bits, group, symmetric in cases():
        name = f"w{bits}a16{f'-g{group}' if group else '-channel'}{'' if symmetric else '-asym'}"
        try:
            FutureOutput(folder, stream, Scheme.parse(name)).checked(to)
            takes = True
        except BadInput as error:
            takes = to == "mlx" and "--dtype float32" in str(error)  # by which export takes zero points
        assert takes == said(format_of(Export(to=to)).about, bits, group), (to, name)


def test_the_page_has_the_table(rows: list[FormatRow]) -> None:
    """If this fails: replace the table in docs/formats.md by what `parewell formats --markdown` prints."""
    page = (counts.ROOT / "docs/formats.md").read_text(encoding="utf-8")
    assert markdown_table(rows) in page


def test_the_command_prints_it_for_people_and_for_programs(rows: list[FormatRow]) -> None:
    run = CliRunner().invoke
    assert run(parewell, ["formats", "--markdown"]).output == markdown_table(rows)
    found = json.loads(run(parewell, ["formats", "--json"]).output)
    assert [row["title"] for row in found] == [row.about.title for row in rows]
    assert found[0]["format"] == "compressed-tensors" and found[0]["to"] is None
    text = run(parewell, ["formats"]).output
    for row in rows:
        assert f"\n{row.about.title}\n" in f"\n{text}"
    assert "two ways to print" in run(parewell, ["formats", "--json", "--markdown"]).output

"""An importance matrix is read back as it was written, and refused where it is of another model or no such file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib import BadInput
from calib.stats.moments import Moments
from compressor.storage.imatrix import Imatrix, read_imatrix, write_imatrix

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

NAMES = ("blk.0.attn_q.weight", "blk.0.ffn_down_exps.weight")
SHAPES = {NAMES[0]: (1, 6), NAMES[1]: (3, 4)}


def drawn(seed: int = 0) -> Imatrix:
    draw = torch.Generator().manual_seed(seed)
    squares = {name: torch.rand(shape, generator=draw) * 1e3 for name, shape in SHAPES.items()}
    counts = {NAMES[0]: torch.tensor([512.0]), NAMES[1]: torch.tensor([300.0, 0.0, 212.0])}
    return Imatrix(squares, counts, ("wiki.txt", "code.txt"), 4, 128)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    file, wrote = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf", drawn(seed)
    write_imatrix(file, wrote)
    assert [found.name for found in file.parent.iterdir()] == ["imatrix.gguf"]
    read = read_imatrix(file, SHAPES)
    assert (read.datasets, read.chunk_count, read.chunk_size) == (("wiki.txt", "code.txt"), 4, 128)
    for name in SHAPES:
        assert torch.equal(read.squares[name], wrote.squares[name])
        assert torch.equal(read.counts[name], wrote.counts[name])


def test_the_file_is_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    """Dimensions (inputs, matrices) and (1, matrices), in gguf's order; no architecture."""
    write_imatrix(tmp_path / "i.gguf", drawn())
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    assert {t.name: (t.shape.tolist(), t.tensor_type.name) for t in reader.tensors} == {
        f"{NAMES[0]}.in_sum2": ([6, 1], "F32"), f"{NAMES[0]}.counts": ([1, 1], "F32"),
        f"{NAMES[1]}.in_sum2": ([4, 3], "F32"), f"{NAMES[1]}.counts": ([1, 3], "F32"),
    }  # fmt: skip
    assert reader.fields["general.type"].contents() == "imatrix"
    assert "general.architecture" not in reader.fields
    names = {key for key in reader.fields if key.startswith("imatrix.")}
    assert names == {gguf.Keys.IMatrix.DATASETS, gguf.Keys.IMatrix.CHUNK_COUNT, gguf.Keys.IMatrix.CHUNK_SIZE}


def test_means_are_the_diagonal_of_a_gram_matrix(tmp_path: Path) -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    moments = Moments.zero(6).add(x)
    squares = {NAMES[0]: moments.gram.diagonal()[None], NAMES[1]: drawn().squares[NAMES[1]]}
    counts = {NAMES[0]: torch.tensor([float(moments.count)]), NAMES[1]: drawn().counts[NAMES[1]]}
    write_imatrix(tmp_path / "i.gguf", Imatrix(squares, counts, ("drawn",), 1, 50))
    read = read_imatrix(tmp_path / "i.gguf", SHAPES)
    assert torch.allclose(read.mean(NAMES[0])[0], (x**2).mean(0), rtol=1e-6)
    experts = read.mean(NAMES[1])
    assert torch.equal(experts[1], torch.ones(4))  # which saw nothing
    assert torch.allclose(experts[2], drawn().squares[NAMES[1]][2] / 212)


def test_one_of_another_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "i.gguf"
    write_imatrix(file, drawn())
    with pytest.raises(BadInput, match=r"has 'blk.0.attn_q.weight' of 1 x 6 inputs, the model 1 x 8; it is of another"):
        read_imatrix(file, SHAPES | {NAMES[0]: (1, 8)})
    with pytest.raises(BadInput, match="of 3 x 4 inputs, the model has no such weight"):
        read_imatrix(file, {NAMES[0]: (1, 6)})
    more = SHAPES | {"blk.1.attn_q.weight": (1, 6), "output.weight": (1, 6)}
    with pytest.raises(BadInput, match=r"lacks 'blk\.1\.attn_q\.weight'; it is of another model"):
        read_imatrix(file, more, optional=["output.weight"])
    assert read_imatrix(file, SHAPES | {"output.weight": (1, 6)}, optional=["output.weight"])


def test_what_is_no_imatrix_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "i.gguf"
    with pytest.raises(BadInput, match="is no file"):
        read_imatrix(file, SHAPES)
    file.write_bytes((3).to_bytes(4, "little") + b"blk.0.attn_q.weight")
    with pytest.raises(BadInput, match=r"old format; make it again with llama-imatrix --output-format gguf"):
        read_imatrix(file, SHAPES)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type("model")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
        step()
    with pytest.raises(BadInput, match="but no imatrix"):
        read_imatrix(file, SHAPES)
    write_imatrix(file, drawn())
    whole = file.read_bytes()
    for length in (4, 30, len(whole) // 2, len(whole) - 40):
        file.write_bytes(whole[:length])
        with pytest.raises(BadInput, match="cannot be read as an imatrix") as refused:
            read_imatrix(file, SHAPES)
        assert "\n" not in str(refused.value)


def test_sums_that_are_none_are_not_kept() -> None:
    good = drawn()
    for squares in (torch.tensor([[-1.0] * 6]), torch.full((1, 6), float("nan")), torch.ones(6)):
        with pytest.raises(ValueError, match="attn_q"):
            replace(good, squares=dict(good.squares) | {NAMES[0]: squares})
    with pytest.raises(ValueError, match="data set"):
        replace(good, datasets=())
    with pytest.raises(ValueError, match=r"differ in 'blk\.0\.attn_q\.weight'"):
        replace(good, counts={NAMES[1]: good.counts[NAMES[1]]})

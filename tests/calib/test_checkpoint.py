from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calib import BadInput
from calib.checkpoint import Shards, check_destination, writing
from calib.weights import Weights


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), writing(out) as scratch:
        (scratch / "half").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with writing(out) as scratch:
        (scratch / "whole").write_text("one")
        assert not out.exists()
    assert [f.name for f in out.iterdir()] == ["whole"]
    with pytest.raises(RuntimeError), writing(out) as scratch:
        (scratch / "whole").write_text("two")
        raise RuntimeError
    assert (out / "whole").read_text() == "one", "what was there survives a failed replacement"
    with writing(out) as scratch:
        (scratch / "whole").write_text("two")
    assert (out / "whole").read_text() == "two" and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_run_left(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/half").write_text("half")
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced/whole").write_text("earlier")
    with pytest.raises(RuntimeError), writing(tmp_path / "out") as scratch:
        assert [f.name for f in scratch.iterdir()] == [".lock"]
        raise RuntimeError
    assert (tmp_path / "out/whole").read_text() == "earlier"


def test_shards_and_their_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(10) for i in range(5)}
    shards = Shards(tmp_path, limit=100)
    for name, tensor in tensors.items():
        shards.add({name: tensor})
    shards.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == shards.bytes == 200
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    weights = Weights(tmp_path)
    for name, tensor in weights.read(tensors).items():
        assert torch.equal(tensor, tensors[name])


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    shards = Shards(tmp_path)
    shards.add({"t": torch.ones(3)})
    shards.close()
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["t"], torch.ones(3))


def test_an_empty_folder_may_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "out").mkdir()
    check_destination(tmp_path / "out", tmp_path / "model", 0)
    (tmp_path / "out/x").touch()
    with pytest.raises(BadInput):
        check_destination(tmp_path / "out", tmp_path / "model", 0)


def test_the_fingerprint_follows_the_bytes(tmp_path: Path) -> None:
    save_file({"t": torch.ones(3)}, tmp_path / "model.safetensors")
    one = Weights(tmp_path).fingerprint()
    save_file({"t": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert Weights(tmp_path).fingerprint() != one

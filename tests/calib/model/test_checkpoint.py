from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calib import BadInput
from calib.jobs.output_folder import Shards, atomic_folder, check_destination
from calib.model.weights import Weights


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), atomic_folder(out, 0) as scratch:
        (scratch / "half").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with atomic_folder(out, 0) as scratch:
        (scratch / "whole").write_text("one")
        assert not out.exists()
    assert [f.name for f in out.iterdir()] == ["whole"]
    with pytest.raises(RuntimeError), atomic_folder(out, 0) as scratch:
        (scratch / "whole").write_text("two")
        raise RuntimeError
    assert (out / "whole").read_text() == "one", "what was there survives a failed replacement"
    with atomic_folder(out, 0) as scratch:
        (scratch / "whole").write_text("two")
    assert (out / "whole").read_text() == "two" and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_run_left(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/half").write_text("half")
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced/whole").write_text("earlier")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out", 0) as scratch:
        assert not list(scratch.iterdir())
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
    check_destination(tmp_path / "out", [tmp_path / "model"], 0)
    (tmp_path / "out/x").touch()
    with pytest.raises(BadInput):
        check_destination(tmp_path / "out", [tmp_path / "model"], 0)


def test_the_fingerprint_follows_the_bytes(tmp_path: Path) -> None:
    save_file({"t": torch.ones(3)}, tmp_path / "model.safetensors")
    one = Weights(tmp_path).verify({"t": (3,)})
    assert Weights(tmp_path).verify({"t": (3,)}) == one
    save_file({"t": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert Weights(tmp_path).verify({"t": (3,)}) != one


def test_a_second_run_is_kept_out_to_the_very_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while files are being flushed to disk, when all of them are there but OUT is not."""
    refused = []

    def sync_and_try(path: Path) -> None:
        if (tmp_path / ".out.partial").exists():
            with pytest.raises(BadInput, match="another run is writing it"), atomic_folder(tmp_path / "out", 0):
                pass
            refused.append(path.name)

    monkeypatch.setattr("calib.jobs.output_folder.sync", sync_and_try)
    with atomic_folder(tmp_path / "out", 0) as scratch:
        (scratch / "whole").write_text("one")
    assert refused == ["whole", ".out.partial"]
    assert (tmp_path / "out/whole").read_text() == "one"


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere/out")
    for content in ("one", "two"):
        with atomic_folder(tmp_path / "link", 0) as scratch:
            (scratch / "config.json").write_text(content)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere/out/config.json").read_text() == "two"
    assert [f.name for f in (tmp_path / "elsewhere").iterdir()] == ["out"]


@pytest.mark.parametrize("recipe", ["{}", "[]", "", '{"recipe": 3}'])
def test_a_file_called_like_our_recipe_does_not_make_a_folder_ours(tmp_path: Path, recipe: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/parewell.json").write_text(recipe)
    with pytest.raises(BadInput, match="was not written by parewell"):
        check_destination(tmp_path / "out", [tmp_path / "model"], 0)


def test_what_the_user_put_into_our_folder_is_not_thrown_away(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/parewell.json").write_text('{"recipe": []}')
    check_destination(tmp_path / "out", [tmp_path / "model"], 0)
    (tmp_path / "out/notes.txt").write_text("dear diary")
    with pytest.raises(BadInput, match=r"holds notes\.txt, which parewell did not write"):
        check_destination(tmp_path / "out", [tmp_path / "model"], 0)


def test_what_an_interrupted_run_left_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 60, 40))  # type: ignore[attr-defined]
    with pytest.raises(BadInput, match="make room"):
        check_destination(tmp_path / "out", [tmp_path / "model"], 90)
    (tmp_path / ".out.journal").mkdir()
    (tmp_path / ".out.journal/teacher-0.page").write_bytes(bytes(50))
    check_destination(tmp_path / "out", [tmp_path / "model"], 90)
    with pytest.raises(BadInput, match="make room"):
        check_destination(tmp_path / "out", [tmp_path / "model"], 91)

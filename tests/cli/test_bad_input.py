"""Bad input: one line saying what, where and what to do; exit status 2; nothing written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calib import embedded
from calib.jobs.output_folder import atomic_folder
from compressor import Quantize, quantize
from tests import tiny
from tests.cli.conftest import Refusal


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def refused(text_file: Path, tmp_path: Path, refusal: Refusal) -> Refusal:
    """Run `parewell quantize MODEL OUT ...` and return the one line it refuses with."""

    def run(model: Path, *arguments: str, out: Path = tmp_path / "out") -> str:
        small = ["--samples", "4", "--held-out", "2", "--length", "16", "--no-learn", "--scheme", "w4a16-channel"]
        data = [] if "--data" in arguments else ["--data", str(text_file)]
        return refusal("quantize", model, out, *small, *data, *arguments)

    return run


def spoil(model: Path, name: str, value: torch.Tensor) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def index(model: Path, **weight_map: str) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


DOWN = "model.layers.1.mlp.down_proj.weight"


def test_sound_input_is_not_refused(model: Path, text_file: Path, tmp_path: Path) -> None:
    options = Quantize(scheme="w4a16-channel", data=text_file, samples=4, held_out=2, length=16, learn=False)
    quantize(model, tmp_path / "out", options)


def test_missing_shard(model: Path, refused: Refusal) -> None:
    index(model, **{DOWN: "model-00001-of-00002.safetensors"})
    assert "model-00001-of-00002.safetensors: this shard is missing" in refused(model)


def test_truncated_shard(model: Path, refused: Refusal) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors: not a complete safetensors file" in refused(model)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "sub/../../outside.safetensors"])
def test_index_that_names_a_file_outside(model: Path, name: str, refused: Refusal) -> None:
    shutil.copy(model / "model.safetensors", model.parent / "outside.safetensors")
    index(model, **{DOWN: name})
    assert f"names '{name}', a file outside the folder" in refused(model)


@pytest.mark.parametrize("listed", [True, False])
def test_link_to_a_file_outside(model: Path, listed: bool, refused: Refusal) -> None:
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    (model / "model.safetensors").symlink_to(model.parent / "outside.safetensors")
    if listed:
        index(model, **{DOWN: "model.safetensors"})
    assert "a file outside the folder" in refused(model)


def test_links_of_a_hub_cache_are_followed(model: Path, text_file: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/main", tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    shutil.move(model, snapshot)
    (snapshot / "model.safetensors").rename(blobs / "1234")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    options = Quantize(scheme="w4a16-channel", data=text_file, samples=4, held_out=2, length=16, learn=False)
    quantize(snapshot, tmp_path / "out", options)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_broken_index(model: Path, content: str, refused: Refusal) -> None:
    (model / "model.safetensors.index.json").write_text(content)
    assert "not a safetensors index" in refused(model)


def test_a_tensor_in_two_shards(model: Path, refused: Refusal) -> None:
    shutil.copyfile(model / "model.safetensors", model / "again.safetensors")
    index(model, a="again.safetensors", b="model.safetensors")
    assert "stands in again.safetensors as well" in refused(model)


def test_wrong_shape(model: Path, refused: Refusal) -> None:
    spoil(model, DOWN, torch.zeros(24, 41))
    line = refused(model)
    assert f"'{DOWN}' has shape [24, 41]" in line and "[24, 40]" in line


def test_wrong_dtype(model: Path, refused: Refusal) -> None:
    spoil(model, DOWN, torch.zeros(24, 40, dtype=torch.int32))
    assert f"'{DOWN}' has dtype torch.int32" in refused(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(model: Path, value: float, refused: Refusal) -> None:
    weight = torch.zeros(24, 40)
    weight[3, 4] = value
    spoil(model, DOWN, weight)
    assert f"'{DOWN}' contains NaN or Inf" in refused(model)


def test_missing_and_superfluous_tensors(model: Path, refused: Refusal) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors[DOWN]
    save_file(tensors, model / "model.safetensors")
    assert f"tensor '{DOWN}' is missing" in refused(model)
    spoil(model, DOWN, torch.zeros(24, 40))
    spoil(model, "model.layers.1.self_attn.q_norm.weight", torch.zeros(8))
    assert "'model.layers.1.self_attn.q_norm.weight' has no place" in refused(model)


def test_pickle(model: Path, refused: Refusal) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "holds only pickle weights" in refused(model)


def test_no_weights_no_config_no_folder(model: Path, refused: Refusal) -> None:
    (model / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refused(model)
    (model / "config.json").unlink()
    assert "config.json: is missing" in refused(model)
    assert "no such folder" in refused(model / "gone")


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("gpt2", "tensor 'transformer.h.0.attn.c_attn.bias' is missing"),
        ("no-such-thing", "model_type 'no-such-thing' is not known to transformers"),
        ("vit", "models of class LlamaForCausalLM are not taken here"),
    ],
)
def test_unknown_architecture(model: Path, model_type: str, message: str, refused: Refusal) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    assert message in refused(model)


def test_code_that_comes_with_a_model_is_never_run(model: Path, refused: Refusal) -> None:
    config = json.loads((model / "config.json").read_text())
    own = {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}
    (model / "config.json").write_text(json.dumps(config | own))
    assert "code that comes with a model is never run" in refused(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": "awq"}, "is quantized already (awq)"),
        ({"model_type": []}, "model_type [] is not known"),
        ({"hidden_act": "nonsense"}, "cannot build this model"),
        ({"num_attention_heads": "many"}, "config.json"),
        ({"num_hidden_layers": 1000}, "asks for 1000 blocks"),
        ({"num_hidden_layers": 10**12}, "asks for 1000000000000 blocks"),
        ({"head_dim": -8}, "cannot build this model"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"pad_token_id": 1000}, "cannot build this model"),
    ],
)
def test_spoilt_config(model: Path, changes: dict[str, object], message: str, refused: Refusal) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    assert message in refused(model)


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_broken_config(model: Path, content: str, refused: Refusal) -> None:
    (model / "config.json").write_text(content)
    assert "config.json" in refused(model)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "x.txt", "is empty"),
        (b"abc", "x.txt", "too short"),
        (b"abc \xff", "x.txt", "byte 4 is not UTF-8"),
        (b'{"text": "a"}\n{\n', "x.jsonl", "line 2: not JSON"),
    ],
)
def test_calibration_files(
    model: Path, tmp_path: Path, content: bytes, name: str, message: str, refused: Refusal
) -> None:
    (tmp_path / name).write_bytes(content)
    line = refused(model, "--data", str(tmp_path / name))
    assert name in line and message in line


def test_fewer_rows_than_asked_for(model: Path, refused: Refusal) -> None:
    assert "100000 were asked for" in refused(model, "--samples", "99998")


def test_token_ids_beyond_the_vocabulary(model: Path, tmp_path: Path, refused: Refusal) -> None:
    save_file({"input_ids": torch.full((8, 16), 61)}, tmp_path / "x.safetensors")
    assert "token id 61" in refused(model, "--data", str(tmp_path / "x.safetensors"))


def test_a_tokenizer_that_knows_more_than_the_model(model: Path, refused: Refusal) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["e"] = 77
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "token id 77" in refused(model)


def test_a_destination_that_is_not_ours(model: Path, tmp_path: Path, refused: Refusal) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    assert "exists and was not written by parewell" in refused(model)
    assert "exists and was not written by parewell" in refused(model, out=tmp_path / "out/thesis.txt")


def test_a_destination_inside_or_around_the_model(model: Path, tmp_path: Path, refused: Refusal) -> None:
    assert "lies inside the model folder" in refused(model, out=model / "out")
    assert "lies inside the model folder" in refused(model, out=model)
    assert "contains the model folder" in refused(model, out=tmp_path)
    assert "is no folder" in refused(model, out=tmp_path / "not/there")


def test_a_dry_run_of_a_resumed_job(model: Path, refused: Refusal) -> None:
    assert "leave out --resume" in refused(model, "--dry-run", "--resume")


def test_a_precision_that_is_not_there(model: Path, refused: Refusal) -> None:
    if not torch.cuda.is_available():
        assert "use --precision float32" in refused(model, "--precision", "bfloat16")


def test_no_space_before(model: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))  # type: ignore[attr-defined]
    assert "0 MB free" in refused(model)


@pytest.mark.parametrize(
    "where", ["calib.jobs.output_folder.save_file", "calib.jobs.journal.save_file", "os.posix_fallocate"]
)
def test_no_space_during(
    model: Path,
    where: str,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Refusal,
) -> None:
    """Not the input's fault, so status 1; one line, OUT absent, and the journal kept for --resume."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    module, _, name = where.rpartition(".")
    monkeypatch.setattr(sys.modules[module], name, full)
    small = ["--data", text_file, "--samples", 4, "--held-out", 2, "--length", 16, "--no-learn"]
    small += ["--memory-budget", 3e-6]  # so that states go to disk
    command = ["quantize", model, tmp_path / "out", "--scheme", "w4a16-channel", *small]
    line = refusal(*command, status=1)
    assert not (tmp_path / "out").exists()
    assert "no space left" in line and "needed; make room, then continue with --resume" in line


@pytest.mark.parametrize("scheme", ["w4", "int4", "w1a16"])
def test_unknown_scheme(model: Path, scheme: str, refused: Refusal) -> None:
    line = refused(model, "--scheme", scheme)
    assert f"'{scheme}' is unknown" in line and "w4a16-g64" in line


def test_a_group_that_does_not_divide_is_refused(model: Path, refused: Refusal) -> None:
    line = refused(model, "--scheme", "w4a16-g16")
    assert "group size 16" in line and "24" in line and "'q_proj'" in line and "w4a16-g8" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "samples is 0"),
        (["--samples", "-3"], "samples is -3"),
        (["--length", "1"], "length is 1"),
        (["--damping", "-1"], "damping is -1"),
        (["--rounding", "rtn", "--float-target"], "float-target"),
        (["--budget", "soon"], "is no time; write one such as 90s, 30m or 2h"),
        (["--budget", "0.01s"], "with a single step of tuning; give more"),
        (["--budget", "1h", "--halves"], "budget is of one job"),
        (["--budget", "1h", "--tune-steps", "9"], "leave one of them out"),
        (["--seed", "-1"], "seed is -1"),
        (["--seed", str(2**70)], "seed is"),
        (["--lr-scale", "nan"], "lr-scale is nan"),
        (["--init", "none", "--learn"], "leaves nothing to learn"),
        (["--rounding", "best"], "'best' is not one of"),
        (["--samples", "many"], "'many' is not a valid integer"),
        (["--device", "cuda"], "device cuda: torch "),
        (["--memory-budget", "-1"], "memory-budget is -1.0; it must not be negative"),
        (["--memory-budget", "0"], "one row of 16 tokens take 1,536 bytes, so give at least 2e-06, or leave it out"),
        (["--device", "cpu", "--device-memory", "8"], "this job runs on the CPU; use --memory-budget"),
        (["--device-memory", "-8"], "device-memory is -8.0; it must not be negative"),
    ],
)
def test_options(model: Path, arguments: list[str], message: str, refused: Refusal) -> None:
    if arguments[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert message in refused(model, *arguments)


def test_a_quantized_checkpoint(model: Path, tmp_path: Path, text_file: Path, refused: Refusal) -> None:
    options = Quantize(scheme="w4a16-channel", data=text_file, samples=4, held_out=2, length=16, learn=False)
    quantize(model, tmp_path / "first", options)
    assert "is quantized already (compressed-tensors)" in refused(tmp_path / "first")


def test_another_run_that_writes_the_same_folder(model: Path, tmp_path: Path, refused: Refusal) -> None:
    with atomic_folder(tmp_path / "out", 0):
        assert "another run is writing it" in refused(model)
    assert (tmp_path / "out").is_dir()


def test_evaluate_refuses_what_quantize_refuses(model: Path, text_file: Path, tmp_path: Path, refusal: Refusal) -> None:
    small = ("--data", text_file, "--length", 16)
    assert "no such folder" in refusal("evaluate", tmp_path / "gone", *small)
    one = tmp_path / "one.safetensors"
    save_file({"input_ids": torch.ones(3, 1, dtype=torch.int64)}, one)
    assert "at least two real tokens" in refusal("evaluate", model, "--data", one)
    assert "leave out --by-document" in refusal("evaluate", model, "--data", one, "--by-document")
    assert "2048 tokens" in refusal("evaluate", model, *small, "--reference", embedded.MODEL)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "not a complete safetensors file" in refusal("evaluate", model, *small)
    file.rename(model / "pytorch_model.bin")
    assert "holds only pickle weights" in refusal("evaluate", model, *small)


def test_show_and_report_of_other_folders(tmp_path: Path, refusal: Refusal) -> None:
    assert "has no parewell.json" in refusal("show", tmp_path)
    assert "has no report.json" in refusal("report", tmp_path)
    for name in ("parewell.json", "report.json"):
        (tmp_path / name).write_text("{}")
    assert "is no recipe" in refusal("show", tmp_path)
    assert "is no report" in refusal("report", tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        ["--no-learn"],
        ["--block-steps", "0", "--tune-steps", "0"],
        ["--rounding", "rtn", "--block-steps", "0", "--tune-steps", "0"],
        ["--preset", "fast"],
    ],
)
def test_learned_rounding_without_steps(options: list[str], refused: Refusal, tiny_folder: Path) -> None:
    assert "learn-rounding moves codes in tuning, of which there is none here" in refused(
        tiny_folder, "--learn-rounding", *options
    )


def test_published_recipes_that_are_none(refused: Refusal, tiny_folder: Path) -> None:
    assert "'spinquant' is not 'ostquant'" in refused(tiny_folder, "--recipe", "spinquant")
    line = refused(tiny_folder, "--recipe", "ostquant", "--preset", "best")
    assert "--preset and --recipe both say what is not given; leave one of them out" in line


def test_training_of_nothing(refused: Refusal, tiny_folder: Path) -> None:
    for option, value in (("--batch", "2"), ("--lr-tune", "0.1"), ("--loss", "partial")):
        line = refused(tiny_folder, "--learn", "--no-learn", "--tune-steps", "0", option, value)
        assert f"{option[2:]}: changes nothing" in line


def test_a_rate_of_codes_that_stay(refused: Refusal, tiny_folder: Path) -> None:
    line = refused(tiny_folder, "--tune-steps", "2", "--no-learn-rounding", "--lr-rounding", "0.1")
    assert "lr-rounding: changes nothing with --no-learn-rounding; leave it out" in line
    line = refused(tiny_folder, "--tune-steps", "2", "--block-steps", "2", "--lr-rounding", "0.1")
    assert "lr-rounding: is for tuning of the whole model" in line and "--block-steps 0" in line


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["--learn", "--rotation-block", "16"],
            "rotation-block is 16, and does not divide the hidden size 24; take one that does",
        ),
        (
            ["--learn", "--rotation-block", "8", "--init", "womi"],
            "rotation-block: blocks are learned behind a Hadamard",
        ),
        (
            ["--learn", "--rotation-block", "8", "--tied", "keep"],
            "rotation-block: is of the residual stream's rotation, which tied keep leaves out",
        ),
        (["--rotation-block", "8", "--no-learn"], "rotation-block: changes nothing"),
    ],
)
def test_rotations_in_blocks(options: list[str], line: str, refused: Refusal, tiny_folder: Path) -> None:
    assert line in refused(tiny_folder, "--scheme", "w4a8-g8", *options)


def test_groups_that_learned_rotations_would_cut_across(refused: Refusal, tmp_path: Path) -> None:
    config = tiny.config_of("llama", hidden_size=96, intermediate_size=96, head_dim=32, tie_word_embeddings=False)
    folder = tiny.save(tiny.model_of(config, dtype=torch.float32), tmp_path / "model")
    line = refused(folder, "--scheme", "w4a16-g32", "--learn", "--rotation-block", "24")
    assert "rotation-block is 24, and would cut across groups of 32 weights; take a multiple or a divisor of 32" in line


def test_profiles_that_mean_nothing(refused: Refusal, tiny_folder: Path, tmp_path: Path) -> None:
    assert "limit: changes nothing without --target-bits" in refused(tiny_folder, "--limit")
    assert "profile: changes nothing without --target-bits" in refused(tiny_folder, "--profile", "measured")
    mixtral = tiny.save(tiny.model_of(tiny.config_of("mixtral"), dtype=torch.float32), tmp_path / "mixtral")
    assert "limit: needs gradients" in refused(mixtral, "--target-bits", "3.5", "--limit")


def test_text_like_deployment_that_will_not_do(refused: Refusal, tiny_folder: Path, tmp_path: Path) -> None:
    empty, short, rows, gone = (tmp_path / f"{name}.jsonl" for name in ("empty", "short", "rows", "gone"))
    empty.touch()
    short.write_text('{"text": "the quick brown fox"}\n')
    rows.write_text('{"text": "the lazy dog sleeps on"}\n' * 9)
    assert "gone.jsonl: cannot be read" in refused(tiny_folder, "--like", str(gone))
    assert "empty.jsonl: is empty" in refused(tiny_folder, "--like", str(empty))
    assert "short.jsonl: too short" in refused(tiny_folder, "--like", str(short), "--length", "64")
    few = refused(tiny_folder, "--like", str(short), "--by-document", "--data", str(rows), "--samples", "7")
    assert "short.jsonl gives 16 tokens, too few for a covariance in 24 components, which takes 96" in few
    plain = ("--rounding", "rtn", "--like", str(short))
    assert "this job has no calibration data to compare" in refused(tiny_folder, *plain)


def test_tell_apart_rates_that_mean_nothing(refused: Refusal, tiny_folder: Path) -> None:
    for asked in ("50%", "0.5", "100%", "52", "-1", "inf"):
        assert "between 50%, which is guessing, and 100%" in refused(tiny_folder, "--tell-apart", asked)
    assert "is no rate" in refused(tiny_folder, "--tell-apart", "low")
    assert "leave one of them out" in refused(tiny_folder, "--tell-apart", "52%", "--target-bits", "4")
    assert "has 4 bits for every weight" in refused(tiny_folder, "--tell-apart", "52%", "--scheme", "nf4")

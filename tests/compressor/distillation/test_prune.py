"""A student is its teacher less some parts; which parts go is checked against slow and obvious ways to choose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from calib import BadInput
from calib.blockwise.model import BlockwiseModel
from calib.blockwise.skeleton import skeleton
from calib.data.corpus import Corpus
from calib.data.load import load_corpus
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal
from calib.jobs.output_folder import Shards
from calib.model.checkpoint import read_tokenizer
from calib.model.config import read_config
from calib.model.weights import Weights
from calib.runtime.progress import recording
from compressor.distillation.options import StudentSize
from compressor.distillation.prune import (
    block_influence,
    check_student_size,
    choose,
    choose_decoder_layers,
    importance,
    student_tensors,
)
from compressor.pruning.widths import PruningPlan, student_config
from tests import tiny, walked
from tests.architectures import ARCHITECTURES, architecture_of, assembled, separated, sizes_of

DENSE = sorted(name for name, architecture in ARCHITECTURES.items() if architecture.experts is None)
CPU = torch.device("cpu")
SEEN = torch.randint(tiny.VOCAB, (3, 17), generator=torch.Generator().manual_seed(1))


def rows(count: int = 6, length: int = 11) -> Corpus:
    """Random tokens; every second row is padded."""
    ids = torch.randint(tiny.VOCAB, (count, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[::2, 7:] = False
    return Corpus(ids, mask, "random", None)


def teacher_of(model_type: str, layers: int = 3, **more: Any) -> nn.Module:
    if model_type.startswith("gemma"):
        kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
        more = {"layer_types": kinds[:layers]} | more
    return tiny.model_of(tiny.config_of(model_type, num_hidden_layers=layers, **more))


def stream_of(model: nn.Module, folder: Path) -> BlockwiseModel:
    return BlockwiseModel(model.config, Weights(tiny.save(model, folder / "teacher")), CPU, torch.float64)


def everything(stream: BlockwiseModel) -> PruningPlan:
    has = sizes_of(stream.config)
    heads, ffn = [list(range(has.kv_heads))] * has.layers, [list(range(has.ffn))] * has.layers
    return PruningPlan(list(range(has.layers)), heads, ffn, list(range(has.hidden)))


def context_in(folder: Path) -> RunContext:
    return RunContext(Journal(folder), 10**9)


def student_of(stream: BlockwiseModel, cut: PruningPlan, folder: Path) -> nn.Module:
    """Written to disk and read by the library, which must find every tensor that it looks for and no other."""
    (folder / "student").mkdir()
    student_config(stream.config, cut).save_pretrained(folder / "student")
    shards = Shards(folder / "student")
    for name, tensor in student_tensors(stream, cut):
        shards.add({name: tensor})
    shards.close()
    attention = "eager" if stream.config.model_type in ("gemma2", "gpt_oss") else "sdpa"
    model, found = AutoModelForCausalLM.from_pretrained(
        folder / "student", dtype=torch.float64, attn_implementation=attention, output_loading_info=True
    )
    assert not any(found.values()), found
    for buffer in model.buffers():  # the library keeps these in single precision, unless it loads in double
        buffer.data = buffer.data.float().to(buffer.dtype)
    assert "parewell" not in (folder / "student/config.json").read_text()
    return model.eval()


def logits(model: nn.Module, ids: Tensor = SEEN) -> Tensor:
    model.set_experts_implementation("eager")  # the library's default for experts knows no double precision
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def without_others(model: nn.Module, layers: Sequence[int]) -> nn.Module:
    """The library's own model, changed in place to have these of its blocks alone."""
    blocks = model.get_submodule("model.layers")
    model.get_submodule("model").layers = nn.ModuleList([blocks[i] for i in layers])
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in layers]
    model.config.num_hidden_layers = len(layers)
    return model


def parts_of(stream: BlockwiseModel, block: int) -> dict[str, Tensor]:
    """One tensor for each linear of a block, and the factors of norms, by the names of the anatomy."""
    return {name: p.clone() for name, p in separated(stream.read_block(block), stream.config).items()}


def change(stream: BlockwiseModel, model: nn.Module, block: int, values: dict[str, Tensor]) -> None:
    """Give one of the library's blocks these parameters, by the names of the anatomy."""
    params = assembled(parts_of(stream, block) | values, stream.config)
    for name, parameter in model.get_submodule(f"model.layers.{block}").named_parameters():
        parameter.data = params[name].clone()


# What is cut.


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
@pytest.mark.parametrize("tied", [True, False])
def test_keeping_everything_gives_the_teacher_s_tensors_bit_for_bit(
    model_type: str, tied: bool, tmp_path: Path
) -> None:
    model = teacher_of(model_type, tie_word_embeddings=tied).to(torch.bfloat16)
    stream = stream_of(model, tmp_path)
    stored = stream.read_parameters(stream.names.sources)
    given = dict(student_tensors(stream, everything(stream)))
    assert given.keys() == stored.keys()
    for name in stored:
        assert given[name].dtype == torch.bfloat16 and torch.equal(given[name], stored[name]), name


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_fewer_blocks_are_the_library_s_model_with_the_others_deleted(model_type: str, tmp_path: Path) -> None:
    model = teacher_of(model_type, layers=4)
    stream, layers = stream_of(model, tmp_path), [0, 2, 3]
    whole = everything(stream)
    cut = replace(whole, layers=layers, kv_heads=whole.kv_heads[:3], ffn=whole.ffn[:3])
    student = student_of(stream, cut, tmp_path)
    assert torch.allclose(logits(student), logits(without_others(model, layers)), atol=1e-12)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
@pytest.mark.parametrize("tied", [True, False])
def test_any_cut_loads_and_runs_in_the_library_as_in_the_stream(model_type: str, tied: bool, tmp_path: Path) -> None:
    stream = stream_of(teacher_of(model_type, tie_word_embeddings=tied), tmp_path)
    cut = choose(stream, rows(), StudentSize(layers=2, heads=2, ffn=23, hidden=20), context_in(tmp_path))
    student = student_of(stream, cut, tmp_path)
    config = student.config
    ffn = getattr(config, "moe_intermediate_size", config.intermediate_size)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert (config.hidden_size, ffn) == (20, 23)
    again = BlockwiseModel(read_config(tmp_path / "student"), Weights(tmp_path / "student"), CPU, torch.float64)
    assert torch.allclose(logits(student), walked.logits_of(again, SEEN), atol=1e-12)


@pytest.mark.parametrize("model_type", DENSE)
def test_cutting_neurons_that_write_nothing_changes_nothing(model_type: str, tmp_path: Path, double_kept: None) -> None:
    model = teacher_of(model_type)
    stream, kept = stream_of(model, tmp_path), []
    a = architecture_of(stream.config)
    for i in range(3):
        params, dead = parts_of(stream, i), [i, 7, 20 + i, 39]
        params[f"{a.downs[0]}.weight"][:, dead] = 0
        change(stream, model, i, params)
        kept.append([j for j in range(40) if j not in dead])
    stream = stream_of(model, tmp_path)
    student = student_of(stream, replace(everything(stream), ffn=kept), tmp_path)
    assert torch.allclose(logits(student), logits(model), atol=1e-9, rtol=0)


@pytest.mark.parametrize("model_type", DENSE)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_cutting_heads_that_write_nothing_changes_nothing(
    model_type: str, kv_heads: int, tmp_path: Path, double_kept: None
) -> None:
    """Of every two neighbouring key/value heads one writes nothing; grouped queries and plain ones."""
    model = teacher_of(model_type, num_attention_heads=kv_heads * 2, num_key_value_heads=kv_heads, hidden_size=32)
    stream, kept = stream_of(model, tmp_path), []
    a = architecture_of(stream.config)
    for i in range(3):
        params = parts_of(stream, i)
        dead, alive = (i % 2 + 2 * torch.arange(kv_heads // 2), (i + 1) % 2 + 2 * torch.arange(kv_heads // 2))
        params[f"{a.o}.weight"].unflatten(1, (kv_heads, -1))[:, dead] = 0
        if a.qk_norm_over == "all":  # a norm over all heads must not miss what is cut
            for name in (a.q, a.k):
                heads = params[f"{name}.weight"].unflatten(0, (kv_heads, -1))
                heads[dead] = heads[alive]
        change(stream, model, i, params)
        kept.append(alive.tolist())
    stream = stream_of(model, tmp_path)
    student = student_of(stream, replace(everything(stream), kv_heads=kept), tmp_path)
    assert torch.allclose(logits(student), logits(model), atol=1e-9, rtol=0)


@pytest.mark.parametrize("model_type", DENSE)
@pytest.mark.parametrize("tied", [True, False])
def test_cutting_copies_of_hidden_channels_that_nothing_reads_changes_nothing(
    model_type: str, tied: bool, tmp_path: Path, double_kept: None
) -> None:
    """Norms see a mean square over the channels, which copies leave as it is.  Gemma's embedding is scaled by 8, then 4
    (roots of 64 and 16), the others' is not: each must come out as large as it was."""
    model = teacher_of(model_type, hidden_size=64, tie_word_embeddings=tied)
    stream = stream_of(model, tmp_path)
    a, copies = architecture_of(stream.config), torch.arange(64) % 16
    for i in range(3):
        params = parts_of(stream, i)
        for name in (f"{writer}.{kind}" for writer, kind in product(a.writers, ("weight", "bias"))):
            if name in params:
                params[name] = params[name][copies]
        for norm in a.writer_norms:
            params[f"{norm}.weight"] = params[f"{norm}.weight"][copies]
        for reader in (a.q, a.k, a.v, *a.gates, *a.ups):
            params[f"{reader}.weight"][:, 16:] = 0
        change(stream, model, i, params)
    embedding, gain = model.get_parameter("model.embed_tokens.weight"), model.get_parameter("model.norm.weight")
    embedding.data = embedding.data[:, copies]
    gain.data[16:] = -a.gain_offset
    stream = stream_of(model, tmp_path)
    student = student_of(stream, replace(everything(stream), hidden=list(range(16))), tmp_path)
    assert torch.allclose(logits(student), logits(model), atol=1e-9, rtol=0)


def test_what_a_config_says_of_each_block_is_said_of_those_that_are_left() -> None:
    config = tiny.config_of(
        "qwen2",
        num_hidden_layers=4,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
        no_rope_layers=[1, 0, 1, 0],
    )
    student = student_config(config, PruningPlan([0, 2, 3], [[0]] * 3, [[0]] * 3, list(range(24))))
    student.validate()
    assert student.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert student.max_window_layers == 1 and student.no_rope_layers == [1, 1, 0]
    assert config.num_hidden_layers == 4 and len(config.layer_types) == 4, "the teacher's is as it was"
    json.dumps(student.to_dict())


def test_heads_keep_a_width_that_the_teacher_s_config_leaves_to_be_worked_out() -> None:
    config = tiny.config_of("qwen2", hidden_size=32)
    del config.head_dim
    cut = PruningPlan([0, 1], [[0]] * 2, [[0]] * 2, list(range(20)))
    student = skeleton(student_config(config, cut), CPU)
    assert student.get_parameter("model.layers.0.self_attn.q_proj.weight").shape == (2 * 8, 20)


# What is chosen.


def kl(model: nn.Module, expected: Tensor, corpus: Corpus) -> float:
    log_p, log_q = expected.log_softmax(-1), logits(model, corpus.ids).log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1)[corpus.mask].mean())


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("budget", [0, 10**9])
def test_blocks_are_those_that_brute_force_would_leave_out(model_type: str, budget: int, tmp_path: Path) -> None:
    corpus, left = rows(), [0, 1, 2, 3]
    expected = logits(teacher_of(model_type, layers=4), corpus.ids)
    stream = stream_of(teacher_of(model_type, layers=4), tmp_path)
    for keep in (3, 2, 1):
        tried = [[i for i in left if i != out] for out in left]
        costs = [kl(without_others(teacher_of(model_type, layers=4), some), expected, corpus) for some in tried]
        left = tried[costs.index(min(costs))]
        assert choose_decoder_layers(stream, corpus, keep, RunContext(Journal(tmp_path), budget)) == left


def test_a_block_that_does_nothing_goes_first(tmp_path: Path) -> None:
    model = teacher_of("llama", layers=4)
    for name, parameter in model.named_parameters():
        if name.startswith("model.layers.2.") and ("o_proj" in name or "down_proj" in name):
            parameter.data.zero_()
    assert choose_decoder_layers(stream_of(model, tmp_path), rows(), 3, context_in(tmp_path)) == [0, 1, 3]


def test_influence_is_the_mean_turn_of_the_state(tmp_path: Path) -> None:
    """Token by token, of the library's own states."""
    corpus, model = rows(), teacher_of("llama", layers=4)
    found = block_influence(stream_of(model, tmp_path), corpus, context_in(tmp_path))
    seen: dict[int, Tensor] = {}
    for i in range(4):
        model.model.layers[i].register_forward_hook(lambda _, args, out, i=i: seen.update({i: (args[0], out)}))
    logits(model, corpus.ids)
    for i, turned in enumerate(found):
        before, after = (x[corpus.mask].double() for x in seen[i])
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        assert turned == pytest.approx(float((1 - cosine).mean()), rel=1e-5)
    assert block_influence(stream_of(model, tmp_path), rows(3), context_in(tmp_path)) == found, "from the journal"


def test_few_candidates_are_those_of_least_influence(tmp_path: Path) -> None:
    """One candidate a round: the order of influence itself. And what a round found is not measured again."""
    corpus, model = rows(), teacher_of("llama", layers=4)
    stream, context = stream_of(model, tmp_path), context_in(tmp_path)
    influence = block_influence(stream, corpus, context)
    order = sorted(range(4), key=lambda i: influence[i])
    assert choose_decoder_layers(stream, corpus, 2, context, candidates=1) == sorted(order[2:])
    assert list(context.journal.notes("without-4")) == [str(order[0])]
    assert list(context.journal.notes("without-3")) == [str(order[1])]
    with recording() as log:
        assert choose_decoder_layers(stream, corpus, 1, context, candidates=1) == [order[3]]
    assert len(log["choose blocks"]) == 1, "the last round alone"


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3"])
def test_importance_is_the_energy_that_each_token_sees(model_type: str, tmp_path: Path) -> None:
    """Token by token, with the library's own model; gains of norms after the writers count."""
    corpus, model = rows(), teacher_of(model_type, layers=2)
    stream = stream_of(model, tmp_path)
    a, seen = architecture_of(stream.config), {}
    for i, name in product(range(2), (a.o, a.downs[0])):
        module = model.get_submodule(f"model.layers.{i}.{name}")
        module.register_forward_pre_hook(lambda _, args, at=(i, name): seen.update({at: args[0][corpus.mask]}))
    logits(model, corpus.ids)
    found = importance(stream, corpus, [0, 1], context_in(tmp_path))
    for i in range(2):
        params = parts_of(stream, i)
        gains = [params[f"{norm}.weight"] for norm in a.writer_norms] or [torch.ones(24, dtype=torch.float64)] * 2
        by_head = seen[i, a.o].unflatten(1, (2, -1)) * torch.eye(2)[:, None, :, None]  # all heads but one silenced
        written = gains[0] * (by_head.flatten(2) @ params[f"{a.o}.weight"].mT)
        assert torch.allclose(found.kv_heads[i], written.square().sum(-1).mean(1), rtol=1e-6)
        neurons = seen[i, a.downs[0]].square().mean(0)
        columns = (gains[1][:, None] * params[f"{a.downs[0]}.weight"]).square().sum(0)
        assert torch.allclose(found.ffn[i], neurons * columns, rtol=1e-6)
    assert found.hidden.sum().item() == pytest.approx(4)


@pytest.mark.parametrize("model_type", DENSE)
def test_what_is_dead_goes_first(model_type: str, tmp_path: Path) -> None:
    model = teacher_of(model_type)
    stream = stream_of(model, tmp_path)
    a, dead = architecture_of(stream.config), torch.tensor([3, 10, 11, 22])
    for i in range(3):
        params = parts_of(stream, i)
        params[f"{a.downs[0]}.weight"][:, [i, 30 + i]] = 0
        params[f"{a.o}.weight"].unflatten(1, (2, -1))[:, i % 2] = 0
        for name in (f"{writer}.{kind}" for writer, kind in product(a.writers, ("weight", "bias"))):
            if name in params:
                params[name][dead] = 0
        change(stream, model, i, params)
    model.get_parameter("model.embed_tokens.weight").data[:, dead] = 0
    cut = choose(stream_of(model, tmp_path), rows(), StudentSize(heads=2, ffn=38, hidden=20), context_in(tmp_path))
    assert cut.layers == [0, 1, 2]
    assert cut.kv_heads == [[1], [0], [1]]
    assert cut.ffn == [[j for j in range(40) if j not in (i, 30 + i)] for i in range(3)]
    assert cut.hidden == [j for j in range(24) if j not in dead]


def test_asking_for_nothing_keeps_everything(tmp_path: Path) -> None:
    stream = stream_of(teacher_of("llama"), tmp_path)
    assert choose(stream, rows(), StudentSize(), context_in(tmp_path)) == PruningPlan([0, 1, 2])
    as_many = StudentSize(layers=3, heads=4, ffn=40, hidden=24)
    assert choose(stream, rows(), as_many, context_in(tmp_path)) == everything(stream)


@pytest.mark.parametrize(
    ("model_type", "shape", "says"),
    [
        ("llama", StudentSize(layers=3), "layers: the teacher has 2, 3 were asked for"),
        ("llama", StudentSize(layers=0), "layers: the teacher has 2, 0 were asked for"),
        ("llama", StudentSize(heads=6), "heads: the teacher has 4, 6 were asked for"),
        ("llama", StudentSize(heads=3), "ask for a multiple of 2"),
        ("llama", StudentSize(ffn=41), "ffn: the teacher has 40, 41 were asked for"),
        ("llama", StudentSize(hidden=25), "hidden: the teacher has 24, 25 were asked for"),
        ("llama", StudentSize(hidden=-1), "hidden: the teacher has 24, -1 were asked for"),
        ("llama", StudentSize(hidden=22), "not a multiple of the number of attention heads"),
    ],
)
def test_what_no_student_can_be(model_type: str, shape: StudentSize, says: str, tmp_path: Path) -> None:
    stream = stream_of(teacher_of(model_type, layers=2), tmp_path)
    with pytest.raises(BadInput, match=says) as refused:
        check_student_size(shape, stream)
    assert "\n" not in str(refused.value)


def test_stories(data: Path, tmp_path: Path) -> None:
    """A real model: of five blocks, three chosen are no worse than the best that is known, without blocks 2 and 4."""
    folder, text = data / "stories260k", data / "text/tinystories-a-clean.txt"
    stories = [s.strip() for s in text.read_text().split("<|endoftext|>") if s.strip()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in stories[:20]))
    corpus = load_corpus(tmp_path / "rows.jsonl", read_tokenizer(folder), vocab=512, length=256, by_document=True)
    stream = BlockwiseModel(read_config(folder), Weights(folder), CPU)
    chosen = choose_decoder_layers(stream, corpus, 3, context_in(tmp_path))

    def cost(layers: list[int]) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        expected = logits(model, corpus.ids)
        return kl(without_others(model, layers), expected, corpus)

    assert chosen[0] == 0
    assert cost(chosen) <= cost([0, 1, 3]) + 1e-6
    assert cost(chosen) < cost([0, 1, 4]), "what block influence would leave"

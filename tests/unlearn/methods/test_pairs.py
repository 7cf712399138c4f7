"""f-DPO in pairs: the loss against formulas written out, alternatives against their rows, whole jobs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, softplus
from transformers import AutoModelForCausalLM, AutoTokenizer

from calib.jobs.journal import Journal
from calib.losses.top_k import TopK
from calib.stats.classification import calibration_error
from tests.drawn import pair, targets
from tests.kills import digest, kill_and_resume
from tests.unlearn.conftest import NAMES, Site, facts, lines
from tests.unlearn.test_unlearn import wanted
from unlearn import unlearn
from unlearn.audit.probes import choice_error
from unlearn.data.alternatives import read_alternatives
from unlearn.data.dataset import read_data
from unlearn.methods.dispatch import method_of
from unlearn.methods.losses import LossInputs
from unlearn.methods.moving import Pool, answers_of
from unlearn.methods.pairs import PAIR_SCORES, dpo
from unlearn.model.examples import plain_examples
from unlearn.model.model import limit_memory, open_model
from unlearn.validate import validate

CPU = torch.device("cpu")
BETA = 0.3


def by_hand(forgotten: Tensor, alternative: Tensor, name: str) -> Tensor:
    """Losses of log-ratios as the two papers, and TRL's DPO trainer, write them."""
    if name == "dpo":
        inner = alternative - forgotten
    elif name == "dpo-js":
        inner = alternative - forgotten - (softplus(alternative) - softplus(forgotten))
    else:  # an alpha-divergence with coefficient c
        c = {"dpo-alpha": 0.5, "dpo-forward-kl": 1.0}[name]
        inner = ((-c * forgotten).exp() - (-c * alternative).exp()) / c
    return -logsigmoid(BETA * inner).mean()


def test_scores_are_slopes_of_generators() -> None:
    """f' of u log u is log u + 1, and of (u - 1) u^(a - 1) and the like; the constant cancels in pairs."""
    u = torch.tensor([0.2, 0.9, 4.0], dtype=torch.float64, requires_grad=True)
    generators = {
        "dpo": u * u.log(),
        "dpo-js": u * u.log() - (u + 1) * ((u + 1) / 2).log(),
        "dpo-forward-kl": -u.log(),
        "dpo-alpha": (u**0.5 - 0.5 * u - 0.5) / (0.5 * -0.5),
    }
    assert generators.keys() == PAIR_SCORES.keys()
    for name, f in generators.items():
        (slope,) = torch.autograd.grad(f.sum(), u)
        found = PAIR_SCORES[name](u.detach().log())
        assert torch.allclose(found - found[0], slope - slope[0], atol=1e-12), name


def inputs(seed: int) -> LossInputs:
    """Two pairs of one decision each."""
    now, before = pair(seed)
    return LossInputs(
        now, before, cross_entropy(before, targets(seed), reduction="none"), plain_examples(now, targets(seed))
    )


@pytest.mark.parametrize("name", PAIR_SCORES)
@given(seed=st.integers(0, 10_000))
def test_the_loss_and_its_gradient(name: str, seed: int) -> None:
    some, loss = inputs(seed), partial(dpo, beta=BETA, score=PAIR_SCORES[name])
    ratio = (some.nats_before - some.nats).clamp(-15, 15)  # beyond which exponentials are bounded
    if (ratio == some.nats_before - some.nats).all():
        assert loss(some).item() == pytest.approx(by_hand(ratio[::2], ratio[1::2], name).item(), rel=1e-9)
    now = some.now.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(replace(some, now=now)), now)
    direction, step = torch.randn(now.shape, generator=torch.Generator().manual_seed(seed), dtype=now.dtype), 1e-6
    ends = [loss(replace(some, now=some.now + s * step * direction)).item() for s in (1, -1)]
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((gradient * direction).sum().item(), rel=1e-4, abs=1e-6)
    unmoved = replace(some, nats_before=some.nats)
    assert loss(unmoved).item() == pytest.approx(math.log(2)), "nothing is preferred yet"


def told(site: Site, folder: Path) -> Path:
    """An alternative of its own for each row to forget, in another order."""
    rows = [
        json.loads(line) | {"answer": f"not {NAMES[i]}"} for i, line in enumerate(site.forget.read_text().splitlines())
    ]
    (folder / "alternatives.jsonl").write_text(lines(rows[::-1]))
    return folder / "alternatives.jsonl"


def test_dpo_of_a_moved_model_against_the_library(words: Site, tmp_path: Path) -> None:
    """The loss of a pool of pairs, with its cached log-probabilities, is DPO's of two models of the library's that are
    given the prompts and the answers."""
    options = wanted(words, "dpo", alternatives=told(words, tmp_path))
    work = validate(words.model, tmp_path / "out", options).work(options, Journal(tmp_path))
    pool, one = Pool.of(work), work.trainable.one()
    assert pool.forget.shape == (3, 2) and len(pool.rows) == len(pool.numbers) + 3
    answers, nats = answers_of(one, pool.rows, pool.k)
    moved = {name: p[0] + 0.03 * torch.randn(p[0].shape, generator=torch.Generator().manual_seed(7))
             for name, p in one.params.items()}  # fmt: skip
    pairs = pool.forget.flatten()
    where, of = pool.rows.target_positions(pairs), pool.rows[pairs]
    assert isinstance(answers[0], TopK)
    found = dpo(LossInputs(one.forward(moved, of), answers[0][where], nats[0][where], of), BETA)
    before, after = (AutoModelForCausalLM.from_pretrained(words.model, dtype=torch.float32) for _ in range(2))
    after.load_state_dict(moved, strict=False)
    tokenizer, ratios = AutoTokenizer.from_pretrained(words.model), []
    for i, row in enumerate(json.loads(line) for line in words.forget.read_text().splitlines()):
        for answer in (row["answer"], f"not {NAMES[i]}"):
            prompt = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
            whole = torch.tensor([tokenizer(f"Question: {row['question']}\nAnswer: {answer}").input_ids])
            end = torch.tensor([[tokenizer.eos_token_id]])  # which ends a row
            if pool.rows[pairs].counts.tolist()[len(ratios)] > whole.shape[1] - len(prompt):
                whole = torch.cat([whole, end], 1)
            sums = [
                -cross_entropy(m(whole).logits[0, len(prompt) - 1 : -1], whole[0, len(prompt) :], reduction="sum")
                for m in (before, after)
            ]
            ratios.append(sums[1] - sums[0])
    each = torch.stack(ratios).view(-1, 2)
    assert each.abs().min() > 1e-3
    assert found.item() == pytest.approx(by_hand(each[:, 0], each[:, 1], "dpo").item(), abs=1e-6)


def test_alternatives_belong_to_their_rows(words: Site, tmp_path: Path) -> None:
    trainable = open_model(words.model, "causal-lm", device=CPU)
    data, gone, options = (
        read_data(words.train, trainable, 64),
        torch.arange(3),
        wanted(words, "dpo", alternatives=told(words, tmp_path)),
    )

    def read(file: Path, **more: int) -> list[str]:
        found = read_alternatives(data, gone, trainable, replace(options, alternatives=file, **more))  # type: ignore[arg-type]
        assert trainable.tokenizer is not None
        return [str(trainable.tokenizer.decode(labels[labels != -100])).strip() for labels in found.labels]

    asked = read_data(words.forget, trainable, 64).examples
    found = read_alternatives(data, gone, trainable, options)
    first = found.target_mask.float().argmax(1)
    assert all(
        torch.equal(a[: n + 1], b[: n + 1])
        for a, b, n in zip(found.inputs["input_ids"], asked.inputs["input_ids"], first.tolist(), strict=True)
    ), "the prompts are those of the rows to forget"
    by_prompt = read(told(words, tmp_path))
    (tmp_path / "exact.jsonl").write_text(
        lines([r | {"answer": f"not {NAMES[i]}"} for i, r in enumerate(facts(NAMES)[:3])])
    )
    assert by_prompt == read(tmp_path / "exact.jsonl") and len(set(by_prompt)) == 3
    (tmp_path / "one.txt").write_text("red is not known\n")
    (tmp_path / "one.jsonl").write_text(lines([{"answer": "red is not known", "id": 7}]))
    (one,) = set(read(tmp_path / "one.txt"))
    assert read(tmp_path / "one.jsonl") == [one] * 3
    (tmp_path / "many.txt").write_text("".join(f"likes {name}\n" for name in NAMES))
    drawn = [tuple(read(tmp_path / "many.txt", seed=seed)) for seed in range(6)]
    assert len(set(drawn)) > 3 and drawn[0] == tuple(read(tmp_path / "many.txt", seed=0))


def test_alternatives_to_conversations(words: Site, tmp_path: Path) -> None:
    """A template puts them where it puts the answers, with what it writes around these."""
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}<{{ m.role }}> {{ m.content }} </end>\n{% endfor %}"
                                         "{% if add_generation_prompt %}<assistant> {% endif %}")  # fmt: skip
    talks = [
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": f"where is {n}"},
            {"role": "assistant", "content": "in rome"},
        ]
        for n in NAMES
    ]
    (tmp_path / "train.jsonl").write_text(lines([{"messages": talk} for talk in talks]))
    (tmp_path / "pairs.jsonl").write_text(lines([{"prompt": t[:2], "completion": t[2:]} for t in talks]))
    (tmp_path / "other.jsonl").write_text(
        lines([{"messages": [*talk[:2], {"role": "assistant", "content": "nobody knows"}]} for talk in talks[:2]])
    )
    (tmp_path / "alone.txt").write_text("nobody knows\n")
    trainable, found = open_model(words.model, "causal-lm", device=CPU), []
    for train, file in (("train", "other.jsonl"), ("train", "alone.txt"), ("pairs", "alone.txt")):
        options = wanted(words, "dpo", alternatives=tmp_path / file, prompt_format=str(tmp_path / "chat.jinja"))
        data = read_data(tmp_path / f"{train}.jsonl", trainable, 64, options.prompt_format)
        found.append(read_alternatives(data, torch.arange(2), trainable, options))
    assert found[0].fingerprint == found[1].fingerprint == found[2].fingerprint
    assert trainable.tokenizer is not None
    learned = trainable.tokenizer.decode(found[0].targets[: found[0].counts[0]])
    assert learned.replace(" ", "").startswith("nobodyknows")


@pytest.mark.parametrize("method", PAIR_SCORES)
def test_a_model_learns_to_prefer_the_alternatives(method: str, words: Site, tmp_path: Path) -> None:
    options = wanted(words, method, alternatives=told(words, tmp_path), epochs=12, batch=2, lr=5e-3, beta=1.0)
    report = unlearn(words.model, tmp_path / "out", options)
    stages = report["asked"]["alternatives"]
    assert stages["after"]["probability"] > 5 * stages["before"]["probability"]
    assert stages["after"]["ECE of choices"] < stages["before"]["ECE of choices"], "it was sure of what is forgotten"
    forget = [report["quality_by_stage"][stage]["forget"]["nats"] for stage in ("before", "after")]
    assert forget[1] > forget[0] + 0.1
    assert "the alternative answer is likelier" in (tmp_path / "out/report.html").read_text()
    (step,) = json.loads((tmp_path / "out/parewell.json").read_text())["recipe"]
    assert step["data"]["alternatives"] and step["options"]["beta"] == 1.0


def test_a_step_in_parts_is_the_same_step(words: Site, tmp_path: Path) -> None:
    """Parts never take a pair apart."""
    options, found = wanted(words, "dpo", alternatives=told(words, tmp_path), epochs=1, batch=3), []
    for tokens in (4096, 1):
        job = validate(words.model, tmp_path / "out", options)
        limit_memory(job.trainable, tokens, checkpointing=False)
        way = method_of(options).prepare(job.work(options, Journal(tmp_path)))
        found.append(way.apply(job.trainable.one(), str(tokens)).params)
    assert all(torch.allclose(p, found[1][name], atol=1e-5) for name, p in found[0].items())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_and_resumed(words: Site, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    options = wanted(words, "dpo-js", alternatives=told(words, tmp_path_factory.mktemp("told")), epochs=20, batch=2)
    kill_and_resume(partial(unlearn, words.model, options=options), tmp_path, ("moved",))
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_choices_are_scored_as_calibration_has_it() -> None:
    right, wrong = torch.tensor([-1.0, -3.0]), torch.tensor([[-2.0], [-0.5]])
    p = torch.stack([torch.tensor([-1.0, -2.0]).softmax(0), torch.tensor([-3.0, -0.5]).softmax(0)])
    assert choice_error(right, wrong) == pytest.approx(calibration_error(p, torch.tensor([0, 0])))
    confidence = p.max(1).values
    assert choice_error(right, wrong) == pytest.approx(float((1 - confidence[0] + confidence[1]) / 2), abs=1e-6)

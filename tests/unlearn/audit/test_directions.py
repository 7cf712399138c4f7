"""Facts in both directions: probes against closed forms, brute force and the library's own models."""

from __future__ import annotations

import json
import math
from itertools import permutations
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM

from calib import BadInput
from cli.main import parewell
from tests import bert
from tests.unlearn.conftest import Site, lines
from unlearn.audit import directions
from unlearn.audit.directions import (
    audit_facts,
    entanglement,
    facts_of,
    gradients_by_block,
    log_likelihood,
    open_fact_model,
    reciprocal_ranks,
    states_of_facts,
    tokenized,
)
from unlearn.options.audit import Audit

CPU = torch.device("cpu")
PAIRS = [("ann", "the baker"), ("bob", "red"), ("cat", "a spy of old"), ("dan", "green")]
WORDY = [("w1 w2", "good"), ("w3", "bad w4"), ("w5", "w6 w7 w8"), ("w9", "w0")]


def harmonic(n: int) -> float:
    return sum(1 / k for k in range(1, n + 1))


def test_reciprocal_ranks_of_random_identical_and_equal_states() -> None:
    g, n = torch.Generator().manual_seed(0), 6
    draws = torch.cat([reciprocal_ranks(*torch.randn(2, n, 5, generator=g).unbind()) for _ in range(2000)])
    error = float(draws.std()) / len(draws) ** 0.5
    assert float(draws.mean()) == pytest.approx(harmonic(n) / n, abs=4 * error) and error < 0.005
    unit = torch.nn.functional.normalize(torch.randn(n, 5, generator=g), dim=1)
    assert torch.equal(reciprocal_ranks(unit, unit), torch.ones(n).double())
    assert torch.allclose(
        reciprocal_ranks(torch.ones(n, 5), torch.ones(n, 5)), torch.full((n,), harmonic(n) / n).double()
    )


@given(st.integers(0, 1000))
def test_equal_products_are_ranked_in_every_order(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randint(-1, 2, (5, 2), generator=g).double() for _ in range(2))
    for i, found in enumerate(reciprocal_ranks(queries, keys).tolist()):
        products = (queries[i] @ keys.T).tolist()
        each = [
            1 / (1 + sorted(range(5), key=lambda j: (-products[j], order[j])).index(i))
            for order in permutations(range(5))
        ]
        assert found == pytest.approx(sum(each) / math.factorial(5))


def test_entanglement_against_plain_loops() -> None:
    g, of = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 0, 2, 1])
    pairs = [(i, j, abs(float(torch.cosine_similarity(g[i], g[j], dim=0)))) for i in range(5) for j in range(i)]
    apart, same = ([c for i, j, c in pairs if (of[i] == of[j]) == together] for together in (False, True))
    assert entanglement(g, of) == pytest.approx((sum(apart) / len(apart), sum(same) / len(same)))
    assert entanglement(g[:1], of[:1]) == (None, None)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked language model with a tokenizer of words."""
    folder = bert.save(tmp_path_factory.mktemp("masked"))
    torch.manual_seed(1)
    config = BertConfig.from_pretrained(folder)
    model = BertForMaskedLM(config).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.mask_token = "w19"  # a word that no fact has
    tokenizer.save_pretrained(folder)
    return folder


def test_a_causal_model_against_the_library(words: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Likelihoods, states and gradients, one plain sentence at a time."""
    model, plain = open_fact_model(words.model, CPU), AutoModelForCausalLM.from_pretrained(words.model).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(words.model)
    monkeypatch.setattr(directions, "WIDTH", 10**6)  # nothing is projected
    monkeypatch.setattr(directions, "TOGETHER", 3 * 61 * 18)  # in parts
    some = tokenized(PAIRS, model, "facts")
    found = log_likelihood(model, some, some.object)
    subjects, objects = states_of_facts(model, some)
    gradients = gradients_by_block(model, some, some.object, 0)
    for i, (a, b) in enumerate(PAIRS):
        ids = torch.tensor([tokenizer(f"{a} is {b}").input_ids])
        out = plain(ids, output_hidden_states=True)
        end, start = ids.shape[1], ids.shape[1] - len(b)  # a token a character
        each = out.logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        total = each[start - 1 : end - 1].sum()
        assert found[i].item() == pytest.approx(total.item(), abs=1e-4)
        assert torch.allclose(subjects[0, i], out.hidden_states[1][0, len(a) - 1], atol=1e-5)
        assert torch.allclose(objects[0, i], out.hidden_states[1][0, end - 1], atol=1e-5)
        for block in range(2):
            layer = plain.model.layers[block]
            weights = [m.weight for m in layer.modules() if isinstance(m, torch.nn.Linear)]
            own = torch.cat([g.flatten() for g in torch.autograd.grad(total, weights, retain_graph=True)])
            assert torch.allclose(gradients[block][i].norm(), own.norm(), rtol=1e-3)
            assert torch.allclose(
                gradients[block][i].sort().values, own.sort().values, atol=1e-3 * float(own.abs().max())
            )


def test_a_masked_model_against_the_library(masked: Path) -> None:
    """All tokens of the object hidden at once; or one at a time, each in a pass of its own."""
    model, plain = open_fact_model(masked, CPU), AutoModelForMaskedLM.from_pretrained(masked).float().eval()
    tokenizer, some = AutoTokenizer.from_pretrained(masked), tokenized(WORDY, model, "facts")
    for asked in (some.object, some.subject):
        at_once, single = (log_likelihood(model, some, asked, at_once=way) for way in (True, False))
        for i, (a, b) in enumerate(WORDY):
            ids = torch.tensor([tokenizer(f"{a} is {b}").input_ids])
            places = asked[i].nonzero().flatten().tolist()
            assert len(places) == len((b if asked is some.object else a).split())

            def hidden(which: list[int], ids: Tensor = ids) -> Tensor:
                changed = ids.clone()
                changed[0, which] = tokenizer.mask_token_id
                return plain(changed).logits[0].log_softmax(-1)[which, ids[0, which]].sum()

            assert at_once[i].item() == pytest.approx(hidden(places).item(), abs=1e-4)
            assert single[i].item() == pytest.approx(sum(hidden([p]).item() for p in places), abs=1e-4)


def test_what_a_partner_gains_and_the_gap(words: Site, masked: Path) -> None:
    for folder, pairs in ((words.model, PAIRS), (masked, WORDY)):
        model = open_fact_model(folder, CPU)
        found = directions.recall_of(model, facts_of(pairs, model, "facts"))
        gains = {"forward": list[float](), "reversed": list[float]()}
        for i, (n, d) in enumerate(pairs):
            other_n, other_d = pairs[(i + 1) % 4]
            for direction, right, wrong in (
                ("forward", (n, d), (other_n, d)),
                ("reversed", (n, d) if model.masked else (d, n), (n, other_d) if model.masked else (other_d, n)),
            ):
                known = []
                for pair in (right, wrong):
                    some = tokenized([pair], model, "facts")
                    asked = some.subject if model.masked and direction == "reversed" else some.object
                    known.append(log_likelihood(model, some, asked, at_once=False).item())
                gains[direction].append(known[0] - known[1])
        for direction, each in gains.items():
            assert found[direction]["gain"] == pytest.approx(sum(each) / 4, abs=1e-4)
        gap = torch.tensor(gains["forward"]) - torch.tensor(gains["reversed"])
        assert found["gap"] == pytest.approx(float(gap.mean()), abs=1e-4)
        assert found["gap_error"] == pytest.approx(float(gap.std() / 2), abs=1e-4)
        assert ("probability, all hidden at once" in found["forward"]) == model.masked


def test_audits_on_the_command_line(words: Site, masked: Path, tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    for folder, pairs in ((words.model, PAIRS), (masked, WORDY)):
        file.write_text(lines([{"name": n, "description": f"{d}."} for n, d in [*pairs, pairs[0]]]))
        page = tmp_path / "page.html"
        given = ["audit", folder, "--facts", file, "--original", folder, "--html", page]
        shown = CliRunner().invoke(parewell, [str(word) for word in given], catch_exceptions=False).stdout
        assert "reversal gap" in shown and "mrr, forward, by block, audited" in shown
        assert "Entities at each block" in page.read_text() and page.read_text().count("<polyline") >= 8
        found = audit_facts(folder, Audit(facts=file, original=folder, device="cpu"))
        assert json.loads(json.dumps(found)) == found and found["models"]["original"] == found["models"]["audited"]
        assert found["rows"] == {"facts": 5, "names": 4, "descriptions": 4}
        assert found["chance"]["forward"] == pytest.approx(harmonic(4) / 4)
        blocks = {
            len(curve)
            for of in found["models"].values()
            for kind in ("mrr", "entanglement")
            for curve in of[kind].values()
        }
        assert blocks == {2 if folder == words.model else 3}
        assert all(0 < value <= 1 for curve in found["models"]["audited"]["mrr"].values() for value in curve)


def test_facts_that_will_not_do(words: Site, net: Site, bert: Path, masked: Path, tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    file.write_text(lines([{"name": n, "description": d} for n, d in PAIRS]))
    rows = {
        "is about one name": [{"name": "ann", "description": d} for d in ("red", "blue")],
        "so it is told from none": [{"name": n, "description": d} for n in ("ann", "bob") for d in ("red", "blue")],
        "needs a text in 'description'": [{"name": "ann"}],
        "a fact takes": [{"name": "ann", "description": "b" * 99}, {"name": "bob", "description": "red"}],
    }
    for word, some in rows.items():
        (tmp_path / "bad.jsonl").write_text(lines(some))
        with pytest.raises(BadInput, match=word):
            audit_facts(words.model, Audit(facts=tmp_path / "bad.jsonl"))
    for model, original, word in (
        (bert, None, "this is neither"), (masked, words.model, "not of the kind"), (tmp_path, None, "is missing"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=word):
            audit_facts(model, Audit(facts=file, original=original))
    for more in ({"train": file}, {"forget_lines": "1"}, {"forms": "nf4"}, {"relearn": 3}, {"prompt_format": "plain"}):
        with pytest.raises(BadInput, match="changes nothing with --facts"):
            Audit(facts=file, **more)  # type: ignore[arg-type]

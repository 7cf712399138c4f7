"""Measure an unlearned model: before and after, and, where other models are trained beside it, its distance from
oracles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib import BadInput
from calib.model.config import read_json
from calib.model.weights import Weights
from calib.runtime.progress import stage
from calib.stats.tell_apart import tell_apart_rate
from unlearn.audit.klom import FEWEST, gaussian_klom, klom, klom_summaries
from unlearn.audit.memorization import (
    attack_auc,
    exact_memorisation,
    extraction_strength,
    forget_quality,
    min_k,
    privacy_leak,
)
from unlearn.audit.probes import (
    AnswerScores,
    Probes,
    chosen_alternatives,
    recalled,
    score_answers,
    truth_ratios,
    utility,
)
from unlearn.data.dataset import Data
from unlearn.methods.job import Forgetting, UnlearningJob
from unlearn.model.ensemble import Ensemble
from unlearn.model.examples import Examples
from unlearn.model.margins import margins_of
from unlearn.model.model import TrainableModel

MEASURED = 1000  # rows of what is retained that figures are taken on
FLOOR, SCORING = 2_000_003, 3_000_017  # seeds of two sets of oracles
SHOWN = 2  # forget points whose margins the page draws


def figures(task: str, model: Ensemble, groups: Mapping[str, Examples]) -> dict[str, dict[str, float]]:
    """Measure a model on groups of rows: nats a token, accuracy; of a language model also how much of an answer can be
    extracted, and how well an attack on its least likely tokens (Min-K%) tells the forget set from unseen rows."""
    found, scores = dict[str, dict[str, float]](), dict[str, AnswerScores]()
    with stage("measure", len(groups), "groups of rows") as done:
        for name, rows in groups.items():
            scores[name] = score_answers(model, rows)
            done(name)
    for name, a in scores.items():
        found[name] = {
            "nats": float(-a.log_p[a.mask].double().mean()),
            "right": float(exact_memorisation(a.right, a.mask).mean()),
        }
        if task == "causal-lm":
            found[name]["extraction"] = float(extraction_strength(a.right, a.mask).mean())
    if "validation" in scores and "forget" in scores:
        pair = (min_k(a.log_p, a.mask) for a in (scores["forget"], scores["validation"]))
        found["forget"]["min_k_auc"] = attack_auc(*pair)
    return found


def groups_of(work: UnlearningJob, validation: Data | None, earlier: Examples) -> dict[str, Examples]:
    """Rows to forget, some of what is retained, rows never seen, and rows of earlier requests."""
    groups = {"forget": work.rows[work.forgotten], "retain": work.rows[work.measured]}
    if validation is not None:
        groups["validation"] = validation.examples
    groups["earlier"] = earlier
    return {name: rows for name, rows in groups.items() if len(rows)}


@dataclass(frozen=True)
class AuditInputs:
    """Questions to a language model beside its rows: an oracle to compare with, probes of the forget set, sets of
    questions that it should still answer, facts in both directions, alternative answers to the forget set."""

    oracle: Ensemble | None = None
    probes: Probes | None = None
    useful: Mapping[str, Probes] | None = None
    facts: tuple[Examples, Examples] | None = None
    alternatives: Examples | None = None


def asked_of(
    trainable: TrainableModel, models: Mapping[str, Ensemble], asked: AuditInputs, groups: Mapping[str, Examples]
) -> dict[str, Any]:
    """Ask each of `models`, and the oracle, the audit's questions; p-values are of truth ratios against the
    oracle's."""
    found: dict[str, Any] = {}
    if asked.oracle is not None:
        found["oracle"] = figures(trainable.task, asked.oracle, groups)
        found["tell_apart"] = {
            name: {group: _told_apart(model, asked.oracle, rows) for group, rows in groups.items()}
            for name, model in models.items()
        }
        models = {**models, "oracle": asked.oracle}
        if asked.probes is not None:
            oracle_scores = truth_ratios(asked.oracle, asked.probes)
            found["forget_quality"] = {
                name: forget_quality(truth_ratios(model, asked.probes), oracle_scores)
                for name, model in models.items() if name != "oracle"
            }  # fmt: skip
    if asked.useful:
        found["utility"] = {name: utility(trainable, model, asked.useful) for name, model in models.items()}
    if asked.facts is not None:
        found["facts"] = {name: recalled(model, asked.facts) for name, model in models.items()}
    if asked.alternatives is not None:
        pair = (groups["forget"], asked.alternatives)
        found["alternatives"] = {name: chosen_alternatives(model, *pair) for name, model in models.items()}
    return found


def _told_apart(model: Ensemble, oracle: Ensemble, rows: Examples) -> float:
    """How often an optimal observer tells one answer of the model from the oracle's; 0.5 is guessing."""
    pairs = zip(model.answers(rows), oracle.answers(rows), strict=True)
    return float(torch.cat([tell_apart_rate(theirs, own).double().cpu() for (_, own), (_, theirs) in pairs]).mean())


def leaks(stages: Mapping[str, Mapping[str, Any]], oracle: Mapping[str, Any]) -> dict[str, float]:
    """Privacy leak of each stage against the oracle; empty where the attack was not tried, or tells the oracle's forget
    set for certain."""
    oracle_scores = oracle.get("forget", {}).get("min_k_auc", 1.0)
    if oracle_scores == 1:
        return {}
    return {name: privacy_leak(of["forget"]["min_k_auc"], oracle_scores) for name, of in stages.items()}


def read_oracle(folder: Path, trainable: TrainableModel) -> Ensemble:
    """Another folder of the same architecture."""
    if trainable.placed is None:
        raise BadInput(f"oracle {folder}: is for models of the library's; leave it out")
    weights = Weights(folder)
    config, own = read_json(folder / "config.json"), read_json(trainable.folder / "config.json")
    if config.get("architectures") != own.get("architectures"):
        raise BadInput(
            f"{folder}: is another architecture than {trainable.folder}; give the same model, trained without"
        )
    tensors = {name: t.float().to(trainable.device) for name, t in weights.read(weights.entries).items()}
    try:
        params = trainable.placed(tensors)
    except KeyError as error:
        raise BadInput(f"{folder}: tensor {error} is missing; the checkpoint is incomplete") from error
    for name, p in trainable.state.items():
        if params[name].shape != p.shape or not params[name].isfinite().all():
            raise BadInput(f"{folder}: tensor '{name}' is not as {trainable.folder} has it, or no number; get another")
    return trainable.of({name: p[None] for name, p in params.items()})


def run_audit(work: UnlearningJob, forgetting: Forgetting, validation: Data | None) -> dict[str, Any]:
    """Train models and oracles, make the models forget, compare: KLoM, attack, and the rows to read them by."""
    options, count, trainer, method = work.options, work.options.audit, work.trainer, work.options.method
    assert trainer is not None and method is not None
    binned = options.klom == "binned" or (options.klom == "auto" and count >= FEWEST)
    sets = [work.rows, *([] if validation is None else [validation.examples])]

    def said_by(models: Ensemble) -> Tensor:
        return torch.cat([margins_of(models, rows) for rows in sets], 1)

    everything = torch.ones(count, len(work.rows), dtype=torch.bool)
    originals = trainer.models("audited", everything, range(options.seed, options.seed + count))
    scores = {"do nothing": said_by(originals)}
    scores["oracles against oracles"] = said_by(work.oracles("floor", count, FLOOR + options.seed))
    scores[method] = said_by(forgetting.apply(originals, "audit"))
    scoring = said_by(work.oracles("scoring", count, SCORING + options.seed))
    where = {"forget": work.forgotten, "retain": work.retained}
    positions = {name: work.rows.target_positions(numbers) for name, numbers in where.items()}
    positions["validation"] = torch.arange(int(work.rows.counts.sum()), scoring.shape[1])
    table = {
        name: {group: d.asdict() for group, d in klom_summaries(m, scoring, positions, binned=binned).items()}
        for name, m in scores.items()
    }
    own = positions["forget"]
    each = (klom if binned else gaussian_klom)(scores[method][:, own], scoring[:, own])
    by_distance = each.argsort(descending=True)
    drawn = {"worst": by_distance[:SHOWN], "median": by_distance[len(each) // 2 :][:SHOWN]}
    shown = [
        {
            "which": name, "row": int(work.forgotten[work.rows[work.forgotten].row_index[i]]),
            "distance": float(each[i]),
            "unlearned": scores[method][:, own[i]].tolist(), "oracles": scoring[:, own[i]].tolist(),
        }
        for name, some in drawn.items() for i in some.tolist()
    ]  # fmt: skip
    return {"models": count, "estimator": "binned, 20 bins" if binned else "gaussian", "table": table, "shown": shown}

"""How well a sequence classifier does on rows with labels, and how near it is to a reference: figures by problem."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from sklearn.metrics import f1_score, matthews_corrcoef
from torch import Tensor

from calib.data.targets import MULTI, REGRESSION, output_distances
from calib.stats.perplexity import standard_error
from calib.stats.tell_apart import tell_apart_rate

CALIBRATION_BINS = 15  # of confidence, for the calibration error


@dataclass(frozen=True)
class ClassificationMetrics:
    """Metrics of a classifier on `rows` rows: accuracy, Matthews correlation, F1 (of class 1 where there are two, else
    the mean over classes), calibration error, and, against the reference, mean KL in nats, the share of equal answers
    and the tell-apart rate of one answer (`calib.stats.tell_apart`; 0.5 is guessing)."""

    rows: int
    accuracy: float
    mcc: float
    f1: float
    ece: float
    kl: float
    top1_agreement: float
    tell_apart: float

    def asdict(self) -> dict[str, float]:
        """The metrics by name."""
        return asdict(self)


@dataclass(frozen=True)
class MultiLabelMetrics:
    """Metrics of a model that gives each row several of C labels, a label holding from a probability of 0.5 on: F1 over
    all decisions (micro) and as the mean over labels (macro; 0 for one that neither holds nor is predicted), the share
    of rows whose labels are all right (subset accuracy), and, against the reference, the mean KL of a row in nats,
    summed over its labels, and the share of rows with the same labels."""

    rows: int
    f1_micro: float
    f1_macro: float
    subset_accuracy: float
    kl: float
    same_labels: float


@dataclass(frozen=True)
class RegressionMetrics:
    """Metrics of a model that gives each row one number: mean squared error, correlations (0 where labels or answers
    are all equal), and the mean squared difference from the reference, all in the labels' units or their square."""

    rows: int
    mse: float
    pearson: float
    spearman: float
    teacher_mse: float


def metrics_of(logits: Tensor, targets: Tensor, reference: Tensor, problem: str) -> dict[str, Any]:
    """Figures of the problem's own kind, with the standard error of the distance from the reference.

    logits, reference (n, C); targets as `targets_of` gives them.
    """
    apart = output_distances(reference, logits, problem).double()
    error = standard_error(apart, torch.ones_like(apart))
    if problem == REGRESSION:
        return asdict(regression_metrics(logits, targets, reference)) | {"teacher_mse_error": error}
    if problem == MULTI:
        return asdict(multi_label_metrics(logits, targets, reference)) | {"kl_error": error}
    return classification_metrics(logits, targets, reference).asdict() | {"kl_error": error}


def classification_metrics(logits: Tensor, labels: Tensor, reference: Tensor) -> ClassificationMetrics:
    """logits, reference (n, C), labels (n,)."""
    answers, log_q, log_p = logits.argmax(-1), logits.log_softmax(-1), reference.log_softmax(-1)
    several = len(torch.cat([answers, labels]).unique()) > 1  # else there is nothing that could agree by chance
    kind = "binary" if logits.shape[-1] == 2 else "macro"
    return ClassificationMetrics(
        len(labels),
        float((answers == labels).double().mean()),
        float(matthews_corrcoef(labels.numpy(), answers.numpy())) if several else 0.0,
        float(f1_score(labels.numpy(), answers.numpy(), average=kind, zero_division=0)),
        calibration_error(log_q.exp(), labels),
        float((log_p.exp() * (log_p - log_q)).sum(-1).double().mean()),
        float((answers == reference.argmax(-1)).double().mean()),
        float(tell_apart_rate(reference, logits).double().mean()),
    )


def multi_label_metrics(logits: Tensor, targets: Tensor, reference: Tensor) -> MultiLabelMetrics:
    """logits, reference (n, C), targets of 0 and 1 (n, C)."""
    answers, holds = logits >= 0, targets > 0.5
    hits, either = (answers & holds).sum(0).double(), (answers.sum(0) + holds.sum(0)).double()  # of each label
    return MultiLabelMetrics(
        len(targets),
        float(2 * hits.sum() / either.sum().clamp(min=1)),
        float((2 * hits / either.clamp(min=1)).mean()),
        float((answers == holds).all(1).double().mean()),
        float(output_distances(reference, logits, MULTI).double().mean()),
        float((answers == (reference >= 0)).all(1).double().mean()),
    )


def regression_metrics(outputs: Tensor, targets: Tensor, reference: Tensor) -> RegressionMetrics:
    """outputs, reference (n, 1), targets (n,)."""
    values, targets = outputs[:, 0].double(), targets.double()
    return RegressionMetrics(
        len(targets),
        float((values - targets).square().mean()),
        correlation(values, targets),
        correlation(_ranks(values), _ranks(targets)),
        float((values - reference[:, 0].double()).square().mean()),
    )


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's, of (n,) and (n,); 0 where either is constant."""
    x, y = x - x.mean(), y - y.mean()
    spread = x.norm() * y.norm()
    return float((x @ y / spread).clamp(-1, 1)) if spread > 0 else 0.0


def _ranks(x: Tensor) -> Tensor:
    """From 0, equal values sharing the mean of theirs.  (n,) -> (n,)."""
    _, group, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts + 1) / 2)[group].double()


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Mean gap of confidence and accuracy over BINS equal bins of confidence (ECE, arXiv:1706.04599).  (n, C), (n,)."""
    confidence, answers = probabilities.double().max(-1)
    right = (answers == labels).double()
    place = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    gap = torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add(0, place, right - confidence)
    return float(gap.abs().sum() / len(labels))

"""The benchmark on ResNet-9, narrow and small: its nets are trained as torch trains them, its sets and costs are what
they say."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.digits import Bench, Family, Problem, Size, attributed
from benchmarks.resnet9 import RATES, forget_set, pca_cluster, resnet9
from calib.model.per_example_gradients import linear_layers
from tests.unlearn.test_batchnorm import alone
from unlearn.methods.matching import MatchingConfig
from unlearn.model.ensemble import of_module
from unlearn.model.examples import Examples, plain_examples
from unlearn.model.training_recipe import Training

HOW = Training(epochs=2, batch=16, lr=0.1)


def blocks(rows: int, seed: int = 0) -> Examples:
    """Images of 12 pixels with a bright part, in ten classes."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(10, (rows,), generator=g)
    x = torch.randn(rows, 1, 12, 12, generator=g)
    for image, label in zip(x, y, strict=True):
        image[:, int(label) : int(label) + 3, : 3 + int(label)] += 2
    return plain_examples(x, y)


@pytest.fixture(scope="module")
def family() -> Family:
    return Family(blocks(60), 48, Size(models=2, held_out=2, options=HOW, net=partial(resnet9, 2, 1), stacked=True))


def test_stacked_nets_are_trained_as_torch_trains_each(family: Family) -> None:
    """Parameters, running statistics and answers in evaluation, of batch norm in eight layers."""
    for seed in range(2):
        torch.manual_seed(seed)
        single = alone(resnet9(2, 1), seed, family.rows, torch.ones(48, dtype=torch.bool), HOW)
        for name, expected in single.state_dict().items():
            assert torch.allclose(family.originals.params[name][seed], expected, atol=1e-5), name
        with torch.no_grad():
            assert torch.allclose(family.before[seed], single(family.points.inputs[""]), atol=1e-4)


def test_the_pca_cluster_is_of_the_influence_of_rows_on_each_other(family: Family) -> None:
    """The greatest scores on the first left singular vector of G H^-1 G', its columns centered; what G has of the head,
    which is narrow enough for no projection, is the gradient of the net in evaluation mode."""
    attribution = attributed(family, 0)[1]
    gradients = attribution.gradients.double()
    inverse = torch.block_diag(*attribution.inverse)
    influence = gradients @ inverse @ gradients.mT
    first = torch.linalg.svd(influence - influence.mean(0))[0][:, 0]
    first = first if first[first.abs().argmax()] > 0 else -first
    assert set(pca_cluster(family, 5).tolist()) == set(first.argsort(descending=True)[:5].tolist())
    module = resnet9(2, 1).eval()
    module.load_state_dict({n: p[0] for n, p in family.originals.params.items()})
    row = family.rows[:1]
    loss = torch.nn.functional.cross_entropy(
        of_module(module)(dict(module.state_dict(keep_vars=True)), row), row.labels
    )
    loss.backward()
    head = next(name for name in linear_layers(module) if name.endswith("head.weight"))
    exact = dict(module.named_parameters())[head].grad
    assert exact is not None and torch.allclose(
        gradients[0, -exact.numel() :].view(exact.shape).float(), exact, atol=1e-5
    )
    assert forget_set("random10", family).unique().numel() == 10


def test_matching_costs_a_fifth_of_a_retrain(family: Family) -> None:
    """Of few models KLoM is Gaussian; without a third ensemble the floor's chooses settings."""
    problem = Problem(family, torch.arange(4))
    bench = Bench("first", problem, (1000, 2000))
    assert bench.other is bench.tuning and not problem.binned
    most = bench.most_retained(2, 1)
    assert most == pytest.approx(0.2 * HOW.epochs * 48 / 2 / 4 - 1)
    grid = [MatchingConfig(epochs=2, batch=8, lr=lr, retain_multiplier=most) for lr in RATES]
    bench.matched("oracle matching", bench.tuning, grid)
    (row,) = bench.rows
    assert row["cost"] == "20%" and {"forget", "retain", "validation"} <= row.keys() and "forget, Gaussian" not in row

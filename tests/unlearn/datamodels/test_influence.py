from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from calib import Failed
from calib.model.per_example_gradients import GradientProjection, linear_layers, projections
from unlearn.datamodels.datamodel import fidelity
from unlearn.datamodels.influence import Attribution, Seen, second_moment
from unlearn.methods.exact import Logistic
from unlearn.model.ensemble import initial_ensemble, of_module, subsets, train_ensemble
from unlearn.model.examples import Examples, plain_examples
from unlearn.model.margins import margins
from unlearn.model.training_recipe import Training


def seen_of(module: nn.Module, each: int = 10**6) -> Seen:
    linears, forward = linear_layers(module), of_module(module)
    params = {name: p.detach() for name, p in module.named_parameters()}
    return Seen(forward, params, linears, projections(linears, each, 0), forward)


def head(seed: int = 0) -> tuple[nn.Linear, Tensor, Tensor, Logistic]:
    """A multinomial logistic fit, as a module."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 6, generator=g, dtype=torch.float64)
    y = (x[:, :3] + torch.randn(200, 3, generator=g, dtype=torch.float64)).argmax(-1)
    fit, module = Logistic.fit(x, y, 3, 1.0), nn.Linear(6, 3, bias=False).double()
    module.weight.data = fit.theta.mT.clone()
    return module, x, y, fit


def test_of_a_logistic_fit_it_is_the_influence_function_s_deletion() -> None:
    """With the true curvature: one step with the Hessian of all rows, and its directional derivative."""
    module, x, y, fit = head()
    seen, deleted = seen_of(module), torch.zeros(200, dtype=torch.bool)
    deleted[:15] = True
    own, _ = seen.gradients(plain_examples(x, y), 0)
    order = torch.arange(18).view(6, 3).mT.flatten()  # of (in, out) in `exact`, of (out, in) here
    hessian = fit.hessian(x)[order][:, order]
    attribution = Attribution.of(own, [hessian], 1e-12)
    moved = fit.without(x, y, deleted)
    assert torch.allclose(attribution.direction(deleted).view(3, 6), (moved.theta - fit.theta).mT, atol=1e-9)
    change = seen.along(attribution.direction(deleted), plain_examples(x, y))
    assert torch.allclose(change, x @ (moved.theta - fit.theta), atol=1e-9)


def test_scores_are_what_each_row_adds_to_a_margin() -> None:
    module, x, y, _ = head()
    seen, rows = seen_of(module), plain_examples(x, y)
    own, drawn = seen.gradients(rows, 0)
    attribution = Attribution.of(own, second_moment(drawn, seen.blocks), 0.1)
    scores = attribution.scores(seen.of_outputs(rows))
    one = torch.zeros(200, dtype=torch.bool)
    one[7] = True
    change = seen.along(attribution.direction(one), rows)
    step = 1e-6
    logits = seen.forward(seen.params, rows)
    slope = (margins(logits + step * change, y) - margins(logits - step * change, y)) / (2 * step)
    assert torch.allclose(-scores[7], slope, atol=1e-6)
    assert scores.diagonal().min() > 0, "a row makes its own label likelier"


def test_drawn_labels_estimate_the_hessian() -> None:
    module, x, y, fit = head()
    seen, rows = seen_of(module), plain_examples(x, y)
    mean = torch.stack([second_moment(seen.gradients(rows, seed)[1], [18])[0] for seed in range(400)]).mean(0)
    order = torch.arange(18).view(6, 3).mT.flatten()
    hessian = (fit.hessian(x) - torch.eye(18, dtype=torch.float64))[order][:, order]
    assert (mean - hessian).norm() / hessian.norm() < 0.03


class Words(nn.Module):
    """A decision at every token, from the tokens up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, 5), nn.Linear(5, 7), nn.Linear(7, 9)

    def forward(self, ids: Tensor) -> Tensor:
        made: Tensor = self.head(self.mix(self.embed(ids)).cumsum(1).tanh())
        return made


def test_layers_that_follow_each_other_are_curved_together() -> None:
    """Of blocks along the diagonal the inverse is that of the whole matrix with nothing between them."""
    g = torch.Generator().manual_seed(0)
    sizes = [3, 5, 2]
    gradients, outputs = (torch.randn(n, 10, generator=g, dtype=torch.float64) for n in (30, 4))
    place = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    whole = (gradients.mT @ gradients).where(place[:, None] == place, 0.0)
    blocks = Attribution.of(gradients, second_moment(gradients, sizes), 0.1)
    dense = Attribution.of(gradients, [whole], 0.1)
    deleted = torch.arange(30) < 4
    assert torch.allclose(blocks.direction(deleted), dense.direction(deleted), atol=1e-12)
    assert torch.allclose(blocks.scores(outputs), dense.scores(outputs), atol=1e-12)
    projected = {str(i): GradientProjection(torch.eye(40), torch.eye(40)) for i in range(5)}
    assert Seen(None, {}, {}, projected, None).blocks == [3200, 3200, 1600], "within 4096"  # type: ignore[arg-type]
    wide = {"a": GradientProjection(torch.eye(80), torch.eye(80)), "b": GradientProjection(torch.eye(2), torch.eye(2))}
    assert Seen(None, {}, {}, wide, None).blocks == [6400, 4], "a layer is never divided"  # type: ignore[arg-type]


def test_of_rows_with_several_decisions_gradients_are_sums() -> None:
    torch.manual_seed(0)
    module, ids = Words().double(), torch.randint(9, (4, 6))
    labels = ids.roll(-1, 1)
    labels[0, :3], labels[2, 4:] = -100, -100

    def forward(params: object, rows: Examples) -> Tensor:
        said: Tensor = functional_call(module, dict(params), (rows.inputs["ids"],))  # type: ignore[call-overload]
        return said[rows.target_mask]

    linears = linear_layers(module)
    params = {name: p.detach() for name, p in module.named_parameters()}
    seen = Seen(forward, params, linears, projections(linears, 4, 0), forward)
    rows = Examples({"ids": ids}, labels)
    together, _ = seen.gradients(rows, 0)
    each = torch.cat([seen.gradients(rows[i : i + 1], 0)[0] for i in range(4)])
    assert torch.allclose(together, each, atol=1e-10)
    bare, _ = seen.gradients(Examples({"ids": ids}, labels.where(torch.arange(6) != 5, -100)), 0)
    assert not torch.allclose(together, bare)


def test_it_ranks_deletions_of_a_network_and_has_nearly_their_scale() -> None:
    """24 networks trained without random halves, against the mean over 8 that saw all rows."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(120, 5, generator=g)
    y = (x[:, :2].square().sum(1) > 1.4).long() ^ (torch.rand(120, generator=g) < 0.15).long()

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))

    rows, options = plain_examples(x, y), Training(epochs=40, batch=20, lr=0.3, decay=0.01)
    masks = subsets(24, 120, 0.8, seed=0)
    seeds = [k % 8 for k in range(24)]
    full = train_ensemble(
        initial_ensemble(make, range(8)), rows, torch.ones(8, 120, dtype=torch.bool), range(8), options
    )
    parts = train_ensemble(initial_ensemble(make, seeds), rows, masks, seeds, options)
    true = margins(parts.logits(rows), y) - margins(full.logits(rows), y)[seeds]
    predicted = torch.zeros(24, 120)
    for k in range(8):
        params = {name: p[k] for name, p in full.params.items()}
        linears, forward = linear_layers(make()), full.forward
        module = make()
        module.load_state_dict(params)
        linears = linear_layers(module)
        seen = Seen(of_module(module), params, linears, projections(linears, 99, 0), forward)
        own, drawn = seen.gradients(rows, 0)
        scores = Attribution.of(own, second_moment(drawn, seen.blocks), 0.1).scores(seen.of_outputs(rows))
        predicted -= ((~masks).double() @ scores).float() / 8
    found = fidelity(predicted, true)
    assert found.score > 0.3 and 0.4 < found.slope < 2.5, found


def test_a_curvature_that_is_singular_says_so() -> None:
    broken = -torch.eye(3)
    with pytest.raises(Failed, match="raise --damping"):
        Attribution.of(torch.zeros(2, 3), [broken], 0.1)

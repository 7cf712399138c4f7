from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from calib import BadInput
from calib.model.per_example_gradients import GradientProjection, lifted, linear_layers, project_gradients, projections


class Tokens(nn.Module):
    """Linears on tokens, one of them run twice, then one on their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), Conv1D(6, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.c(self.b(self.b(self.a(x).tanh()).tanh()).tanh().mean(1))
        return made


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 3, (1, 2)), nn.Flatten(), nn.Linear(27, 3)
    )


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tokens": (Tokens, (7, 5)),
    "convolutions": (convolutions, (2, 6, 7)),
    "rows": (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), (5,)),
}


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = NETS[request.param]
    return make().double(), torch.randn(6, *shape, dtype=torch.float64)


def doubled(module: nn.Module, each: int) -> dict[str, GradientProjection]:
    found = projections(linear_layers(module), each, seed=3)
    return {name: GradientProjection(p.ins.double(), p.outs.double()) for name, p in found.items()}


def loop(module: nn.Module, x: Tensor) -> list[dict[str, Tensor]]:
    """Each example's own gradient, by the library."""
    names, params = zip(*module.named_parameters(), strict=True)
    rows = (torch.autograd.grad(module(row[None]).square().sum(), params) for row in x)
    return [dict(zip(names, found, strict=True)) for found in rows]


def test_unprojected_they_are_the_gradients_of_a_plain_loop(net: tuple[nn.Module, Tensor]) -> None:
    module, x = net
    linears, whole = linear_layers(module), doubled(module, 10**6)
    (found,) = project_gradients(linears, whole, lambda: [module(x).square().sum()], torch.arange(6), 6)
    for row, plainly in zip(found, loop(module, x), strict=True):
        lift = lifted(row, linears, whole)
        assert lift.keys() == plainly.keys()
        for name, gradient in plainly.items():
            assert torch.allclose(lift[name], gradient, atol=1e-12), name


def test_projected_they_are_projections_of_those(net: tuple[nn.Module, Tensor]) -> None:
    """And `lifted` is the transpose: <features, v> = <gradient, lifted v> for every v."""
    module, x = net
    linears, some = linear_layers(module), doubled(module, 3)
    (found,) = project_gradients(linears, some, lambda: [module(x).square().sum()], torch.arange(6), 6)
    v = torch.randn(found.shape[1], dtype=torch.float64)
    lift = lifted(v, linears, some)
    for row, plainly in zip(found, loop(module, x), strict=True):
        assert torch.isclose(row @ v, torch.stack([(plainly[n] * lift[n]).sum() for n in lift]).sum())


def test_projections_keep_lengths_on_average_and_are_a_seed_s() -> None:
    linears = linear_layers(nn.Linear(300, 200))
    (p,) = projections(linears, 32, seed=0).values()
    x = torch.randn(300 + 1, 50)
    assert ((p.ins.mT @ x).norm(dim=0) / x.norm(dim=0)).mean().item() == pytest.approx(1, abs=0.05)
    (again,), (other,) = projections(linears, 32, seed=0).values(), projections(linears, 32, seed=1).values()
    assert torch.equal(p.outs, again.outs) and not torch.equal(p.outs, other.outs)


def test_decisions_come_together_by_their_owners() -> None:
    """A head that sees (d, in) decisions of three examples, the second of which has two."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(4, 5).double(), torch.randn(4, 4, dtype=torch.float64)
    linears, whole = linear_layers(head), doubled(head, 99)
    row_index = torch.tensor([0, 1, 1, 2])
    (found,) = project_gradients(linears, whole, lambda: [head(hidden).square().sum()], row_index, 3)
    (each,) = project_gradients(linears, whole, lambda: [head(hidden).square().sum()], torch.arange(4), 4)
    assert torch.allclose(found, torch.stack([each[0], each[1] + each[2], each[3]]))


def test_several_sums_of_one_pass() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 4)
    linears, some = linear_layers(net), projections(linear_layers(net), 2, 0)

    def run() -> list[Tensor]:
        y = net(x)
        return [y[:, 0].sum(), y[:, 1].sum()]

    both = project_gradients(linears, some, run, torch.arange(5), 5)
    for i, one in enumerate(both):
        (alone,) = project_gradients(linears, some, lambda i=i: [run()[i]], torch.arange(5), 5)  # type: ignore[misc]
        assert torch.equal(one, alone)


def test_a_model_without_linears_is_refused() -> None:
    with pytest.raises(BadInput, match="runs no linear"):
        project_gradients({}, {}, lambda: [torch.zeros(())], torch.arange(1), 1)

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calib import Diverged
from calib.jobs.journal import CheckpointSlot, Journal
from calib.jobs.training_loop import Group, OptimizerConfig, optimize, totals

Loss = Callable[[int], dict[str, float]]


def bowl(x: Tensor, noise: float = 0.0) -> Loss:
    def gradients(step: int) -> dict[str, float]:
        target = 1 + noise * math.sin(step)
        near, small = (x - target).square().sum(), 0.01 * x.square().sum()
        (near + small).backward()
        return {"near": near.item(), "small": small.item()}

    return gradients


def test_a_minimum_is_found_and_parts_are_told_apart() -> None:
    x = torch.tensor([3.0, -2.0], requires_grad=True)
    curve = optimize([Group([x], 0.3)], bowl(x), OptimizerConfig(steps=200))
    assert torch.allclose(x, torch.full((2,), 1 / 1.01), atol=1e-3)
    assert curve[0]["near"] == 4 + 9 and curve[0]["small"] == pytest.approx(0.13)
    assert totals(curve)[0] == pytest.approx(13.13)


@pytest.mark.parametrize("part", ["near", "small"])
def test_a_loss_that_is_no_number_stops_and_the_journal_has_the_last_good_state(part: str, tmp_path: Path) -> None:
    x = torch.zeros(2, requires_grad=True)
    seen: list[Tensor] = []

    def gradients(step: int) -> dict[str, float]:
        seen.append(x.detach().clone())
        parts = bowl(x)(step)
        return parts | {part: math.nan} if step == 3 else parts

    with pytest.raises(Diverged, match=rf"step 3: {part} is nan; lower the learning rate"):
        optimize([Group([x], 0.1)], gradients, OptimizerConfig(steps=9), page=CheckpointSlot(Journal(tmp_path), "fit"))
    tensors, notes = Journal(tmp_path).read("fit")
    assert len(notes["curve"]) < 3 and torch.equal(tensors["param.0"], seen[len(notes["curve"])])


def test_a_step_too_far_is_not_kept(tmp_path: Path) -> None:
    """Parameters may be numbers, and yet give none: what is kept is only a state whose loss is known."""
    x = torch.ones(2, requires_grad=True)

    def gradients(step: int) -> dict[str, float]:
        loss = x.square().square().sum()
        loss.backward()
        return {"loss": float(loss.detach())}

    with pytest.raises(Diverged, match="step 1: loss is inf"):
        optimize([Group([x], 1e30)], gradients, OptimizerConfig(steps=9), page=CheckpointSlot(Journal(tmp_path), "fit"))
    tensors, _ = Journal(tmp_path).read("fit")
    assert tensors["param.0"].abs().max() < 2


def test_a_gradient_that_is_no_number_stops_too() -> None:
    x = torch.zeros(1, requires_grad=True)

    def gradients(step: int) -> dict[str, float]:
        x.grad = torch.full_like(x, math.inf if step == 2 else 1.0)
        return {"loss": 0.0}

    with pytest.raises(Diverged, match="step 2: a gradient is not finite"):
        optimize([Group([x], 0.1)], gradients, OptimizerConfig(steps=5))


def test_rates_rise_and_fall() -> None:
    options = OptimizerConfig(steps=100, warmup=9)
    rates = [options.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] and rates[99] < 0.001
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)
    assert OptimizerConfig(steps=10).rate(0) == 1.0


def test_the_whole_gradient_is_clipped() -> None:
    """One step of AdamW is blind to the size of its gradient; two unequal ones are not."""
    ends = []
    for clip in (math.inf, 0.5):
        x = torch.zeros(2, requires_grad=True)

        def gradients(step: int, x: Tensor = x) -> dict[str, float]:
            x.grad = torch.tensor([1.0, 0.0]) * 10.0**step
            return {"loss": 0.0}

        optimize([Group([x], 0.1)], gradients, OptimizerConfig(steps=2, clip=clip))
        ends.append(x.detach())
    assert not torch.allclose(*ends)


def test_models_that_descend_together_do_so_as_if_apart() -> None:
    """To the bit: rates and the norms that gradients are clipped to are each model's own."""
    config = OptimizerConfig(steps=7, warmup=2, clip=0.5, decay=0.1)
    targets = [torch.tensor([3.0, -1.0]), torch.tensor([100.0, 7.0, -3.0])]
    rates = [0.1, 0.02]

    def descended(*numbers: int, models: tuple[int, ...] = (0, 1)) -> list[Tensor]:
        params = {number: torch.zeros_like(targets[number]).requires_grad_() for number in numbers}

        def gradients(step: int) -> dict[str, float]:
            losses = {n: (p - targets[n]).square().sum() for n, p in params.items()}
            sum(losses.values(), torch.zeros(())).backward()
            return {str(n): float(loss.detach()) for n, loss in losses.items()}

        groups = [Group([p], rates[n], model=models[n]) for n, p in params.items()]
        optimize(groups, gradients, config)
        return [p.detach() for p in params.values()]

    together = descended(0, 1)
    assert all(torch.equal(a, b) for a, b in zip(together, descended(0) + descended(1), strict=True))
    assert not torch.equal(together[0], descended(0, 1, models=(0, 0))[0]), "of one model, one norm"


def test_decay_pulls_weights_to_zero_without_any_gradient() -> None:
    x = torch.ones(3, requires_grad=True)

    def gradients(step: int) -> dict[str, float]:
        return {"loss": 0.0}

    optimize([Group([x], 0.1)], gradients, OptimizerConfig(steps=4, decay=0.5))
    expected = 1.0
    for step in range(4):
        expected *= 1 - 0.1 * OptimizerConfig(steps=4).rate(step) * 0.5
    assert torch.allclose(x, torch.full((3,), expected))


@pytest.mark.parametrize("eight_bit", [False, True])
def test_interrupted_and_taken_up_again_ends_with_the_same_bytes(eight_bit: bool, tmp_path: Path) -> None:
    if eight_bit:
        pytest.importorskip("bitsandbytes")
    options = OptimizerConfig(steps=12, warmup=2, clip=1.0, decay=0.1, eight_bit=eight_bit)

    def start() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(5000, generator=generator).requires_grad_()  # moments of fewer stay in 32 bits

    def groups(x: Tensor) -> list[Group]:
        return [Group([x, torch.zeros(5000, requires_grad=True)], 0.05)]

    def broken(x: Tensor, at: int) -> Loss:
        def gradients(step: int) -> dict[str, float]:
            if step == at:
                raise KeyboardInterrupt
            return bowl(x, noise=0.3)(step)

        return gradients

    whole = start()
    expected = optimize(groups(whole), bowl(whole, noise=0.3), options)
    for at in (1, 5, 11):
        folder = tmp_path / str(at)
        folder.mkdir()
        x = start()
        with pytest.raises(KeyboardInterrupt):
            optimize(groups(x), broken(x, at), options, page=Often(Journal(folder), "fit"))
        x = start()
        curve = optimize(groups(x), bowl(x, noise=0.3), options, page=Often(Journal(folder), "fit"))
        assert torch.equal(x, whole) and curve == expected


class Often(CheckpointSlot):
    due = True  # type: ignore[assignment]

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from calib import BadInput
from calib.quant.grid_types import Grid
from calib.quant.round_to_nearest import round_weight as to_nearest
from tests.unlearn.conftest import Site
from tests.unlearn.test_unlearn import wanted
from unlearn import unlearn
from unlearn.methods.descent import StepContext, descend
from unlearn.methods.quantization_robust import mean, rounded, stepwise
from unlearn.model.ensemble import Ensemble

seeds = st.integers(0, 10_000)
GRID = Grid(4, group=8)


def two(seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights of two models before and after, most of them hardly moved; "bias" is on no grid."""
    g = torch.Generator().manual_seed(seed)
    before = {"w": torch.randn(2, 6, 16, generator=g), "bias": torch.randn(2, 6, generator=g)}
    size = 10 ** torch.empty(2, 6, 16).uniform_(-4, 0, generator=g)
    after = {"w": before["w"] + size * torch.randn(2, 6, 16, generator=g), "bias": before["bias"] + 1}
    return before, {name: p.requires_grad_() for name, p in after.items()}


@given(seeds)
def test_the_rounded_model_is_that_of_the_grid_and_gradients_go_straight_through(seed: int) -> None:
    before, after = two(seed)
    found = rounded(before, ["w"], GRID)(after)
    assert found["bias"] is after["bias"]
    for model in range(2):
        levels = {len(group.unique()) for group in found["w"][model].detach().flatten().split(8)}
        assert max(levels) <= 16
    again = rounded(before, ["w"], GRID)({**after, "w": found["w"].detach()})
    assert torch.equal(again["w"], found["w"]), "what lies on the grid stays"
    inside = (after["w"] - found["w"]).abs() < 1e-2
    (gradient,) = torch.autograd.grad(found["w"].sum(), after["w"])
    assert (gradient[inside] == 1).all()


@given(seeds, st.sampled_from([1.0, 2.0, 3.0]))
def test_a_weight_stays_or_moves_by_the_least(seed: int, least: float) -> None:
    before, after = two(seed)
    through = stepwise(before, ["w"], GRID, least)
    with torch.no_grad():
        found = through(after)["w"]
    change, asked = found - before["w"], after["w"].detach() - before["w"]
    step = torch.stack([_steps(w) for w in before["w"]])
    floor = least * step / 2
    stays = change == 0
    assert (asked.abs()[stays] <= floor[stays] / 2 * 1.001).all(), "only what hardly moved stays"
    assert (change.abs()[~stays] >= floor[~stays] * 0.999).all()
    assert (change[~stays].sign() == asked[~stays].sign()).all()
    far = asked.abs() > floor * 1.001
    assert torch.allclose(change[far], asked[far], atol=1e-5), "what moves further moves as far as it would"
    graph = through(after)["w"]
    assert torch.allclose(graph, found, atol=1e-5)
    (gradient,) = torch.autograd.grad(graph.sum(), after["w"])
    assert (gradient == 1).all()


def _steps(weight: torch.Tensor) -> torch.Tensor:
    """A step of the grid of each weight, found from the map alone: by halving, from where on a change counts."""
    through = stepwise({"w": weight[None]}, ["w"], GRID, 2.0)
    low, high = torch.zeros_like(weight), torch.full_like(weight, 10.0)
    with torch.no_grad():
        for _ in range(40):
            middle = (low + high) / 2
            counts = through({"w": weight[None] + middle})["w"][0] != weight
            low, high = torch.where(counts, low, middle), torch.where(counts, middle, high)
    return 2 * high  # a change of half the least counts, and the least is one step


@given(seeds)
def test_two_halves_of_a_step_always_change_the_code(seed: int) -> None:
    before, after = two(seed)
    with torch.no_grad():
        found = stepwise(before, ["w"], GRID, 2.0)(after)["w"]
    through, step = rounded(before, ["w"], GRID), torch.stack([_steps(w) for w in before["w"]])
    at = [through({"w": w})["w"] for w in (before["w"], found)]
    within = torch.stack([(q - w).abs() <= 0.501 * step for q, w in zip(at, (before["w"], found), strict=True)]).all(0)
    assert (at[0] != at[1])[within & (found != before["w"])].all()


def test_the_loss_is_that_of_what_the_map_gives() -> None:
    before = {"w": torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))}
    through, seen = rounded(before, ["w"], GRID), list[torch.Tensor]()

    def losses(run: Callable[[], dict[str, torch.Tensor]], step: int) -> list[dict[str, torch.Tensor]]:
        seen.append((params := run())["w"].detach().clone())
        return [{"loss": (params["w"] - 1).square().sum((1, 2))}]

    models = Ensemble(lambda params, rows: params["w"], before, stacked=False)
    moved = descend(models, losses, 20, 0.05, StepContext(through=through)).params["w"]
    for weights in (*seen, moved):
        assert torch.equal(through({"w": weights})["w"], weights), "always on the grid"
    assert not torch.equal(seen[0], seen[-1]), "and moved by gradients straight through it"


def test_a_soup_is_the_mean() -> None:
    ways = [{"a": torch.full((1, 3), float(i))} for i in range(3)]
    assert torch.equal(mean(ways)["a"], torch.ones(1, 3))


@pytest.mark.parametrize("method", ["dmm", "npo", "oracle-matching"])
def test_a_model_that_forgot_on_a_grid_is_on_it(words: Site, tmp_path: Path, method: str) -> None:
    """Rounded again it is the same model, so nothing comes back; without a grid rounding changes it."""
    for grid in ("w4a16-channel", None):
        more = {"multiplier": 1.0} if method == "dmm" else {}
        unlearn(words.model, tmp_path / "out", wanted(words, method, grid=grid, **more), resume=False)
        tensors = load_file(tmp_path / "out/model.safetensors")
        blocks = {n: t.float() for n, t in tensors.items() if "layers." in n and t.dim() == 2}
        assert len(blocks) == 14
        off = [float((to_nearest(t, "w4a16-channel").values - t).norm() / t.norm()) for t in blocks.values()]
        assert (max(off) < 0.05) == (grid is not None)


def test_a_soup_and_a_floor_are_taken_by_whole_jobs(words: Site, tmp_path: Path) -> None:
    before = load_file(words.model / "model.safetensors")
    single = unlearn(words.model, tmp_path / "out", wanted(words, "npo"), resume=False)
    three = unlearn(words.model, tmp_path / "soup", wanted(words, "npo", model_soup=3))
    assert single["quality"] != three["quality"]
    ways = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "soup"))
    apart = [float((a - b).abs().max()) for a, b in zip(*(way.values() for way in ways), strict=True)]
    assert max(apart) > 1e-4, "each way has an order of rows of its own"
    unlearn(words.model, tmp_path / "floor", wanted(words, "npo", grid="w4a16-channel", min_step=1.0, lr=2e-2))
    after = load_file(tmp_path / "floor/model.safetensors")
    name = next(n for n in before if "down_proj" in n)
    same = before[name] == after[name]
    assert 0.3 < float(same.float().mean()) < 1, "most weights stay, bit by bit"
    first = unlearn(
        words.model, tmp_path / "first", wanted(words, "oracle-matching", grid="w4a16-channel", match_quantized=True)
    )
    other = unlearn(words.model, tmp_path / "other", wanted(words, "oracle-matching", grid="w4a16-channel"))
    assert first["quality"] != other["quality"]


def test_options_that_do_not_fit(words: Site, net: Site, tmp_path: Path) -> None:
    for more, said in (
        ({"grid": "w4a4-channel"}, "is about weights alone; write w4a16-channel"),
        ({"grid": "nonsense"}, "scheme 'nonsense' is unknown"),
        ({"grid": "w4a16-channel", "lora": 2}, "leave out --lora"),
        ({"min_step": 1.0}, "min-step: changes nothing"),
        ({"match_quantized": True}, "match-quantized: changes nothing"),
        ({"model_soup": 0}, "model-soup is 0; it must be at least 1"),
        ({"grid": "nf4", "min_step": 1.0}, "has no step of one size"),
        ({"grid": "w4a16-channel", "min_step": -1.0}, "must not be negative"),
    ):
        with pytest.raises(BadInput, match=said):
            wanted(words, "npo", **more)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="group size 7 does not divide"):
        unlearn(words.model, tmp_path / "out", wanted(words, "npo", grid="w4a16-g7"))
    with pytest.raises(BadInput, match="language models alone are quantized"):
        unlearn(net.model, tmp_path / "out", wanted(net, "npo", grid="w4a16-channel"))
    assert not (tmp_path / "out").exists()

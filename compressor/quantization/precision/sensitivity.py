"""What rounding each part of a model will cost, predicted from one backward pass instead of measured one by one.

Near the weights W the KL of the model's answers is quadratic, 1/2 d' F d with the Fisher matrix F. K-FAC
(arXiv:1503.05671) takes a linear's F for the Kronecker product of A = E x x' of its inputs and G = E g g' of the
gradients of its outputs, where g descends from the log-likelihood of tokens drawn from the model itself. So a linear
that is rounded to W + D costs 1/2 tr(G D A D') nats a token. It is predicted of every linear alone; a sum over linears
is anchored by one measurement of all of them together, as losses do not add up where they are large.

Blocks are walked back one at a time (`calib.blockwise.backward`): what is held is one block, its factors, and the
inputs of all blocks for the rows, on disk beyond a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from calib import Failed
from calib.blockwise.backward import BlockSequence, backward
from calib.blockwise.linears import Linear, put_together
from calib.blockwise.model import BlockwiseModel, Params
from calib.blockwise.walk import RowBatch
from calib.data.corpus import Corpus
from calib.jobs.context import RunContext
from calib.jobs.journal import stop_if_asked
from calib.losses.chunked_head import by_chunks
from calib.losses.divergences import cross_entropy
from calib.runtime.distributed import barrier, is_main_process
from calib.runtime.memory import trim_heap
from calib.runtime.progress import stage
from calib.stats.moments import Moments
from calib.stats.rate_distortion import LEVELS, rate_curve, water_filling
from compressor.engine.blockwise_runs import embed
from compressor.engine.input_statistics import advance, input_moments
from compressor.engine.runtime_transforms import runtime_transforms
from compressor.quantization.calibrate import transformed
from compressor.quantization.options import PROFILES, Quantize
from compressor.quantization.precision.mixed_precision import (
    LayerGroup,
    Width,
    allocate_bits,
    answers_kl,
    block_groups,
    profile_groups,
    rounded_group,
    total_kl,
)
from compressor.quantization.quantized_model import QuantizedModel
from compressor.quantization.rounding import Rounder

Visit = Callable[[int, Params, Mapping[str, Moments], Mapping[str, Moments]], None]


def predicted_kl(gradients: Tensor, error: Tensor, inputs: Tensor) -> float:
    """KL in nats per token that a linear costs when its weight is off by `error` (out, in): 1/2 tr(G D A D').

    gradients G (out, out): mean of g g' over tokens, g the gradient of the log-likelihood of a drawn token, in nats, by
    the output. inputs A (in, in): mean of x x'.
    """
    return 0.5 * float(((gradients @ error) * (error @ inputs)).sum(dtype=torch.float64))


def unforeseen(stream: BlockwiseModel) -> str | None:
    """Why no gradients of a model's linears are gathered; None where they are."""
    linears = [one for i in range(stream.layers) for one in stream.linears(i)]
    if any(one.step for one in linears):
        return "experts see some tokens each, and gradients of what they put out are not gathered"
    if stream.encoder_blocks:
        return "an encoder's tokens are others than the decoder's, and gradients are not gathered for both"
    return None


@dataclass(frozen=True)
class _BackwardPass:
    """One walk to the last block and back, on rows (N, T); `seed` draws the tokens."""

    model: QuantizedModel
    rows: Corpus
    seed: int

    def run(self, visit: Visit, context: RunContext) -> None:
        """Call visit(index, parameters, inputs, gradients) for each block, last first: sums of x x' and of g g' over
        the real tokens, by the name of a linear's module."""
        stream, model = self.model.stream, self.model
        states = embed(stream, self.rows, model.outer, context)
        first = states[slice(0, len(states))].to(stream.device)
        store = context.store((stream.layers * len(first), *first.shape[1:]), stream.dtype, stream.room)
        real = {id(batch): self.rows.mask[some].to(stream.device) for some, batch in states.batches}
        inputs, gradients = dict[str, Moments](), dict[str, Moments]()

        def run(i: int, params: Params, x: Tensor, batch: RowBatch) -> Tensor:
            # Rounded activations have no gradient of their own: what is predicted is of the weights.
            online = replace(model.online[i], activations=None, kv=None)
            with runtime_transforms(stream, i, online):
                if not torch.is_grad_enabled():
                    return stream.run(i, params, x, batch)
                with _watched(stream, i, real[id(batch)], inputs, gradients):
                    return stream.run(i, params, x, batch)

        with stage("sensitivity", stream.layers, "blocks") as done:

            def after(i: int, params: Params) -> None:
                with torch.no_grad():
                    visit(i, params, inputs, gradients)
                inputs.clear()
                gradients.clear()
                trim_heap()
                done("")
                stop_if_asked()

            walk = BlockSequence(
                stream.layers, lambda order: ((i, None) for i in order),
                lambda i, _: transformed(stream, i, model.transforms), run, stream.room,
            )  # fmt: skip
            with torch.enable_grad():
                backward(walk, first, self._drawn(), store, states.batches, after)

    def _drawn(self) -> Callable[[slice, Tensor], tuple[Tensor, Tensor]]:
        """-> the negative log-likelihood of tokens that the model draws, summed over some rows, and its gradient at
        their hidden states."""
        stream, mask = self.model.stream, self.rows.mask
        end = stream.prepared(self.model.outer, stream.walk.leaving)
        draws = torch.rand(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed))

        def nats(row: int, positions: slice, x: Tensor) -> Tensor:
            logits = stream.logits(x, end)
            labels = drawn_tokens(logits.detach(), draws[row, positions].to(logits.device))
            return (cross_entropy(labels, logits) * mask[row, positions].to(logits.device)).sum()

        def last(rows: slice, hidden: Tensor) -> tuple[Tensor, Tensor]:
            found = [by_chunks(h, partial(nats, rows.start + j), stream.vocab) for j, h in enumerate(hidden)]
            return torch.stack([total for total, _ in found]).sum(), torch.stack([given for _, given in found])

        return last


def drawn_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """Tokens (t,) that are drawn from softmax(logits) (t, V) where the distribution function passes `uniform` (t,)."""
    up_to = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(up_to, (uniform * up_to[:, -1])[:, None]).squeeze(1).clamp(max=logits.shape[-1] - 1)


@contextmanager
def _watched(
    stream: BlockwiseModel, index: int, real: Tensor, inputs: dict[str, Moments], gradients: dict[str, Moments]
) -> Iterator[None]:
    """Add what enters the linears of a block that runs, and later the gradients of what leaves them, to the sums."""
    block, kept = stream.blocks[index], real.flatten()

    def add(sums: dict[str, Moments], name: str, values: Tensor) -> None:
        flat = values.detach().float().flatten(0, -2)
        if len(flat) != len(kept):
            raise Failed(f"{stream.block_name(index)}.{name}: does not see each token once; take --profile measured")
        sums.setdefault(name, Moments.zero(flat.shape[1], flat.device)).add(flat[kept])

    def hook(name: str, module: torch.nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        add(inputs, name, given[0])
        made.register_hook(partial(add, gradients, name))

    hooks = [
        block.get_submodule(name).register_forward_hook(partial(hook, name))
        for name in dict.fromkeys(one.module for one in stream.linears(index))
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def gradient_factor(linear: Linear, gradients: Mapping[str, Moments]) -> Tensor:
    """G (out, out) of a linear, a mean over tokens, from the sums of the module that multiplies."""
    sums = gradients[linear.module]
    gram = sums.gram if linear.rows is None else sums.gram[slice(*linear.rows), slice(*linear.rows)]
    return gram / max(sums.count, 1)


@dataclass(frozen=True)
class SensitivityProfile:
    """Groups of linears with what each costs in each width, as one backward pass over `tokens` tokens predicts it, and
    the fewest bits a weight of any Gaussian code at some KL (None: not asked for)."""

    groups: list[LayerGroup]
    tokens: int
    limit: list[tuple[float, float]] | None


def predict_groups(
    model: QuantizedModel, rows: Corpus, options: Quantize, rounder: Rounder, context: RunContext
) -> SensitivityProfile:
    """Predict what each of `options.widths()` costs each group of linears of every block, from one backward pass over
    `rows` (N, T).

    Linears are rounded against the inputs of these rows, as the job will against those of all. What is found goes into
    the journal; processes do the same work. The groups' `wasserstein` is empty.
    """
    stream, page, widths = model.stream, "sensitivity", options.widths()
    if page not in context.journal:
        found, water = dict[str, float](), [torch.zeros_like(LEVELS)] * 2

        def visit(i: int, params: Params, inputs: Mapping[str, Moments], gradients: Mapping[str, Moments]) -> None:
            for part in block_groups(stream, model.scheme, i):
                moments = {one.site: inputs[one.module] for one in reversed(part)}
                factors = {one.name: _factors(one, inputs, gradients) for one in part}
                for bits in widths:
                    made = rounded_group(model, i, part, bits, params, moments, rounder)
                    found[f"{part[0].name}.{bits}"] = sum(
                        predicted_kl(pulled, (made[one.name] - one.of(params)).float(), given)
                        for one in part for given, pulled in [factors[one.name]]
                    )  # fmt: skip
                for one in part if options.limit else ():
                    given, pulled = (torch.linalg.eigvalsh(f.double()).clamp(min=0).cpu() for f in factors[one.name])
                    square = float(one.of(params).double().square().mean())
                    water[:] = [a + b for a, b in zip(water, water_filling(given, pulled, square), strict=True)]

        _BackwardPass(model, rows, options.seed).run(visit, context)
        if is_main_process():
            context.journal.write(page, {}, {"kl": found, "water": [sums.tolist() for sums in water]})
        barrier()
    known = context.journal.notes(page)
    groups = [
        LayerGroup.of(part, {bits: known["kl"][f"{part[0].name}.{bits}"] for bits in widths}, {})
        for i in range(stream.layers)
        for part in block_groups(stream, model.scheme, i)
    ]
    nats, bits = (torch.tensor(sums, dtype=torch.float64) for sums in known["water"])
    curve = rate_curve(nats, bits, sum(one.weights for one in groups)) if options.limit else None
    return SensitivityProfile(groups, rows.tokens, curve)


def _factors(linear: Linear, inputs: Mapping[str, Moments], gradients: Mapping[str, Moments]) -> tuple[Tensor, Tensor]:
    """A (in, in) and G (out, out) of a linear."""
    sums = inputs[linear.module]
    return (sums.gram / max(sums.count, 1)).float(), gradient_factor(linear, gradients).float()


@torch.no_grad()
def kl_together(
    model: QuantizedModel, fitted: Corpus, shown: Corpus, bits: Mapping[str, Width], rounder: Rounder,
    context: RunContext,
) -> float:  # fmt: skip
    """Measure the KL, nats per token, of the answers on the rows `shown` (N, T) when all linears are rounded, each in
    its `bits` by name, from those of the model whose weights are not.  Linears are rounded against the inputs of the
    rows `fitted`."""
    if "anchor" not in context.journal:
        stream = model.stream
        share = replace(context, memory_budget=context.memory_budget // 3)
        calibration, plain, rounded = (embed(stream, rows, model.outer, share) for rows in (fitted, shown, shown))
        with stage("anchor", stream.layers, "blocks") as done:
            for i in range(stream.layers):
                params, made, online = transformed(stream, i, model.transforms), dict[str, Tensor](), model.online[i]
                moments = input_moments(stream, i, params, calibration, fitted.mask, online, advance=True)
                for part in block_groups(stream, model.scheme, i):
                    made |= rounded_group(model, i, part, bits[part[0].name], params, moments, rounder)
                advance(stream, i, params, plain, online)
                params |= put_together(stream.linears(i), made)
                advance(stream, i, params, rounded, online)
                del params, made, moments
                trim_heap()
                done("")
                stop_if_asked()
        kl = answers_kl(model, shown, plain, {"all": (rounded, 0)})["all"]
        if is_main_process():
            context.journal.write("anchor", {}, {"kl": kl})
        barrier()
    return float(context.journal.notes("anchor")["kl"])


def profile_rank_correlation(measured: Sequence[LayerGroup], predicted: Sequence[LayerGroup]) -> dict[str, float]:
    """Spearman's rank correlation of measured and predicted KL over all groups, by bits."""
    return {
        str(bits): float(spearmanr([one.kl[bits] for one in measured], [one.kl[bits] for one in predicted]).statistic)
        for bits in measured[0].kl
    }


def profile_and_allocate(
    model: QuantizedModel, calibration: Corpus, options: Quantize, profile: str, unpredicted: str | None,
    rounder: Rounder, context: RunContext, own: RunContext | None,
) -> tuple[list[LayerGroup], list[Width], dict[str, Any]]:  # fmt: skip
    """Find what each part suffers, and bits for each at `options.target_bits` on average.

    Args:
        model: with the transforms that learning starts from.
        calibration: rows (N, T), of which the first `options.profiled(profile)` are answered.
        options: of the job.
        profile: "sensitivity" or "measured".
        unpredicted: why nothing is predicted; None where it is.
        rounder: the job's rounding method.
        context: of the job, or of several that have all but the target in common: what each part suffers is found once.
        own: of this job, where what it measures at its target is kept; None: nothing is measured there.

    Returns:
        The groups; their bits; and for the report, which profile it was and why, KL predicted and measured, and where
        each group was measured the rank correlation of the two.
    """
    assert options.target_bits is not None
    rows, widths = options.profiled(profile), options.widths()
    predicted = None
    if unpredicted is None:
        predicted = predict_groups(model, calibration[:rows], options, rounder, context)
    about: dict[str, Any] = {"method": profile, "why": unpredicted if options.profile != profile else None}
    if predicted is not None and predicted.limit is not None:
        about["limit"] = {"tokens": predicted.tokens, "curve": predicted.limit}
    if profile == "measured" or predicted is None:
        parts = profile_groups(model, calibration, rows, widths, rounder, context)
        bits = allocate_bits(parts, options.target_bits)
        about |= {"measured": total_kl(parts, bits)}
        if predicted is not None:
            ranks = profile_rank_correlation(parts, predicted.groups)
            about |= {"predicted": total_kl(predicted.groups, bits), "rank_correlation": ranks}
        return parts, bits, about
    bits = allocate_bits(predicted.groups, options.target_bits)
    named = {name: b for part, b in zip(predicted.groups, bits, strict=True) for name in part.linears}
    if own is None:
        return predicted.groups, bits, about
    fitted, others = calibration[:rows], calibration[rows : rows + PROFILES["measured"]]
    # On rows that nothing was rounded against, where there are any.
    measured = kl_together(model, fitted, others if len(others.ids) else fitted, named, rounder, own)
    sum_of_them = total_kl(predicted.groups, bits)
    factor = measured / sum_of_them if measured > 0 < sum_of_them else 1.0
    parts = [replace(one, kl={b: factor * kl for b, kl in one.kl.items()}) for one in predicted.groups]
    return parts, bits, about | {"predicted": sum_of_them, "measured": measured}

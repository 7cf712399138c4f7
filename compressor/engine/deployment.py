"""At which block text like that of deployment differs from the calibration rows, in the float model's hidden states."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from calib.blockwise.model import BlockwiseModel
from calib.blockwise.row_states import RowStates
from calib.data.corpus import Corpus
from calib.jobs.context import RunContext
from calib.jobs.journal import stop_if_asked
from calib.runtime.distributed import barrier
from calib.runtime.memory import trim_heap
from calib.runtime.progress import stage
from calib.stats.moments import Moments
from calib.stats.state_shift import StateShift, chance_of, deal_rows, principal_components, state_shift
from compressor.engine.blockwise_runs import embed
from compressor.engine.input_statistics import advance
from compressor.engine.runtime_transforms import RuntimeTransforms

PAGE = "like"  # of the journal


@torch.no_grad()
def compare_texts(
    stream: BlockwiseModel, calibration: Corpus, like: Corpus, seed: int, context: RunContext
) -> dict[str, Any]:
    """Run the model as stored on two texts, and compare what each block puts out.

    Args:
        stream: the model.
        calibration: rows (N, T).
        like: rows (M, T') of a text like that of deployment.
        seed: of the deals of rows by which chance is told.
        context: of the job; what is found goes into its journal. Processes do the same work.

    Returns:
        For the report: `tokens` of both texts; `blocks` with figures as in `StateShift`, KL of random deals as their
        mean and 95th percentile, an infinite one as None; and `chance`, how probable a greatest KL over the blocks as
        large as this one is if rows were dealt to the two texts at random.
    """
    if PAGE not in context.journal:
        share = context.without(context.memory_budget // 2)
        texts, masks = (calibration, like), (calibration.mask, like.mask)
        states = [embed(stream, text, stream.read_start(images=bool(text.beside)), share) for text in texts]
        dealt = deal_rows(len(masks[0]), len(masks[0]) + len(masks[1]), seed)
        found = list[StateShift]()
        with stage(PAGE, stream.layers, "blocks") as done:
            for i, params in stream.reading(range(stream.layers)):
                for each in states:
                    advance(stream, i, params, each, RuntimeTransforms())
                sources = stream.reads_sources(i)
                real = [each.real(mask, sources=sources) for each, mask in zip(states, masks, strict=True)]
                found.append(_shift(states, real, dealt, stream.device))
                trim_heap()
                done("")
                stop_if_asked()
        notes = {
            "source": like.source.rpartition("/")[2],
            "rows": [len(mask) for mask in masks],
            "tokens": [text.tokens for text in texts],
            "blocks": [_noted(stream.block_name(i), one) for i, one in enumerate(found)],
            "chance": chance_of(torch.stack([one.kl for one in found])),
        }
        context.journal.write(PAGE, {}, notes)
        barrier()
    return context.journal.notes(PAGE)


def _shift(states: list[RowStates], real: list[Tensor], dealt: Tensor, device: torch.device) -> StateShift:
    """Compare the states of two texts' tokens that are `real`, after one block."""
    moments: Moments | None = None
    low, high = list[Tensor](), list[Tensor]()
    for each, mask in zip(states, real, strict=True):
        for rows, _ in each.batches:
            x, kept = each[rows].to(device).float().flatten(2), mask[rows].to(device)[..., None]
            moments = (moments or Moments.zero(x.shape[-1], device)).add(x[kept[..., 0]])
            low.append(x.masked_fill(~kept, math.inf).amin(1))
            high.append(x.masked_fill(~kept, -math.inf).amax(1))
    assert moments is not None, "there are rows"
    basis, centre = principal_components(moments.covariance), moments.mean
    projected, owner, start = list[Tensor](), list[Tensor](), 0
    for each, mask in zip(states, real, strict=True):
        for rows, _ in each.batches:
            kept = mask[rows].to(device)
            projected.append((each[rows].to(device).flatten(2)[kept].double() - centre) @ basis)
            owner.append(start + rows.start + kept.nonzero()[:, 0])
        start += len(each)
    return state_shift(torch.cat(projected), torch.cat(owner), torch.cat(low), torch.cat(high), dealt)


def _noted(name: str, shift: StateShift) -> dict[str, Any]:
    """A block's figures as JSON has them."""
    random = shift.kl[1:]
    kl = {"kl": shift.kl[0], "kl_dealt": random.mean(), "kl_dealt_95": random.quantile(0.95)}
    return {
        "block": name,
        "components": shift.components,
        **{name: float(value) if value.isfinite() else None for name, value in kl.items()},
        "kl_independent": shift.chance,
        "wasserstein": shift.wasserstein[0],
        "wasserstein_dealt": shift.wasserstein[1],
        "beyond_range": shift.beyond[0],
        "beyond_range_dealt": shift.beyond[1],
    }

"""Whether a tied embedding is worth two tables: what the residual rotation costs a model whose head is its embedding.

With the table E, the final norm's gain g and the rotation R, embedding and head become E R and E diag(g) R. They are
one table only where g is one number, so a rotation has to store both, or be left out: then the final norm keeps its
gain, and everything that is transformed within the blocks is transformed all the same.
"""

from __future__ import annotations

from calib import BadInput
from calib.blockwise.model import BlockwiseModel
from calib.quant.scheme import Scheme
from compressor.quantization.embedding.sizes import bytes_in_out

# Types whose loader in vLLM skips a stored head, or wants the two to be one, whatever the config says (its commandr.py,
# opt.py, gemma.py, gemma2.py and mpt.py): with two tables it would answer wrongly.
ONE_TABLE_SERVED = {"cohere", "cohere2", "opt", "gemma", "gemma2", "mpt"}
WORTH = 0.1  # of the output's bytes, that a second table may cost


def second_table(stream: BlockwiseModel, scheme: Scheme | None = None) -> int:
    """Bytes of the table that a rotation adds; 0 where embedding and head are two already, or would be in this scheme,
    which rounds the head."""
    if scheme is not None and scheme.head is not None:
        return 0
    return sum(stream.entry(first).bytes for first in stream.tied.values())


def is_worth_two_tables(scheme: Scheme, share: float, tied: str) -> bool:
    """Whether a rotation is worth a second table, `share` of the output, where nobody chooses between the two.

    A rotation spreads outliers of activations, and where those are rounded the model suffers without it. Weights have
    few, which clipping, GPTQ and tuning cope with: where they alone are rounded, the bytes of the second table, in 16
    bits, are better spent on more bits per weight.
    """
    if scheme.activations is not None:
        return True
    weights_alone = not scheme.has_own_keys  # FP8 holds outliers as well as all else
    return share <= WORTH and not (tied == "auto" and weights_alone)


def check_tied(stream: BlockwiseModel, obstacle: str | None, tied: str) -> None:
    """Raises BadInput where what is asked for cannot be; `obstacle`: why the model admits no rotation.

    To untie what is two tables asks for nothing more than the rotation that comes with it. To keep two tables one is a
    mistake about the model.
    """
    if tied == "keep" and not second_table(stream):
        raise BadInput("tied keep: embedding and head are not one table in this model; leave it out")
    if tied == "untie" and obstacle:
        raise BadInput(f"tied untie: the residual stream is not rotated, as {obstacle}; leave it out")


def rotation_left_out(
    stream: BlockwiseModel, obstacle: str | None, scheme: Scheme, stored: Scheme | None, tied: str
) -> str | None:
    """Why there is no residual rotation, or None where there is one.

    `obstacle`: why the model admits none. `stored` is the scheme that the output's bytes are counted by, None where
    nothing is rounded. `tied`: what becomes of a tied embedding, as `Quantize` has it.
    """
    if obstacle:
        return obstacle
    more = second_table(stream, scheme)
    if not more or tied == "untie":
        return None
    if stream.config.model_type in ONE_TABLE_SERVED:
        return "vLLM knows one table alone for embedding and head of such models; --tied untie rotates all the same"
    share = more / bytes_in_out(stream, stored, untied=False)
    size = f"{more / 1e6:,.1f} MB" if more >= 1e5 else f"{more:,} bytes"
    hint = f"embedding and head are one table, and storing it twice would add {size} ({share:.0%} of the output)"
    if tied == "keep":
        return hint
    return None if is_worth_two_tables(scheme, share, tied) else f"{hint}; --tied untie rotates all the same"

"""Whether a tied embedding is worth two tables: what the residual rotation costs a model whose head is its embedding.

With the table E, the final norm's gain g and the rotation R, embedding and head become E R and E diag(g) R. They are
one table only where g is one number, so a rotation has to store both. In models with many tokens and few blocks that
is more than quantizing saves, and the rotation is left out, unless activations are quantized too: those need it.
"""

from __future__ import annotations

from calib import BadInput
from calib.blockwise.model import BlockwiseModel
from calib.quant.scheme import Scheme
from compressor.quantization.write import ONE_TABLE_SERVED, bytes_in_out

WORTH = 0.1  # of the output's bytes, that a second table may cost


def second_table(stream: BlockwiseModel) -> int:
    """Bytes of the table that a rotation adds; 0 where embedding and head are two already."""
    return sum(stream.entry(first).bytes for first in stream.tied.values())


def check_untie(stream: BlockwiseModel, obstacle: str | None, untie: bool | None) -> None:
    """Raises BadInput where what is asked for cannot be; `obstacle`: why the model admits no rotation."""
    if untie is None:
        return
    option = "--untie" if untie else "--no-untie"
    if not untie and not second_table(stream):
        raise BadInput(f"{option}: embedding and head are two tables already; leave it out")
    if obstacle:
        raise BadInput(f"{option}: the residual stream is not rotated, as {obstacle}; leave it out")


def rotation_left_out(
    stream: BlockwiseModel, obstacle: str | None, scheme: Scheme, stored: Scheme | None, untie: bool | None
) -> str | None:
    """Why there is no residual rotation, or None where there is one.

    `obstacle`: why the model admits none. `stored` is the scheme that the output's bytes are counted by, None where
    nothing is rounded. `untie`: whether a tied embedding may become two tables; None decides by what that costs.
    """
    if obstacle:
        return obstacle
    more = second_table(stream)
    if not more or untie:
        return None
    if stream.config.model_type in ONE_TABLE_SERVED:
        return "vLLM knows one table alone for embedding and head of such models; --untie rotates all the same"
    share = more / bytes_in_out(stream, stored, untied=False)
    size = f"{more / 1e6:,.1f} MB" if more >= 1e5 else f"{more:,} bytes"
    hint = f"embedding and head are one table, and storing it twice would add {size} ({share:.0%} of the output)"
    if untie is False:
        return hint
    return None if share <= WORTH or scheme.activations is not None else f"{hint}; --untie rotates all the same"

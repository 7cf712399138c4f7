"""Whether vLLM can run the Hadamard at the down projection of a model that is to be quantized."""

from __future__ import annotations

from calib import BadInput
from calib.blockwise.linears import Linear
from calib.blockwise.model import BlockwiseModel
from calib.model.task import WRITERS
from calib.probe.find import found_parts
from calib.quant.scheme import Scheme
from compressor.engine.load import only_here, vllm
from compressor.engine.runtime_transforms import downs
from compressor.storage.transform_config import WIDEST_HADAMARD, can_be_served

SERVED_NOTES = (
    "vLLM rotates as it runs, on one GPU, by the code of 0.33 and not tried; transformers drops such a rotation "
    "without a word, and is made to refuse the folder",
    "vLLM from before its PR 22486 (2025) and SGLang 0.5.10 drop the rotation without a word and answer wrongly: do "
    "not serve the folder there",
)


def check_served(stream: BlockwiseModel, scheme: Scheme) -> None:
    """Raises BadInput where vLLM's rules take no such scheme, or its Hadamard no such linears."""
    linears = [one for i in range(stream.layers) for one in stream.linears(i)]
    reason = only_here(stream)
    if stream.task not in WRITERS:
        reason = "it serves models that write text"
    elif any(one.step for one in linears):
        reason = "it has no quantized activations in a mixture of experts"
    if reason is not None:
        raise BadInput(f"serve vllm: {reason}; leave it out")
    if scheme.tables:
        raise BadInput("serve vllm: goes with embedding and head in 16 bits alone; leave out --embedding and --lm-head")
    if vllm(scheme) is None:
        raise BadInput(f"serve vllm: no scheme of vLLM's fits {scheme.name}; take symmetric activations of 4 or 8 "
                       "bits, such as w4a4 or w4a8")  # fmt: skip
    rotated = served_linears(stream)
    if not rotated:
        raise BadInput("serve vllm: no linear of the model reads what its feed-forward made; leave it out")
    for one in rotated:
        if one.name in scheme.ignored:
            raise BadInput(f"serve vllm: vLLM would rotate '{one.name}' as well, which --ignore leaves as it is; leave "
                           "one of them out")  # fmt: skip
        if not can_be_served(one.shape[1]):
            raise BadInput(f"serve vllm: '{one.name}' has {one.shape[1]:,} inputs, and vLLM's Hadamard matrices have "
                           f"powers of two up to {WIDEST_HADAMARD:,}; take --no-online in its place")  # fmt: skip
        if f"{one.name}.bias" in stream.expected:
            raise BadInput(f"serve vllm: '{one.name}' has a bias, which vLLM refuses in linears that it rotates; "
                           "take --no-online in its place")  # fmt: skip


def served_linears(stream: BlockwiseModel) -> list[Linear]:
    """The linears, ignored ones included, whose inputs a Hadamard at run time is for."""
    whole, parts = stream.without(()), found_parts(stream)
    linears = [(whole.linears(i), downs(parts.blocks[i], whole.linears(i))) for i in range(whole.layers)]
    return [one for every, names in linears for one in every if one.name in names]

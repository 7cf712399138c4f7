"""What tensors of a checkpoint are called in GGUF."""

from __future__ import annotations

from importlib.util import find_spec

from calib import BadInput
from calib.blockwise.model import BlockwiseModel
from compressor.storage.gguf_architectures import GGUF_ARCHITECTURES, StoredTensor, architecture_of, tensors_of

NAMED_HERE = "experts lie in one tensor on disk, which is not cut up here"


def gguf_tensors(stream: BlockwiseModel) -> list[StoredTensor]:
    """List what a GGUF file holds of a model of an architecture that is written there.  Raises BadInput where llama.cpp
    has no place for a tensor."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = GGUF_ARCHITECTURES[stream.config.model_type].name
    number = next(a for a, name in MODEL_ARCH_NAMES.items() if name == arch)
    names = get_tensor_name_map(number, stream.layers)
    return tensors_of(stream.config, stream.expected, lambda name: names.get_name(name, (".weight", ".bias")))


def tensors_for(option: str, stream: BlockwiseModel, instead: str) -> list[StoredTensor]:
    """List what a GGUF file would hold of a model, for an option that goes by the names there.

    Raises:
        BadInput: llama.cpp does not run the model, which `option` needs; `instead` says what to do.
    """
    if find_spec("gguf") is None:
        raise BadInput(f"{option}: goes by names in GGUF, and gguf is not installed; pip install 'parewell[gguf]'")
    reason = NAMED_HERE if any(one.named_here for i in range(stream.layers) for one in stream.linears(i)) else ""
    try:
        architecture_of(stream.config)
        found = gguf_tensors(stream)
    except BadInput as error:  # which is told of an export
        reason = str(error).removeprefix("to gguf: ").rpartition(";")[0]
    if reason:
        raise BadInput(f"{option}: goes by names in GGUF, and {reason}; {instead}")
    return found

"""Which tensor of a model gets which block type in llama.cpp's mixtures, such as Q4_K_M."""

from __future__ import annotations

from calib.blockwise.model import BlockwiseModel
from calib.quant.mixtures import MixedModel, type_in_mixture
from compressor.quantization.options import AUTO_TABLE, NO_TABLE
from compressor.storage.gguf_architectures import GGUF_ARCHITECTURES, header_of
from compressor.storage.gguf_names import tensors_for


def mixed_model(stream: BlockwiseModel, *, own_head: bool) -> MixedModel:
    """Describe a model to the rule of mixtures; `own_head`: whether the head will be a table of its own."""
    header, arch = header_of(stream.config), GGUF_ARCHITECTURES[stream.config.model_type].name
    shared = header["attention.head_count"] != header["attention.head_count_kv"]
    is_70b = stream.layers == 80 and (arch == "qwen2" or (arch == "llama" and shared))
    return MixedModel(stream.layers, int(header.get("expert_count", 0)), own_head, is_70b)


def types_in_mixture(
    mixture: str | None, stream: BlockwiseModel, embedding: str, lm_head: str, *, untied: bool
) -> tuple[dict[str, str], str, str]:
    """Block types of all linears in one of llama.cpp's mixtures, by name on disk, whatever rows they have; and those of
    embedding and head, as asked for or as llama.cpp has them.

    Args:
        mixture: a key of `calib.quant.mixtures.MIXTURES`; None: all is as it is asked for.
        stream: the model.
        embedding: what is asked for: a type, "none" or "auto".
        lm_head: likewise.
        untied: whether a table that is embedding and head will be two for a rotation.

    Raises:
        BadInput: llama.cpp does not run the model, so that there is no such mixture of it.
    """
    if mixture is None:
        return {}, embedding, lm_head
    tensors = tensors_for(f"scheme {mixture}", stream, "take q4_k, or whole numbers such as w4a16-g64")
    names = {source: one.name for one in tensors for source in one.sources}
    own_head = not stream.tied or untied or lm_head not in (AUTO_TABLE, NO_TABLE)
    model = mixed_model(stream, own_head=own_head)
    kinds = {
        one.name: type_in_mixture(mixture, names[f"{one.name}.weight"], model)
        for i in range(stream.layers) for one in stream.linears(i)
    }  # fmt: skip
    if embedding == AUTO_TABLE:
        embedding = type_in_mixture(mixture, "token_embd.weight", model)
    if lm_head == AUTO_TABLE:
        lm_head = type_in_mixture(mixture, "output.weight", model) if own_head else NO_TABLE
    return kinds, embedding, lm_head

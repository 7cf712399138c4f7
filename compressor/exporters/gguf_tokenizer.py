"""A tokenizer as GGUF keeps it, from tokenizer.json: byte-pair encodings over bytes ("gpt2") or with bytes to fall back
on ("llama", as sentencepiece makes them)."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from calib import BadInput
from calib.model.checkpoint import read_tokenizer
from compressor.exporters.gguf_pre_tokenizers import name_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
LEFT_OUT = "the tokenizer is of a kind that is not written here: give the runtime token ids"
NO_SCORE = -1e6  # of a token that no merge makes
# Added tokens that are control tokens whatever the file says, by their looks.
CONTROL_LOOKS = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)


def add_tokenizer(writer: Any, folder: Path, vocab: int) -> list[str]:
    """Write the tokenizer of a directory, and its chat templates.

    Args:
        writer: a gguf.GGUFWriter.
        vocab: rows of the embedding; those that the tokenizer does not know become unused tokens.

    Returns:
        What the user is to know.

    Raises:
        BadInput: the tokenizer is larger than the embedding, or cuts up text in a way that llama.cpp has no name for.
    """
    from gguf import SpecialVocab

    tokenizer = read_tokenizer(folder)
    content = _content(tokenizer)
    kind = _kind(content)
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # it warns of templates that it reads in part
    special = SpecialVocab(folder, load_merges=kind == "gpt2", n_vocab=vocab)
    if tokenizer is None or kind is None:
        writer.add_tokenizer_model("no_vocab")
        if special.chat_template:
            writer.add_chat_template(special.chat_template)
        return [LEFT_OUT]
    beyond = [token["content"] for token in content.get("added_tokens", []) if token["id"] >= vocab]
    tokens, types, scores = token_columns(content, kind, vocab)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(name_of(tokenizer, content) if kind == "gpt2" else "default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "llama":
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(_prefixed(content))
    ids = tokenizer("a")["input_ids"]
    special.add_special_token = {
        "bos": bool(ids) and ids[0] == tokenizer.bos_token_id, "eos": bool(ids) and ids[-1] == tokenizer.eos_token_id
    }  # fmt: skip
    special.add_to_gguf(writer, quiet=True)
    return [f"added tokens that the embedding has no row for are left out: {' '.join(beyond)}"] if beyond else []


def _content(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """What tokenizer.json says, or would say where the tokenizer came in other files."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {} if backend is None else json.loads(backend.to_str())


def _kind(content: dict[str, Any]) -> str | None:
    """The runtime's `tokenizer.ggml.model`, or None where it has none that fits."""
    model = content.get("model", {})
    if model.get("type") != "BPE":
        return None
    if model.get("byte_fallback"):
        return "llama"
    steps = content.get("pre_tokenizer") or {}
    kinds = [part.get("type") for part in steps.get("pretokenizers", [steps])]
    return "gpt2" if kinds[-1:] == ["ByteLevel"] else None


def _prefixed(content: dict[str, Any]) -> bool:
    """Whether a space is put before a text's first word."""
    if "Prepend" in str(content.get("normalizer")):
        return True
    steps = content.get("pre_tokenizer") or {}
    schemes = [
        part.get("prepend_scheme") for part in steps.get("pretokenizers", [steps]) if part.get("type") == "Metaspace"
    ]
    return any(scheme in ("always", "first") for scheme in schemes)


def token_columns(content: dict[str, Any], kind: str, vocab: int) -> tuple[list[str], list[int], list[float]]:
    """Text, type and score of each of `vocab` tokens.

    The runtime joins the pair whose result scores best, which is the earliest merge. Ids that the tokenizer leaves out
    become unused tokens. Spaces of added tokens are written as such. Tokens that were added beyond the embedding's rows
    are left out, as the model cannot read them.

    Raises:
        BadInput: the vocabulary itself is larger than the embedding.
    """
    model = content["model"]
    added = {token["id"]: token for token in content.get("added_tokens", []) if token["id"] < vocab}
    known = {i: token for token, i in model["vocab"].items()}
    extra = {token["id"] for token in content.get("added_tokens", [])}
    if (last := max(known.keys() - extra, default=0)) >= vocab:
        raise BadInput(f"tokenizer.json: has {last + 1} tokens, and the embedding {vocab} rows; GGUF wants a row for "
                       "each token: export to safetensors")  # fmt: skip
    names = known | {i: token["content"] for i, token in added.items()}
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    rank = {a + b: -float(i) for i, (a, b) in reversed(list(enumerate(merges)))}

    def type_of(i: int) -> int:
        if i not in names:
            return UNUSED
        if i in added:
            if kind == "llama" and names[i] == model.get("unk_token"):
                return UNKNOWN
            return CONTROL if added[i]["special"] or CONTROL_LOOKS.fullmatch(names[i]) else USER_DEFINED
        return BYTE if kind == "llama" and _is_byte(names[i]) else NORMAL

    types = [type_of(i) for i in range(vocab)]
    tokens = [names.get(i, f"[PAD{i}]") for i in range(vocab)]
    tokens = [t.replace("▁", " ") if of == USER_DEFINED else t for t, of in zip(tokens, types, strict=True)]
    return tokens, types, [rank.get(names.get(i, ""), NO_SCORE) for i in range(vocab)]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")

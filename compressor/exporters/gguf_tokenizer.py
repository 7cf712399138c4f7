"""A tokenizer as GGUF keeps it, from tokenizer.json: byte-pair encodings over bytes ("gpt2") or with bytes to fall back
on ("llama")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calib.model.checkpoint import read_tokenizer
from calib.model.config import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
LEFT_OUT = "the tokenizer is of a kind that is not written here: give the runtime token ids"


def add_tokenizer(writer: Any, folder: Path, vocab: int) -> list[str]:
    """-> what to mind.  `writer` is a gguf.GGUFWriter."""
    tokenizer, file = read_tokenizer(folder), folder / "tokenizer.json"
    content = read_json(file) if file.is_file() else {}
    model = content.get("model", {})
    options = _how(content) if model.get("type") == "BPE" else None
    if template := _chat_template(tokenizer, folder):
        writer.add_chat_template(template)
    if tokenizer is None or options is None:
        writer.add_tokenizer_model("no_vocab")
        return [LEFT_OUT]
    kind, split = options
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    names = {i: token for token, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]

    def type_of(i: int) -> int:
        if i not in names:
            return UNUSED
        if i in added:
            unknown = names[i] == model.get("unk_token")
            return UNKNOWN if unknown and kind == "llama" else CONTROL if added[i]["special"] else USER_DEFINED
        return BYTE if kind == "llama" and _is_byte(names[i]) else NORMAL

    writer.add_tokenizer_model(kind)
    writer.add_token_list([names.get(i, f"[unused{i}]") for i in range(vocab)])
    writer.add_token_types([type_of(i) for i in range(vocab)])
    if kind == "llama":
        # The runtime joins the pair whose result has the best score: the earliest merge.
        rank = {a + b: -float(i) for i, (a, b) in reversed(list(enumerate(merges)))}
        writer.add_token_scores([rank.get(names.get(i, ""), -1e6) for i in range(vocab)])
        writer.add_add_space_prefix("Prepend" in str(content.get("normalizer")))
    else:
        writer.add_tokenizer_pre(split)
        writer.add_token_merges([f"{a} {b}" for a, b in merges])
    for special, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
    ):
        if special is not None:
            add(special)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    return []


def _chat_template(tokenizer: Any, folder: Path) -> str | list[dict[str, str]] | None:
    """As `GGUFWriter.add_chat_template` takes it: one template, or several by name; a processor's where the tokenizer
    has none."""
    found = getattr(tokenizer, "chat_template", None)
    if not found and (folder / "chat_template.json").is_file():
        found = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, dict):
        return [{"name": str(name), "template": str(template)} for name, template in found.items()]
    return found if isinstance(found, str) else None


def _how(content: dict[str, Any]) -> tuple[str, str] | None:
    """(kind, the runtime's name for how text is cut up beforehand), or None where it has none."""
    if content["model"].get("byte_fallback"):
        return ("llama", "default")
    steps = content.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers", [steps])
    kinds = [part.get("type") for part in parts]
    if not kinds or kinds[-1] != "ByteLevel":
        return None
    if kinds == ["ByteLevel"]:
        return ("gpt2", "gpt-2")
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return ("gpt2", "smollm")
    if kinds == ["Split", "ByteLevel"]:
        pattern = str(parts[0].get("pattern", {}).get("Regex"))
        return ("gpt2", "llama-bpe" if "{1,3}" in pattern else "qwen2")
    return None


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")

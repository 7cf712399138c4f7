"""What lies in a model folder beside config and weights and belongs to the model: tokenizer files of any name, chat
templates, processor and generation configs, sentence-transformers' modules, licences and notices.

Files are known by their names, not by a list of all that there may be: what matches no pattern is left where it is, so
that a job never passes on code, pickles, what is left of a training, or another tool's quantization files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from calib.report.model_card import is_own_card

CARD, BASE_CARD = "README.md", "README.base.md"  # a folder's model card, and that of the model that it was made from

TOKENIZER = (
    "tokenizer*", "*_tokenizer*.json", "*.tokenizer", "*.model", "*.tiktoken", "*.spm", "*.bpe", "*.codes",
    "*vocab*.json", "*vocab*.txt", "*vocab*.tsv", "*merges*.txt", "dict.txt", "tekken.json", "added_tokens*.json",
    "special_tokens_map*.json", "normalizer.json", "emoji.json", "byte_maps.json", "word_shape.json",
    "word_pronunciation.json",
)  # fmt: skip
CONFIG_FILES = (
    "chat_template*.json", "*.jinja", "generation_config*.json", "*processor*.json", "*image_processor*.json",
    "feature_extractor*.json", "modules.json", "sentence_*_config.json", "config_sentence_transformers.json",
)  # fmt: skip
NOTICES = (
    "*license*", "*licence*", "notice*", "*_notice*", "copying*", "copyright*", "patents*", "authors*", "attribution*",
    "*use_policy*", "*usage_policy*", "*acceptable_use*", "*terms_of_use*", "*terms-of-use*", "terms*",
)  # fmt: skip
_MODULE = re.compile(r"\d+_\w+")  # sentence-transformers: 1_Pooling, 2_Dense, ...
FOLDERS = {  # of one level below the model, and what is taken of each
    "additional_chat_templates": ("*.jinja",),
    "licenses": ("*",),
    "licences": ("*",),
}
MODULE_FILES = ("config.json", "model.safetensors")  # a module's own weights are no part of the language model
_NEVER = {
    ".py", ".pyc", ".ipynb", ".sh", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".gguf", ".onnx",
    ".h5", ".msgpack", ".ot", ".npz", ".npy", ".npx", ".joblib", ".zip", ".gz", ".tar", ".exe", ".so", ".lock",
}  # fmt: skip
_NOT_OF_A_MODEL = ("*.index.json", "quantiz*.json", "*adapter_*", "trainer_*", "training_*")


def companions(folder: Path) -> list[Path]:
    """Paths relative to `folder` of the files that belong to its model, sorted; the one in a subfolder is one level
    down.  config.json, weights and their index are not among them."""
    found = [file for file in _files(folder) if is_companion(file)]
    return sorted(file for file in found if (folder / file).is_file())


def _files(folder: Path) -> Iterable[Path]:
    for entry in folder.iterdir():
        if entry.is_dir():
            if _patterns(entry.name):
                yield from (Path(entry.name, inner.name) for inner in entry.iterdir())
        else:
            yield Path(entry.name)


def is_companion(path: Path) -> bool:
    """Whether a file of this name, relative to the model's folder, belongs to the model beside config and weights."""
    name = path.name.lower()
    if len(path.parts) == 2:
        patterns = _patterns(path.parts[0])
        return _matches(name, patterns) and (patterns is MODULE_FILES or Path(name).suffix not in _NEVER)
    return (
        len(path.parts) == 1
        and Path(name).suffix not in _NEVER
        and not _matches(name, _NOT_OF_A_MODEL)
        and _matches(name, (*TOKENIZER, *CONFIG_FILES, *NOTICES))
    )


def is_companion_folder(path: Path) -> bool:
    """Whether everything in the folder `path`, one level below a model, belongs to the model."""
    return bool(_patterns(path.name)) and all(is_companion(Path(path.name, inner.name)) for inner in path.iterdir())


def is_notice(path: Path) -> bool:
    """Whether a companion is a licence, a notice, or lies among them."""
    return _matches(path.name.lower(), NOTICES) or path.parts[0].lower() in ("licenses", "licences")


def has_tokenizer(folder: Path) -> bool:
    """Whether there is any file of a tokenizer's beside its config."""
    return any(
        len(file.parts) == 1 and _matches(file.name.lower(), TOKENIZER) and file.name != "tokenizer_config.json"
        for file in companions(folder)
    )


def copy_companions(source: Path, folder: Path, *, keep_notices: bool = False) -> None:
    """Copy the companions of the model in `source` into `folder`, byte for byte; with `keep_notices` no licence or
    notice that is there already is replaced, and no model card is taken."""
    for file in companions(source):
        to = folder / file
        if keep_notices and is_notice(file) and to.exists():
            continue
        to.parent.mkdir(exist_ok=True)
        to.write_bytes((source / file).read_bytes())
    if not keep_notices:
        copy_card(source, folder)


def copy_card(source: Path, folder: Path) -> None:
    """Keep the model card of the model in `source` in `folder`, which gets one of its own, as README.base.md.

    Of an output of parewell's, whose card says what its recipe says, the card that it keeps itself is taken.
    """
    card, kept = source / CARD, source / BASE_CARD
    if not card.is_file() or is_own_card(card.read_text(encoding="utf-8", errors="replace")):
        card = kept
    if card.is_file():
        (folder / BASE_CARD).write_bytes(card.read_bytes())


def hub_patterns() -> list[str]:
    """Patterns for `huggingface_hub.snapshot_download(allow_patterns=...)`, which mind case: every companion file,
    config and safetensors."""
    names = (*TOKENIZER, *CONFIG_FILES, *NOTICES, *(f"{folder}/*" for folder in FOLDERS))
    cased = {case(name) for name in names for case in (str, str.upper, str.capitalize, str.title)}
    return sorted({"*.safetensors", "*.json", "*.txt", "*.jinja", CARD} | cased)


def _patterns(folder: str) -> tuple[str, ...]:
    return MODULE_FILES if _MODULE.fullmatch(folder) else FOLDERS.get(folder.lower(), ())


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)

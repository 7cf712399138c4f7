"""Rows of images and text, as a processor of the library makes them, for models that see images and write text.

A row has `messages` whose contents name images (`{"type": "image", "path": "a.png"}`, or parts without a path and
`images`, a list of paths beside them, as TRL has it), or a prompt and an answer with `image` or `images`. Images are
files on this machine, named from the file of rows; nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib import BadInput, first_line
from calib.data.corpus import Corpus
from calib.data.prompts import PAIRS
from calib.data.records import Row, is_prose, kind_of, read_rows, take_drawn

IMAGE_FIELDS = ("image", "images")
Encode = Callable[[list[dict[str, Any]], str], dict[str, Tensor]]


def has_images(path: Path) -> bool:
    """Tell whether any row of a file has images.  Raises BadInput where it cannot be read."""
    if kind_of(path) == ".safetensors" or is_prose(path):
        return False
    return any(_named(row.fields) or any(map(_is_image, _parts(row.fields))) for row in read_rows(path))


def load_image_rows(
    path: Path, encode: Encode, image_token: int, *, length: int, rows: int | None = None, seed: int | None = None
) -> Corpus:
    """Read rows with images.

    Args:
        path: a file of rows.
        encode: makes of a conversation, and of where it stands, what the model's forward takes; see `encoder_in`.
        image_token: the id that stands for a piece of an image.
        length: tokens of a row at most; longer ones are left out, as an image cannot be cut.
        rows: how many are read; None: all.
        seed: draws them over the whole file; None: they are the first.

    Returns:
        Rows padded on the right, with what the model is given of images beside each.

    Raises:
        BadInput: a row is not understood, an image is missing or no image, or no row is short enough.
    """
    made, long = list[dict[str, Tensor]](), 0
    found: Iterable[Row] = read_rows(path)
    if rows is not None and seed is not None:  # with some in reserve for those that are too long
        found = take_drawn(found, lambda count, _: count >= 2 * rows, seed)[0]
    for row in found:
        where = f"{path}, {row.place}"
        coded = encode(_conversation(row, path.parent, where), where)
        if coded["input_ids"].shape[1] > length:
            long += 1
            continue
        made.append(coded)
        if rows is not None and len(made) >= rows:
            break
    if not made:
        raise BadInput(f"{path}: none of its {long} rows is of at most {length} tokens; ask for longer ones (--length)")
    width = max(one["input_ids"].shape[1] for one in made)

    def wide(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))

    ids = torch.cat([wide(one["input_ids"]) for one in made])
    mask = torch.cat([wide(torch.ones_like(one["input_ids"])) for one in made]).bool()
    beside = tuple(
        {name: wide(value) if value.shape == one["input_ids"].shape else value for name, value in one.items()
         if name not in ("input_ids", "attention_mask")}
        for one in made
    )  # fmt: skip
    about = {"images": True} | ({"left_out_rows": long} if long else {})
    return Corpus(ids, mask, str(path), about=about, pictured=ids == image_token, beside=beside)


def opened_processor(kind: str, folder: Path) -> Any | None:
    """Open the processor of a checkpoint by a class of the library's, AutoProcessor or AutoImageProcessor; None where
    the folder has none.  Raises BadInput where it cannot be opened, or a library of images is missing."""
    if not any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        return None
    import transformers  # whose processors look for libraries of images

    try:
        import PIL  # noqa: F401  # not everyone has it

        return getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
    except ImportError as error:
        raise BadInput(
            f"{folder}: its processor needs what is not installed ({first_line(error)}); pip install 'parewell[images]'"
        ) from error
    except Exception as error:  # the library's own code, of any of its types
        raise BadInput(
            f"{folder}: its processor cannot be opened ({first_line(error)}); copy its files anew"
        ) from error


def encoder_in(folder: Path) -> Encode:
    """The processor of the model in `folder`, as `load_image_rows` takes it.

    Raises:
        BadInput: there is none, or what it needs is not installed.
    """
    processor = opened_processor("AutoProcessor", folder)
    if processor is None:
        raise BadInput(
            f"{folder}: has no processor, so rows with images cannot be read; copy preprocessor_config.json and "
            "processor_config.json into it, or give text alone"
        )

    def encode(messages: list[dict[str, Any]], where: str) -> dict[str, Tensor]:
        try:
            coded = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        except Exception as error:  # its template and its image library raise anything
            raise BadInput(f"{where}: the model's processor fails on it ({first_line(error)})") from error
        return {name: value for name, value in coded.items() if isinstance(value, Tensor)}

    return encode


def _conversation(row: Row, folder: Path, where: str) -> list[dict[str, Any]]:
    """Messages whose contents are lists of parts, images by their paths."""
    fields = row.fields
    images: Iterator[Path] = iter([_file(one, folder, where) for one in _named(fields)])
    given = fields.get("messages")
    if given is None:
        given = _asked(fields, where)
    if not isinstance(given, list) or not all(isinstance(one, Mapping) for one in given):
        raise BadInput(f"{where}: 'messages' must be a list of objects with 'role' and 'content'")
    messages = list[dict[str, Any]]()
    for message in given:
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
            raise BadInput(f"{where}: 'content' must be text, or a list of parts with a 'type'")
        messages.append(
            {"role": message.get("role"), "content": [_part(part, images, folder, where) for part in parts]}
        )
    if (left := next(images, None)) is not None:
        raise BadInput(f"{where}: no message has a place for {left.name}; add a part of type 'image'")
    return messages


def _asked(fields: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    pair = next((pair for pair in PAIRS if all(isinstance(fields.get(name), str) for name in pair)), None)
    if pair is None:
        raise BadInput(
            f"{where}: in a file with images, has neither 'messages' nor a prompt with its answer; add one of them"
        )
    shown: list[dict[str, Any]] = [{"type": "image"} for _ in _named(fields)]
    question, answer = fields[pair[0]], [{"type": "text", "text": fields[pair[1]]}]
    return [
        {"role": "user", "content": [*shown, {"type": "text", "text": question}]},
        {"role": "assistant", "content": answer},
    ]


def _part(part: Mapping[str, Any], images: Iterator[Path], folder: Path, where: str) -> dict[str, Any]:
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if not _is_image(part):
        raise BadInput(f"{where}: has a part of type {part.get('type')!r}; text and images are read here")
    own = next((part[name] for name in ("path", "image", "url") if part.get(name)), None)
    file = next(images, None) if own is None else _file(own, folder, where)
    if file is None:
        raise BadInput(f"{where}: names no file for an image; add 'path' to it, or 'images' to the row")
    return {"type": "image", "path": str(file)}


def _file(given: Any, folder: Path, where: str) -> Path:
    """An image on this machine."""
    if not isinstance(given, str) or "://" in given:
        raise BadInput(f"{where}: images are named by the path of a file here, not {str(given)[:40]!r}")
    file = folder / given
    if not file.is_file():
        raise BadInput(f"{where}: there is no image {file}; mend the path")
    return file


def _named(fields: Mapping[str, Any]) -> Sequence[Any]:
    found = next((fields[name] for name in IMAGE_FIELDS if fields.get(name)), ())
    return found if isinstance(found, list) else [found] if found else ()


def _parts(fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for message in fields.get("messages") or ():
        content = message.get("content") if isinstance(message, Mapping) else None
        yield from (part for part in content if isinstance(part, Mapping)) if isinstance(content, list) else ()


def _is_image(part: Mapping[str, Any]) -> bool:
    return part.get("type") in ("image", "image_url")

"""Uploading an output to the hub, in one commit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from calib import BadInput, Failed, first_line
from calib.jobs.output_folder import is_ours
from calib.model.companions import CARD
from calib.report.model_card import with_repository

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf", ".onnx")


def files_to_push(folder: Path) -> tuple[list[Path], list[Path]]:
    """List what an output would be published as.

    Args:
        folder: an output of parewell.

    Returns:
        The files that parewell writes and the model card, also one that was edited; and what else lies there. Both
        relative to `folder`, sorted.
    """
    ours, others = list[Path](), list[Path]()
    for entry in sorted(folder.iterdir()):
        inside = sorted(entry.rglob("*")) if entry.is_dir() else [entry]
        found = ours if entry.name == CARD or is_ours(entry) else others
        found += [file.relative_to(folder) for file in inside if not file.is_dir()]
    return ours, others


def check_repository(name: str) -> None:
    """Raises BadInput for what cannot be the name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise BadInput(f"{name}: cannot be a repository's name; give one such as OWNER/NAME") from error


def push_folder(folder: Path, files: Sequence[Path], repository: str, *, private: bool) -> str:
    """Upload files of an output to a model repository, in one commit.

    The repository is made where there is none. Its weights that are not among `files` go, so that it holds one model.

    Args:
        folder: the output.
        files: what of it is uploaded, relative to `folder`.
        repository: NAME or OWNER/NAME.
        private: whether only its owner may see the repository.

    Returns:
        The address of the commit.

    Raises:
        BadInput: no token, or a repository that others see where `private`, or the reverse.
        Failed: the hub cannot be reached, or refuses; nothing was committed.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        raise BadInput(f"{repository}: there is no token to write with; log in with hf auth login, or set HF_TOKEN")
    api = HfApi()
    with _one_line(repository):
        name, stale = _made_or_found(api, repository, {file.as_posix() for file in files}, private=private)
        operations = [
            CommitOperationAdd(file.as_posix(), _card(folder / file, name) if file == Path(CARD) else (folder / file))
            for file in files
        ]
        gone = [CommitOperationDelete(path) for path in stale]
        done = api.create_commit(
            name, operations=[*operations, *gone], commit_message="Upload with parewell", repo_type="model"
        )
    return str(done.commit_url)


def _card(file: Path, repository: str) -> bytes:
    return with_repository(file.read_text(encoding="utf-8", errors="replace"), repository).encode()


def _made_or_found(api: HfApi, repository: str, files: Iterable[str], *, private: bool) -> tuple[str, list[str]]:
    """-> the repository's full name, and files of weights in it that this commit does not bring."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return api.create_repo(repository, private=private, repo_type="model").repo_id, []
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code != 409:
            raise
    name = repository if "/" in repository else f"{api.whoami()['name']}/{repository}"
    found = api.model_info(name)
    if bool(found.private) != private:
        is_now, option = ("private", "--private") if found.private else ("public", "--public")
        raise BadInput(f"{name}: is there already, and {is_now}; add {option} to push to it, or give another name")
    there = [sibling.rfilename for sibling in found.siblings or []]
    return name, [path for path in there if path.endswith(_WEIGHTS) and path not in set(files)]


@contextmanager
def _one_line(repository: str) -> Iterator[None]:
    """What the hub or the way to it raises, in one line."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except BadInput:
        raise
    except HfHubHTTPError as error:
        status = None if error.response is None else error.response.status_code
        if status == 401:
            raise BadInput(f"{repository}: the hub does not take this token; log in anew with hf auth login") from error
        if status == 403:
            raise BadInput(f"{repository}: this token may not write there; take one with write access") from error
        raise Failed(f"{repository}: the hub refused ({first_line(error)}); nothing was committed") from error
    except ValueError as error:  # of a card that was edited
        raise BadInput(f"{CARD}: the hub refuses it ({' '.join(str(error).split())}); mend its metadata") from error
    except Exception as error:
        # Of the HTTP client, whose name depends on the version of huggingface_hub, and of sockets.
        if not isinstance(error, OSError) and not type(error).__module__.startswith("http"):
            raise
        raise Failed(f"{repository}: the hub cannot be reached ({first_line(error)}); nothing was committed") from error

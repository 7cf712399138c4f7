"""Uploading to the hub: by the hub's own client, over HTTP, to a server that stands in for it."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard, constants

from calib import BadInput, Failed
from calib.report.model_card import is_own_card
from cli.main import parewell
from compressor import Quantize, quantize

SMALL = Quantize(scheme="w4a16-channel", samples=2, held_out=2, length=32, learn=False, precision="float32")


class Hub:
    """What a stand-in for the hub knows and has received.  A repository is there already where `private` says so."""

    def __init__(self) -> None:
        self.private: bool | None = None
        self.there = ["README.md", "picture.png", "model-00001-of-00002.safetensors"]
        self.refuses: dict[str, int] = {}  # path -> status
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.deleted: list[str] = []
        self.commits, self.card_errors = 0, list[dict[str, str]]()

    @property
    def made_private(self) -> bool:
        """Of the repository that was asked for; its spelling depends on the client's version."""
        return self.created[0].get("visibility") == "private" or bool(self.created[0].get("private"))

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        for part, status in self.refuses.items():
            if part in path:
                return status, {"error": "refused"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user"}
        if path == "/api/validate-yaml":
            ModelCard(json.loads(body)["content"])
            return 400 if self.card_errors else 200, {"errors": self.card_errors, "warnings": []}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return (
                (200, {"url": "https://huggingface.co/me/made"})
                if self.private is None
                else (409, {"error": "is there"})
            )
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if "/commit/" in path:
            self.commits += 1
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    self.deleted.append(line["value"]["path"])
            return 200, {"commitUrl": "https://huggingface.co/me/made/commit/1", "commitOid": "1"}
        assert method == "GET" and path.startswith("/api/models/me/made"), path
        return 200, {"id": "me/made", "private": self.private, "siblings": [{"rfilename": n} for n in self.there]}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            assert self.headers["authorization"] == "Bearer hf_words"
            length = int(self.headers.get("content-length") or 0)
            chunked = self.headers.get("transfer-encoding") == "chunked"
            body = _chunks(self.rfile) if chunked else self.rfile.read(length)
            status, answer = found.answer(self.command, self.path.partition("?")[0], body)
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = _any

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_words")
        yield found
        server.shutdown()


def _chunks(stream: Any) -> bytes:
    """The body of a request that was sent in chunks."""
    whole = b""
    while size := int(stream.readline() or b"0", 16):
        whole += stream.read(size)
        stream.readline()
    return whole


@pytest.fixture(scope="module")
def out(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("made") / "out"
    quantize(tiny_folder, made, SMALL, allow_damage=True)
    return made


@pytest.fixture
def copy(out: Path, tmp_path: Path) -> Path:
    return shutil.copytree(out, tmp_path / "copy")


def push(*words: object) -> Result:
    result = CliRunner().invoke(parewell, ["push", *map(str, words)], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result


def test_the_whole_folder_goes_in_one_commit(out: Path, hub: Hub) -> None:
    printed = push(out, "me/made").output
    assert hub.commits == 1 and hub.made_private and "https://huggingface.co/me/made/commit/1" in printed
    assert hub.files.keys() == {file.name for file in out.iterdir()}
    assert {"model.safetensors", "report.json", "report.html", "parewell.json", "tokenizer.json"} <= hub.files.keys()
    for name, content in hub.files.items():
        assert name == "README.md" or content == (out / name).read_bytes()
    card = hub.files["README.md"].decode()
    assert 'from_pretrained("me/made")' in card and is_own_card(card) and ModelCard(card).data.tags
    assert "OUT" not in card


def test_a_dry_run_asks_no_hub_and_no_token(out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    found = json.loads(push(out, "me/made", "--dry-run", "--json").output)
    assert found["files"] == {file.name: file.stat().st_size for file in sorted(out.iterdir())}
    assert "url" not in found and hub.created == [] and hub.commits == 0
    assert "Nothing was uploaded" in push(out, "me/made", "--dry-run", "--public").output


def test_what_parewell_did_not_write_stays_here_and_an_edited_card_goes(copy: Path, hub: Hub) -> None:
    (copy / "passwords.txt").write_text("secret")
    (copy / "README.md").write_text("---\nlicense: mit\n---\n# My own\n")
    assert "Left out, as parewell did not write them: passwords.txt" in push(copy, "me/made", "--public").output
    assert "passwords.txt" not in hub.files and hub.files["README.md"] == (copy / "README.md").read_bytes()
    assert not hub.made_private


def test_a_repository_that_is_there(out: Path, hub: Hub) -> None:
    """Shards of another model go; who sees it is not changed, nor taken for what was asked for."""
    hub.private = False
    with pytest.raises(BadInput, match="is there already, and public; add --public"):
        push(out, "made")
    assert hub.commits == 0
    push(out, "made", "--public")
    assert hub.commits == 1 and hub.deleted == ["model-00001-of-00002.safetensors"]


def test_no_token(out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(BadInput, match="log in with hf auth login, or set HF_TOKEN"):
        push(out, "me/made")
    assert hub.created == []


@pytest.mark.parametrize(
    ("path", "status", "kind", "words"),
    [
        ("create", 401, BadInput, "does not take this token"),
        ("create", 403, BadInput, "may not write there"),
        ("commit", 400, Failed, "nothing was committed"),
    ],
)
def test_refusals(out: Path, hub: Hub, path: str, status: int, kind: type[Exception], words: str) -> None:
    hub.refuses = {path: status}
    with pytest.raises(kind, match=words) as error:
        push(out, "me/made")
    assert "\n" not in str(error.value) and hub.commits == 0


def test_a_card_that_the_hub_refuses(out: Path, hub: Hub) -> None:
    hub.card_errors = [{"message": "license must be a string"}]
    with pytest.raises(BadInput, match="license must be a string") as error:
        push(out, "me/made")
    assert "\n" not in str(error.value) and hub.commits == 0


def test_no_network(out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(Failed, match="cannot be reached") as error:
            push(out, "me/made")
    assert "\n" not in str(error.value)


def test_only_whole_outputs_that_passed_their_proof(copy: Path, tiny_folder: Path, hub: Hub) -> None:
    with pytest.raises(BadInput, match=r"has no parewell\.json"):
        push(tiny_folder, "me/made")
    with pytest.raises(BadInput, match="cannot be a repository's name"):
        push(copy, "me/made/it")
    report = json.loads((copy / "report.json").read_text())
    for found, option in (
        ({"damage": {"found": "much worse", "allowed": True}}, "--allow-damage"),
        ({"recovery": {"worst": 0.4, "threshold": None, "unlearnings": []}}, "--allow-recovery"),
    ):
        (copy / "report.json").write_text(json.dumps({**report, **found}))
        with pytest.raises(BadInput, match=option):
            push(copy, "me/made")
        push(copy, "me/made", option, "--dry-run")
    (copy / "report.json").write_text(json.dumps(report))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(BadInput, match="not a complete safetensors file"):
        push(copy, "me/made")
    weights.unlink()
    with pytest.raises(BadInput, match="incomplete"):
        push(copy, "me/made")
    assert hub.created == []

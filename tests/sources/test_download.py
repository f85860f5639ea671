"""Resuming and verifying, against a server on this machine that can be told to hang up."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from neuroada.errors import UserError
from neuroada.sources.download import Fingerprint, checksum, download, mismatch

CONTENT = bytes(range(256)) * 1000
WHOLE = Fingerprint(len(CONTENT), f"sha256:{hashlib.sha256(CONTENT).hexdigest()}")
REMEDY = "pass --from DIR"


class Server(ThreadingHTTPServer):
    """Serves CONTENT; each answer ends after the next number in `cuts` (None: it is whole)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.ranges = True
        self.cuts: list[int] = []
        self.asked: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/file.json"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path != "/file.json":
            self.send_error(404)
            return
        asked = self.headers["Range"]
        self.server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        if start >= len(self.server.content):
            self.send_error(416)
            return
        rest = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.server.cuts.pop(0)] if self.server.cuts else rest)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "set" / "file.json"


def test_whole_at_once(server: Server, target: Path):
    download(server.url, target, WHOLE, REMEDY)
    assert target.read_bytes() == CONTENT
    assert [file.name for file in target.parent.iterdir()] == ["file.json"]


def test_a_cut_connection_is_taken_up_while_it_brings_bytes(server: Server, target: Path):
    server.cuts = [100_000, 70_000]
    download(server.url, target, WHOLE, REMEDY)
    assert target.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=170000-"]


def test_a_later_call_resumes(server: Server, target: Path):
    server.cuts = [100_000, 0]
    with pytest.raises(UserError, match=r"file\.json .*run again to resume, or pass --from DIR"):
        download(server.url, target, WHOLE, REMEDY)
    assert not target.exists()
    assert target.with_name("file.json.part").stat().st_size == 100_000

    server.asked.clear()
    download(server.url, target, WHOLE, REMEDY)
    assert server.asked == ["bytes=100000-"]
    assert target.read_bytes() == CONTENT


def test_a_server_without_ranges_starts_over(server: Server, target: Path):
    server.ranges = False
    target.parent.mkdir()
    target.with_name("file.json.part").write_bytes(CONTENT[:1000])
    download(server.url, target, WHOLE, REMEDY)
    assert target.read_bytes() == CONTENT


def test_a_whole_part_only_gets_its_name(server: Server, target: Path):
    target.parent.mkdir()
    target.with_name("file.json.part").write_bytes(CONTENT)
    download(server.url, target, WHOLE, REMEDY)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:-1] + b"x"], ids=["size", "checksum"])
def test_other_content_is_removed(server: Server, target: Path, content: bytes):
    server.content = content
    with pytest.raises(UserError, match=r"expected .*256.*, found .*removed: run again"):
        download(server.url, target, WHOLE, REMEDY)
    assert not target.parent.exists()  # which was made for it


def test_a_refusal_names_the_address(server: Server, target: Path):
    with pytest.raises(UserError, match=r"/nowhere \(HTTP Error 404: Not Found\): pass --from DIR"):
        download(server.url.replace("file.json", "nowhere"), target, WHOLE, REMEDY)


def test_nobody_answers(target: Path):
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/x .*refused.*--from DIR"):
        download("http://127.0.0.1:9/x", target, WHOLE, REMEDY)


def test_git_blob_is_what_git_calls_it(tmp_path: Path):
    file = tmp_path / "hello"
    file.write_bytes(b"hello\n")  # git hash-object
    assert checksum(file, "git-blob") == "git-blob:ce013625030ba8dba906f756967f9e9ca394464a"
    assert mismatch(file, Fingerprint(None, "git-blob:ce013625030ba8dba906f756967f9e9ca394464a")) is None
    assert mismatch(file, Fingerprint(7, "git-blob:00")) == "expected 7 bytes, found 6"

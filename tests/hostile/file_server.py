"""A slow server of one file, with ranges, on this machine: for a download that is killed."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CONTENT = bytes(range(256)) * 4000
PIECE, PAUSE = 20_000, 0.01  # half a second in all


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        asked = self.headers["Range"]
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        for at in range(start, len(CONTENT), PIECE):
            try:
                self.wfile.write(CONTENT[at : at + PIECE])
            except OSError:  # its reader was killed
                return
            time.sleep(PAUSE)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(*worlds: Path) -> Iterator[None]:
    """While the block runs, `neuroada fetch data AddSub` in a world gets CONTENT (commands.py)."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        checksum = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
        file = {"path": "file.json", "rows": 6, "size": len(CONTENT), "checksum": checksum}
        served = {"url": f"http://127.0.0.1:{server.server_port}", "sets": {"AddSub": {"files": {"test": file}}}}
        for world in worlds:
            (world / "served.json").write_text(json.dumps(served))
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            for world in worlds:
                (world / "served.json").unlink()

"""A web server for tests: serves a folder, and fails in the ways in which it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Site:
    """faults: what goes wrong with the next requests of a file, in turn: "error", "short", "stuck" or "altered"."""

    url: str
    faults: dict[str, list[str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)  # ends those that are stuck

    def count(self, name: str) -> int:
        return self.requests.count(name)


@contextmanager
def served(folder: Path) -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.partition("?")[0].lstrip("/")
            site.requests.append(name)
            faults = site.faults.get(name, [])
            fault = faults.pop(0) if faults else ""
            if not (folder / name).is_file():
                self.send_error(404)
            elif fault == "error":
                self.send_error(503)
            else:
                self.answer((folder / name).read_bytes(), fault)

        def answer(self, content: bytes, fault: str) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if fault == "altered":
                content = content[:-600] + b"?" + content[-599:]
            self.wfile.write(content[: len(content) // 2] if fault else content)
            if fault == "stuck":
                site.released.wait(30)
            elif fault == "altered":
                self.wfile.write(content[len(content) // 2 :])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site = Site(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.released.set()
        server.shutdown()
        server.server_close()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)

"""What the stand-ins of the hub have in common: a server of this machine, in a thread, that says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class HubServer(ThreadingHTTPServer):
    """At a port that is free."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def at_work(self) -> Iterator[None]:
        thread = Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.shutdown()
            self.server_close()
            thread.join()


class QuietHandler(BaseHTTPRequestHandler):
    """Without a line for every request."""

    def log_message(self, format: str, *args: object) -> None:
        pass

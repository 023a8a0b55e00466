"""An HTTP server that takes the webhook's requests and checks their signatures."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pipeline.live.hub.webhook import SIGNATURE, TIMESTAMP, signature

SECRET = "a-secret-of-tests-0123"
PATIENCE = 30.0


class Receiver:
    """An HTTP server that answers with the given statuses, then 204."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.events: list[dict[str, Any]] = []
        self.forged = 0
        self.requests = 0
        self.news = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with receiver.news:
                    good = self.headers[SIGNATURE] == signature(SECRET, self.headers[TIMESTAMP], body)
                    receiver.forged += not good
                    receiver.requests += 1
                    status = receiver.statuses.pop(0) if receiver.statuses else 204
                    if status == 204:
                        receiver.events += json.loads(body)["events"]
                    receiver.news.notify_all()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook?to=me"

    def until(self, what: Callable[[], bool]) -> None:
        with self.news:
            assert self.news.wait_for(what, PATIENCE)

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@contextmanager
def receiver() -> Iterator[Receiver]:
    """A receiver while the context is active."""
    made = Receiver()
    try:
        yield made
    finally:
        made.close()

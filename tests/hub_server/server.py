"""The Hub over HTTP. See facts of the protocol in `routes.py`; here are sockets, tokens and broken connections."""

import json
import re
import socket
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .repos import Account, Hub, HubError
from .routes import ROUTES, Answer, Request

DROP = 0  # status of a failure that closes the connection without an answer


class HubServer:
    """A Hub in a thread, on `port` (0: a free one).

    Attributes:
        url: for `HF_ENDPOINT`.
        storage_url: the same server under another name: large files must come from another origin.
        name: of the chunk store, in its address: hf_xet remembers by address, on disk, which chunks a store has, and
            ports come round again.
        hub: its content.
        requests: (method, path) of everything asked so far.
    """

    def __init__(self, port: int = 0) -> None:
        self.name = uuid.uuid4().hex
        self.hub = Hub()
        self.requests: list[tuple[str, str]] = []
        self._failures: list[dict[str, Any]] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.storage_url = f"http://localhost:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def add_account(self, token: str, name: str, role: str = "write", organizations: tuple[str, ...] = ()) -> None:
        self.hub.accounts[token] = Account(name, role, organizations)

    def fail(self, method: str, path: str, status: int = 500, times: int = 1, after: bool = False) -> None:
        """Answer the next `times` requests whose path matches with `status`, or not at all (DROP).

        after: only once the request has been carried out, as when a connection breaks before the answer arrives.
        """
        self._failures.append({"method": method, "path": path, "status": status, "times": times, "after": after})

    def failure_for(self, method: str, path: str, after: bool) -> int | None:
        """The status to fail this request with; counts it."""
        for failure in self._failures:
            fits = failure["method"] == method and failure["after"] == after and re.search(failure["path"], path)
            if failure["times"] > 0 and fits:
                failure["times"] -= 1
                return failure["status"]
        return None

    def asked(self, method: str, path: str) -> int:
        """How often something was asked for, by a regular expression of its path."""
        return sum(m == method and re.search(path, p) is not None for m, p in self.requests)


def _handler(server: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_any(self) -> None:
            path = self.path
            server.requests.append((self.command, path))
            body = self._body()
            try:
                self._fail_if_told(path, after=False)
                answer = self._route(body)
                self._fail_if_told(path, after=True)
            except HubError as error:
                answer = _error(error)
            except _Drop:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self._send(answer)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

        def log_message(self, *_: object) -> None:
            """Quiet."""

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _fail_if_told(self, path: str, after: bool) -> None:
            status = server.failure_for(self.command, path, after)
            if status == DROP:
                raise _Drop
            if status is not None:
                raise HubError(status, message="told to fail")

        def _route(self, body: bytes) -> Answer:
            parts = urlsplit(self.path)
            bearer = self.headers.get("Authorization", "")
            token = bearer.removeprefix("Bearer ") if bearer else None
            for method, pattern, function in ROUTES:
                match = re.fullmatch(pattern, parts.path)
                if match and self.command in method.split("|"):
                    query = parse_qs(parts.query, keep_blank_values=True)
                    return function(
                        Request(server, self.command, token, self.headers, query, body), **match.groupdict()
                    )
            raise HubError(404, message=f"no route {self.command} {parts.path}")

        def _send(self, answer: Answer) -> None:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if "Content-Length" not in answer.headers:
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

    return Handler


class _Drop(Exception):
    """Close the connection without an answer."""


def _error(error: HubError) -> Answer:
    named = {"X-Error-Code": error.code, "X-Error-Message": error.message} | error.headers
    body = json.dumps({"error": error.message}).encode()
    headers = {name: value for name, value in named.items() if value}
    return Answer(body, error.status, headers | {"Content-Type": "application/json"})

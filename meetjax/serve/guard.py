"""What stands before every route: request ids, the key, limits on bodies and on patience, one log line and the counts."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import logging
import re
import time
import uuid
from typing import Any

from meetjax.serve.metrics import Metrics
from meetjax.serve.replies import error_body, error_headers
from meetjax.serve.schema import Refusal

log = logging.getLogger("meetjax.serve")

BODY = 1 << 20
"""Bytes of a request's body at most."""
PATIENCE = 30.0
"""Seconds that a client may take to send its body, or to take what was sent to it before more is."""
GONE = 499
"""Status, in logs and counts alone, of a request whose client went away."""
_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Guard:
    """An ASGI middleware around the whole app.

    The body is read whole before the app sees it: 413 beyond `body` bytes, 408 when it takes too long. When the client goes, or takes
    nothing for `patience` seconds, the app's task is cancelled. The streams that the app has put into `state["held"]` are cancelled
    when the request ends, however it ends. What the app raises becomes an error body. Without `key` everybody may ask; with it all
    but /health need `Authorization: Bearer KEY`, or a browser's password prompt with the key as the password.
    """

    def __init__(self, app: Any, metrics: Metrics, key: str | None = None, body: int = BODY, patience: float = PATIENCE):
        self.app, self.metrics, self.key, self.body, self.patience = app, metrics, key, body, patience

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks by web socket
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        facts: dict[str, Any] = {"request_id": given if _ID.fullmatch(given) else uuid.uuid4().hex}
        held: list[Any] = []
        scope.setdefault("state", {}).update(facts=facts, held=held)
        exchange = _Exchange(send, facts["request_id"], self.patience)
        began = time.monotonic()
        try:
            self._check_key(headers, scope["path"])
            body = await self._read(headers, receive)
            await self._run(scope, body, receive, exchange)
        except Refusal as refusal:
            await exchange.refuse(refusal)
        except _Gone as gone:
            exchange.status = GONE
            facts["gone"] = str(gone)
        except Exception:
            log.exception("a request failed", extra={"facts": facts})
            await exchange.refuse(Refusal(500, "the server failed; its log says why", code="internal_error"))
        finally:
            for stream in held:
                stream.cancel()
            seconds = time.monotonic() - began
            self.metrics.observe(getattr(scope.get("route"), "path", "other"), exchange.status, seconds, facts)
            about = {"method": scope["method"], "path": scope["path"], "status": exchange.status, "seconds": round(seconds, 4)}
            log.info("request", extra={"facts": facts | about})

    def _check_key(self, headers: dict[str, str], path: str) -> None:
        if self.key is None or path == "/health":
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                given = ""
        if not hmac.compare_digest(given.strip().encode("utf-8", "replace"), self.key.encode()):
            raise Refusal(401, "this server needs its key: Authorization: Bearer KEY", code="invalid_api_key")

    async def _read(self, headers: dict[str, str], receive: Any) -> bytes:
        too_large = Refusal(413, f"body: too large; expected at most {self.body} bytes", code="body_too_large")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > self.body:
            raise too_large
        parts, total = [], 0

        async def rest() -> None:
            nonlocal total
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Gone("before its body was whole")
                parts.append(message.get("body", b""))
                total += len(parts[-1])
                if total > self.body:
                    raise too_large
                if not message.get("more_body", False):
                    return

        try:
            await asyncio.wait_for(rest(), self.patience)
        except TimeoutError:
            raise Refusal(408, f"body: not whole within {self.patience:g} s", code="body_too_slow") from None
        return b"".join(parts)

    async def _run(self, scope: dict[str, Any], body: bytes, receive: Any, exchange: _Exchange) -> None:
        """The app on a body, until it has answered or the client has gone."""
        bodies = [body]

        async def replay() -> dict[str, Any]:
            if bodies:
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}
            await asyncio.Event().wait()  # a disconnect cancels the app, it need not listen for one
            raise AssertionError

        async def until_gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        app, gone = asyncio.ensure_future(self.app(scope, replay, exchange)), asyncio.ensure_future(until_gone())
        try:
            await asyncio.wait({app, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not app.done() and not exchange.complete:  # a server also says so when an answer is complete
                raise _Gone("while it was answered")
            await app
        finally:
            for task in (app, gone):
                task.cancel()
            await asyncio.gather(app, gone, return_exceptions=True)


class _Gone(Exception):
    """The client went away, or takes nothing more."""


class _Exchange:
    """The sending side of a request: adds its id, remembers the status, and does not wait for a client for ever."""

    def __init__(self, send: Any, name: str, patience: float):
        self._send, self._name, self._patience = send, name, patience
        self.status, self.complete = 0, False

    async def __call__(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = message | {"headers": [*message.get("headers", ()), (b"x-request-id", self._name.encode())]}
        elif not message.get("more_body", False):
            self.complete = True
        try:
            await asyncio.wait_for(self._send(message), self._patience)
        except (TimeoutError, OSError) as error:
            raise _Gone(f"takes nothing for {self._patience:g} s" if isinstance(error, TimeoutError) else str(error)) from None

    async def refuse(self, refusal: Refusal) -> None:
        """Sends an error body, unless an answer is under way."""
        if self.status:
            return
        body = json.dumps(error_body(refusal)).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error_headers(refusal)}
        if refusal.status in (408, 413):
            headers["connection"] = "close"  # the rest of the body is not read
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        try:
            await self({"type": "http.response.start", "status": refusal.status, "headers": raw})
            await self({"type": "http.response.body", "body": body})
        except _Gone:
            self.status = GONE

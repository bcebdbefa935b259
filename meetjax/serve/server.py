"""`meetjax serve`: load a model and its adapters, listen, and at the end finish or fail every open request."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from meetjax.adapters.io import load_adapters
from meetjax.errors import MeetjaxError
from meetjax.models.load import load
from meetjax.serve.engine import Engine
from meetjax.serve.guard import log
from meetjax.serve.http import make_app
from meetjax.serve.metrics import JsonLines
from meetjax.serve.room import room_for

GRACE = 30.0
"""Seconds that open requests have to finish once the server is told to stop; then they are failed."""


def serve(
    model: str,
    adapters: Mapping[str, Path],
    *,
    host: str | None = None,
    port: int = 8000,
    key: str | None = None,
    slots: int = 8,
    capacity: int = 1024,
    queue: int = 64,
    page: bool = True,
) -> None:
    """Serves until SIGINT or SIGTERM. host: None for this machine alone; any other needs a key. port: 0 for a free one.

    Raises MeetjaxError for what cannot be loaded or listened on.
    """
    if host is not None and not key:
        raise MeetjaxError("serve: --host without a key", expected="--api-key KEY or $MEETJAX_API_KEY", found="none")
    listener = listen(host or "127.0.0.1", port)  # before the model: a port may be taken
    write_logs()
    loaded = load(model)
    banks = {name: load_adapters(folder, loaded.fingerprint) for name, folder in adapters.items()}
    engine = Engine(loaded, slots=slots, capacity=capacity, queue=queue, room=room_for(banks.values()))
    try:
        for name, folder in adapters.items():
            engine.put(name, banks[name], folder)
        engine.warm_up()
        app = make_app(engine, loaded, key=key)
        if page:
            from meetjax.serve.page import add_page

            app = add_page(app, engine, loaded)
        address = "http://{}:{}".format(*listener.getsockname()[:2])
        log.info("serving", extra={"facts": {"address": address, "model": loaded.name, "adapters": sorted(adapters)}})
        run_app(app, engine, listener)
    finally:
        engine.close()


def read_adapters(pairs: Sequence[str]) -> dict[str, Path]:
    """NAME=FOLDER, each. Raises MeetjaxError for what is not that, and for names that a model's name could not hold."""
    adapters: dict[str, Path] = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not equals or not folder or not name or set(name) & set("@+ ") or name == "base":
            raise MeetjaxError("serve: --adapter", expected="NAME=FOLDER, no @, + or space in NAME, which is not base", found=pair)
        if name in adapters:
            raise MeetjaxError("serve: --adapter", expected="each name once", found=name)
        adapters[name] = Path(folder)
    return adapters


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises MeetjaxError when the address cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise MeetjaxError(f"serve: {host} port {port}", found=error, fix="choose another with --host or --port") from None


def run_app(app: FastAPI, engine: Any, listener: socket.socket, grace: float = GRACE) -> None:
    """Answers on a socket until SIGINT or SIGTERM."""
    try:
        make_server(app, engine, grace).run(sockets=[listener])
    except KeyboardInterrupt:
        log.info("stopped")


def make_server(app: FastAPI, engine: Any, grace: float = GRACE) -> uvicorn.Server:
    """A server for an app; `should_exit = True` or a signal ends it gracefully."""
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, proxy_headers=False, ws="none",
        timeout_graceful_shutdown=int(grace) + 10,
    )  # fmt: skip
    return _Server(config, engine, grace)


class _Server(uvicorn.Server):
    """Told to stop, it refuses what is new and gives the open requests `grace` seconds; the engine then fails those that are left."""

    def __init__(self, config: uvicorn.Config, engine: Any, grace: float):
        super().__init__(config)
        self.engine, self.grace = engine, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        async def finish_or_fail() -> None:
            await asyncio.to_thread(self.engine.drain, self.grace)
            await asyncio.to_thread(self.engine.close)

        finishing = asyncio.ensure_future(finish_or_fail())
        await super().shutdown(sockets)
        await finishing


def write_logs() -> None:
    """One JSON object a line on stderr: every request, and what goes wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("meetjax.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)

"""A real server on the loopback, in a thread."""

from __future__ import annotations

import contextlib
import threading
import time
import types

from meetjax.serve.http import make_app
from meetjax.serve.server import listen, make_server


def until(true, seconds=10.0):
    """Waits for a condition. Fails when it does not come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(engine, model, *, page=False, grace=5.0, **options):
    """(url, port, engine, server) of a server in a thread of its own, stopped at the end."""
    app = make_app(engine, model, **options)
    if page:
        from meetjax.serve.page import add_page

        app = add_page(app, engine, model)
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = make_server(app, engine, grace)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield types.SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, engine=engine, server=server, thread=thread, app=app)
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()

"""A server over an engine without a model."""

from __future__ import annotations

import pytest

from tests.serve.fake import FakeEngine


@pytest.fixture(scope="module")
def served(model):
    """A server on the loopback over a fake engine."""
    pytest.importorskip("fastapi", reason="the serve extra is not installed")
    from tests.serve.loopback import serving

    with serving(FakeEngine(model), model, body=1 << 16, patience=2.0) as it:
        yield it
        assert it.engine.idle()

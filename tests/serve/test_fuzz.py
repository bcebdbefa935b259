"""Schemathesis draws requests from the server's own OpenAPI, valid ones and not: none gets a 5xx, and errors have one shape.

FUZZ is how many are drawn for each route in each of the two ways; `make fuzz` draws more than `make test`.
"""

from __future__ import annotations

import os
from collections import Counter

import hypothesis
import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.fake import FakeEngine
from tests.serve.loopback import serving

FUZZ = int(os.environ.get("FUZZ", "40"))
MODELS = ("base", "base+concise@0.5", "harmless")


@pytest.fixture(scope="module")
def api(model):
    with serving(FakeEngine(model, slots=64), model, body=1 << 16) as served:
        yield schemathesis.openapi.from_url(served.url + "/openapi.json")
        assert served.engine.idle()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"])
def test_no_request_breaks_the_server(route, mode, api):
    operation = next(found for found in (result.ok() for result in api.get_all_operations()) if found.path == route)
    if mode.is_negative and not operation.body:
        pytest.skip("takes nothing that could be wrong")
    seen = Counter()

    @settings(max_examples=FUZZ if operation.body else 5, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode), name=st.sampled_from(MODELS))
    def one(case, name):
        if mode.is_positive and isinstance(case.body, dict):
            case.body["model"] = name  # a drawn name is of no model, and goes no further than that
        reply = case.call()
        seen[reply.status_code] += 1
        assert reply.status_code < 500, reply.text
        if reply.status_code >= 400:
            assert reply.json()["error"]["message"]

    one()
    assert seen[200] if mode.is_positive else not seen[200], seen
    print(route, mode.value, dict(seen))

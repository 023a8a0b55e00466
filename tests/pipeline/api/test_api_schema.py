"""Schemathesis makes valid and invalid requests from the OpenAPI schema; none causes an internal error."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from starlette.testclient import TestClient
from support.live_standin import StandInHub

from pipeline.api.app import create_app, create_routes
from pipeline.api.service import ApiSettings
from pipeline.api.tokens import TokenSet
from pipeline.live.spec import LiveSpec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis
    from schemathesis.pytest.lazy import get_all_tests

TOKEN = "a-token-for-tests-0123456789"
EXAMPLES = int(os.environ.get("XMEM_API_EXAMPLES", "10"))

# Tools that it uses warn of their own future.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class _Forgetful(StandInHub):
    """For every request there is a stream to read, and capacity for one more."""

    async def _begin(self, stream_id: str | None = None) -> None:
        self.specs.pop("old", None)
        if len(self.specs) >= self.room:
            self.specs.pop(next(iter(self.specs)))
        if stream_id is not None and stream_id not in self.specs and len(stream_id) % 2:
            self.specs[stream_id] = LiveSpec(stream_id, "rtsp://10.20.0.1/x", detector="motion")
            self.frames[stream_id] = []
            self.publish(stream_id)
        await super()._begin(stream_id)


HUB = _Forgetful()
SETTINGS = ApiSettings(TokenSet([TOKEN]), ("10.20.0.0/16", "0.0.0.0/0"))
APP = create_app(HUB, SETTINGS, resolver=lambda host, port: ["10.20.0.9"])
PAGE = create_routes(HUB, SETTINGS).openapi()
OPERATIONS = [
    f"{method.upper()} {path}"
    for path, methods in PAGE["paths"].items()
    for method in methods
    if "preview" not in path
]


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(APP, headers={"Authorization": f"Bearer {TOKEN}"}, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def tests_of_operations() -> dict[str, Callable[..., None]]:
    """What `schema.parametrize()` would make of `send`, by operation.

    Made when the tests run: it takes seconds, and every worker of pytest-xdist collects all tests.
    """
    chosen = settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    schema = schemathesis.openapi.from_dict(PAGE).exclude(path_regex="preview")
    made: Any = get_all_tests(schema=schema, test_func=send, settings=chosen, given_kwargs=None)
    return {operation.label: test for operation, test in (result.ok() for result in made)}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_request_finds_a_fault(
    operation: str, tests_of_operations: dict[str, Callable[..., None]], client: TestClient
) -> None:
    assert sorted(tests_of_operations) == sorted(OPERATIONS)
    tests_of_operations[operation](client=client)


def send(case: schemathesis.Case[Any], client: TestClient) -> None:
    asked = case.as_transport_kwargs(base_url="http://testserver")
    asked.pop("cookies", None)
    answer = client.request(
        asked["method"],
        asked["url"],
        params=asked.get("params"),
        headers={**(asked.get("headers") or {}), "Authorization": f"Bearer {TOKEN}"},
        json=asked.get("json"),
        content=asked.get("data"),
    )
    route = PAGE["paths"][case.path].get(case.method.lower(), {})
    documented = set(route.get("responses", {}))
    assert answer.status_code < 500, answer.text
    assert str(answer.status_code) in documented | {"401", "404", "405"}, (
        answer.status_code,
        answer.text[:300],
    )


def test_a_fault_would_be_found(client: TestClient) -> None:
    HUB.fault = RuntimeError("a fault")
    try:
        assert client.get("/v1/streams").status_code == 500
    finally:
        HUB.fault = None
    assert asyncio.run(HUB.list()) is not None

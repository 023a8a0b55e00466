"""The protocol `Hub` has the same methods and parameters as `LiveHub`."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from typing import Any

import pytest

from pipeline.api.service import Hub
from pipeline.live.hub.hub import LiveHub
from pipeline.live.recent import LiveView

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray Serve's own modules use what pydantic calls deprecated
    from pipeline.distributed.serve import HubPlace, RayHub

METHODS = sorted(name for name in vars(Hub) if not name.startswith("_"))


def parameters(method: Any) -> list[inspect.Parameter]:
    # Ray adds a parameter of its own to the signatures of an actor class, inherited methods included.
    return [p for p in inspect.signature(method).parameters.values() if p.name != "_ray_trace_ctx"]


@pytest.mark.parametrize("name", METHODS)
def test_a_live_hub_takes_what_the_api_passes(name: str) -> None:
    asked, taken = parameters(getattr(Hub, name)), parameters(getattr(LiveHub, name))
    assert [(p.name, p.kind) for p in asked] == [(p.name, p.kind) for p in taken[: len(asked)]]
    assert all(p.default is not p.empty for p in taken[len(asked) :])


class Handle:
    """A fake actor handle that returns the arguments of its calls."""

    def __getattr__(self, method: str) -> Any:
        return Method(method)


class Method:
    def __init__(self, name: str, **options: Any) -> None:
        self.name, self.given = name, options

    def options(self, **options: Any) -> Method:
        return Method(self.name, **options)

    async def remote(self, *arguments: Any, **options: Any) -> Any:
        return self.name, arguments, options, self.given


def test_each_method_is_called_on_the_actor_and_only_waiting_takes_a_watchers_thread() -> None:
    ray_hub = RayHub(HubPlace("nobody"))
    ray_hub._handle = Handle()
    hub: Any = ray_hub
    assert asyncio.run(hub.remove("cam", 1.5)) == ("remove", ("cam", 1.5), {}, {})
    picture = asyncio.run(hub.view("cam", LiveView.jpeg, max_side=64))
    assert picture == ("view", ("cam", LiveView.jpeg), {"max_side": 64}, {})
    waiting = asyncio.run(hub.view("cam", LiveView.wait, 7, 2.0))
    assert waiting == ("view", ("cam", LiveView.wait, 7, 2.0), {}, {"concurrency_group": "watchers"})
    for wrong in ("metrics", "_streams", "__len__"):
        with pytest.raises(AttributeError):
            getattr(hub, wrong)

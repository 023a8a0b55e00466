"""State shared by the API's routes: the hub, the settings, and error responses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from pipeline.api.tokens import TicketOffice, TokenSet
from pipeline.base.errors import PromptError, UsageError, XmemError
from pipeline.live.camera.url_guard import CAMERA_PORTS, Resolver, UrlGuard, UrlRefusedError
from pipeline.live.recent import LiveView
from pipeline.live.spec import LiveSettings, LiveSpec

P = ParamSpec("P")
T = TypeVar("T")

_CHECKERS = 4
ADD_SECONDS = 20.0
"""Time limit for adding a stream: the first one of a kind makes the hub measure its network."""

CLICK_SECONDS = 20.0
"""Time limit for the mask of clicks: around 0.1 s, but on a machine whose cores all track, seconds."""


class HubUnavailableError(XmemError):
    """The hub is not available: it is starting, restarting, or gone."""


class Hub(Protocol):
    """The hub as used by the API: methods of `pipeline.live.hub.hub.LiveHub`, awaitable."""

    async def add(self, spec: LiveSpec) -> Mapping[str, Any]: ...
    async def remove(self, stream_id: str) -> Mapping[str, Any] | None: ...
    async def list(self) -> Sequence[Mapping[str, Any]]: ...
    async def status(self, stream_id: str) -> Mapping[str, Any]: ...
    async def request(self, stream_id: str, content: Mapping[str, Any]) -> Mapping[str, Any]: ...
    async def view(
        self,
        stream_id: str,
        read: Callable[Concatenate[LiveView, P], T],
        /,
        *arguments: P.args,
        **options: P.kwargs,
    ) -> T: ...
    async def capacity(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class ApiSettings:
    """Settings of the API. Holds digests of tokens, never tokens, and may be sent to other processes.

    Args:
        tokens: accepted tokens; None: no authentication, which the command line allows on loopback only.
        networks: CIDRs that cameras may be in; see `UrlGuard`.
        ports: allowed ports of cameras.
        hosts: allowed values of the Host header; None: any.
        detectors: detectors that requests may name.
        streams: default settings of streams.
        max_streams: maximum number of streams.
        max_viewers: maximum number of simultaneous live views (previews and WebSockets), per replica.
        hub_seconds: time limit for the hub's answers, in seconds.
        click_segmenter: what makes a mask of clicks, see `load_click_segmenter`.
    """

    tokens: TokenSet | None
    networks: tuple[str, ...] = ()
    ports: tuple[int, ...] = tuple(sorted(CAMERA_PORTS))
    hosts: tuple[str, ...] | None = None
    detectors: tuple[str, ...] = ("people", "motion")
    streams: LiveSettings = field(default_factory=LiveSettings)
    max_streams: int = 64
    max_viewers: int = 32
    max_body_bytes: int = 2**20
    hub_seconds: float = 5.0
    click_segmenter: str | None = None
    tickets: TicketOffice = field(default_factory=TicketOffice)


class RefusedError(Exception):
    """A refused request, answered with an HTTP status and a `Problem`."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Service:
    """State shared by the routes: the hub with its timeout, and the checks before it."""

    def __init__(self, hub: Hub, settings: ApiSettings, resolver: Resolver) -> None:
        self.hub, self.settings = hub, settings
        self.guard = UrlGuard(settings.networks, ports=settings.ports, resolver=resolver)
        self._pool = ThreadPoolExecutor(_CHECKERS, thread_name_prefix="xmem-api-check")
        self._checks = asyncio.Semaphore(_CHECKERS)
        self._viewers = 0

    async def ask(self, answer: Awaitable[T], *, seconds: float | None = None) -> T:
        """Await the hub's answer; HubUnavailableError (503) after the timeout."""
        try:
            return await asyncio.wait_for(answer, seconds or self.settings.hub_seconds)
        except TimeoutError as error:
            raise HubUnavailableError("the tracker did not respond in time: try again") from error

    async def check(self, work: Callable[..., T], *arguments: Any, seconds: float | None = None) -> T:
        """Run blocking work (a name look-up, decoding masks) in a thread, outside the event loop.

        Args:
            seconds: time limit of the work; by default that of the hub's answers.
        """
        loop = asyncio.get_running_loop()
        try:
            await asyncio.wait_for(self._checks.acquire(), self.settings.hub_seconds)
        except TimeoutError as error:
            raise HubUnavailableError("too many requests are being checked: try again") from error
        done = loop.run_in_executor(self._pool, work, *arguments)
        done.add_done_callback(lambda _: self._checks.release())
        return await self.ask(asyncio.shield(done), seconds=seconds)

    async def about(self, stream_id: str, answer: Awaitable[T], *, seconds: float | None = None) -> T:
        """Await the hub's answer about a stream; RefusedError (404) if there is no stream with that id."""
        try:
            return await self.ask(answer, seconds=seconds)
        except UsageError as error:
            if stream_id in await self.ids():
                raise
            raise RefusedError(404, "not_found", f"there is no stream {stream_id!r}") from error

    async def known(self, stream_id: str) -> Mapping[str, Any]:
        """A stream's status."""
        return await self.about(stream_id, self.hub.status(stream_id))

    async def ids(self) -> set[str]:
        """Ids of all streams."""
        return {str(status["id"]) for status in await self.ask(self.hub.list())}

    async def add(self, spec: LiveSpec) -> Mapping[str, Any]:
        """Add a checked stream to the hub; the remaining errors are a taken id and a lack of capacity."""
        there = await self.ids()
        if spec.stream_id not in there:
            if len(there) >= self.settings.max_streams:
                raise RefusedError(409, "no_room", f"{len(there)} streams are running, which is the limit")
            try:
                return await self.ask(self.hub.add(spec), seconds=ADD_SECONDS)
            except PromptError:
                raise
            except UsageError as error:
                if spec.stream_id not in await self.ids():
                    raise RefusedError(409, "no_room", str(error)) from error
        raise RefusedError(409, "exists", f"stream {spec.stream_id!r} exists already: choose another id")

    @property
    def crowded(self) -> bool:
        """Whether the limit of viewers is reached."""
        return self._viewers >= self.settings.max_viewers

    def refuse_if_crowded(self) -> None:
        """RefusedError if the limit of viewers is reached."""
        if self.crowded:
            raise RefusedError(
                429, "too_many_viewers", f"{self._viewers} viewers are connected already: try again later"
            )

    @contextlib.contextmanager
    def viewing(self) -> Iterator[None]:
        """Count a viewer while the context is active."""
        self._viewers += 1
        try:
            yield
        finally:
            self._viewers -= 1

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def status_of(error: BaseException) -> tuple[int, str]:
    """The HTTP status and code of an error."""
    if isinstance(error, RefusedError):
        return error.status, error.code
    if isinstance(error, UrlRefusedError):
        return 422, "url_refused"
    if isinstance(error, PromptError):
        return 422, "bad_prompt"
    if isinstance(error, UsageError):
        return 422, "not_allowed"
    return 503, "unavailable"

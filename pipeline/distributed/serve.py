"""The Ray Serve application: API replicas in front of one named hub actor.

The hub is a detached actor, which outlives the process that started it. Ray restarts it when its process
dies, and it resumes from its stored state. Replicas find it by name and may be started and stopped at any
time; none of their requests waits for tracking.

    xmem serve --out s3://my-bucket/live ...          # see jobs.cli.serve
    serve run pipeline.distributed.serve:app out=s3://my-bucket/live allow_network=10.20.0.0/16

`serve run` and a RayService take the tokens from XMEM_API_TOKENS or from `token_file`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.config import RequestRouterConfig

from pipeline.api.app import create_app
from pipeline.api.guard import ApiGuard
from pipeline.api.service import ApiSettings, Hub, HubUnavailableError
from pipeline.api.tokens import TOKENS_VARIABLE, TokenSet
from pipeline.base.errors import UsageError, XmemError
from pipeline.distributed.actors import WATCHERS, live_actor, live_actor_name
from pipeline.distributed.replica_port import keep_on_loopback
from pipeline.distributed.replica_router import FailFastRouter
from pipeline.live.camera.options import LiveOptions
from pipeline.live.camera.url_guard import UrlGuard
from pipeline.live.hub.brokers import BrokerSettings
from pipeline.live.hub.settings import HubSettings
from pipeline.live.hub.webhook import WebhookSettings
from pipeline.live.recent import LiveView
from pipeline.tracking.settings import NOT_LIVE, TrackSettings, track_options

log = logging.getLogger(__name__)

APPLICATION = "xmem-live"
NAMESPACE = "xmem"
_CALLS = 128
_MOST_REQUESTS = 200
_HEALTH_SECONDS = 1.0  # replacement delay of a dead replica


@dataclass(frozen=True)
class HubPlace:
    """Name of the hub's actor, and the settings to start it with if it does not exist.

    Args:
        name: name of the actor, in the namespace `NAMESPACE`.
        settings: settings of the hub; None: it is started elsewhere.
        gpus: share of a GPU to reserve.
    """

    name: str
    settings: HubSettings | None = field(default=None, repr=False)
    gpus: float = 0.0


def hub_actor(place: HubPlace) -> Any:
    """Return the handle of the hub's actor, starting it if necessary; ValueError if it cannot be found."""
    if place.settings is None:
        return ray.get_actor(place.name, namespace=NAMESPACE)
    return live_actor(place.settings, gpus=place.gpus, calls=_CALLS, name=place.name, namespace=NAMESPACE)


class RayHub:
    """The API's `Hub` protocol, with each method forwarded to the hub's actor.

    Args:
        place: name and settings of the actor.

    Raises:
        HubUnavailableError: by every method, while the actor is not available.
    """

    def __init__(self, place: HubPlace) -> None:
        self._place = place
        self._handle: Any = None
        self._finding = asyncio.Lock()

    @classmethod
    def at(cls, place: HubPlace) -> Hub:
        """Return the hub at a place, typed as the protocol."""
        return cast(Hub, cls(place))

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        if name.startswith("_") or not hasattr(Hub, name):
            raise AttributeError(f"{type(self).__name__} has no {name!r}: see pipeline.api.service.Hub")
        return partial(self._call, name)

    async def find(self) -> Any:
        """Return the actor's handle; HubUnavailableError while there is none."""
        async with self._finding:
            if self._handle is None:
                try:
                    self._handle = await asyncio.to_thread(hub_actor, self._place)
                except (ValueError, RayError) as error:
                    raise HubUnavailableError("the tracker is not running: try again") from error
            return self._handle

    async def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        call = getattr(await self.find(), method)
        if LiveView.wait in arguments:
            call = call.options(concurrency_group=WATCHERS)
        try:
            return await call.remote(*arguments, **options)
        except RayTaskError as error:
            # Ray's error contains the whole remote traceback; re-raise the hub's own error instead.
            cause = error.cause
            if isinstance(cause, XmemError):
                raise cause from None
            raise
        except RayActorError as error:
            self._handle = None
            log.warning("the hub's actor: %s", type(error).__name__)
            raise HubUnavailableError("the tracker's process is being restarted: try again") from error
        except RayError as error:  # Ray's own failures: no memory for a result, a lost node
            log.warning("the hub's actor: %s", type(error).__name__)
            raise HubUnavailableError("the tracker is not reachable at the moment: try again") from error


def application(api: ApiSettings, place: HubPlace, *, replicas: int = 1) -> serve.Application:
    """Build the application for `serve.run`."""

    def build() -> ApiGuard:
        keep_on_loopback()
        return create_app(RayHub.at(place), api)

    router: Any = {"request_router_class": FailFastRouter}
    ingress = serve.ingress(build)()
    deployment: Any = serve.deployment(
        ingress,
        name="Api",
        num_replicas=replicas,
        max_ongoing_requests=_MOST_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=5.0,
        health_check_period_s=_HEALTH_SECONDS,
        request_router_config=RequestRouterConfig(**router),
    )
    bound: serve.Application = deployment.bind()
    return bound


def settings_from(options: Mapping[str, str], environment: Mapping[str, str]) -> tuple[ApiSettings, HubPlace]:
    """Make settings from `name=text` options, as given to `serve run` or in a RayService's `args`.

    Args:
        options: `out` is required. The others are those of `xmem serve`: gpus, hub, max_streams,
            allow_network (CIDRs separated by commas), allow_port, allow_detector, hosts, token_file, secrets,
            click_segmenter, and every option of tracking of a live stream, by its name: model, device, dtype,
            threads, size, mem_every, sinks, ...
        environment: environment variables; XMEM_API_TOKENS is read.

    Raises:
        UsageError: an option is unknown, missing or not allowed.
    """
    given = {str(name): str(value) for name, value in options.items()}
    words = {name: given.pop(name) for name in list(given) if name in _WORDS}
    tracked = {o.name: o for o in track_options() if o.name not in NOT_LIVE}
    tracking = {name: tracked[name].parse(given.pop(name)) for name in list(given) if name in tracked}
    if given or not words.get("out"):
        wrong = f"unknown option {sorted(given)[0]!r}" if given else "option 'out' is missing"
        raise UsageError(f"{wrong}: available are {', '.join((*_WORDS, *tracked))}")
    if words.get("token_file"):
        tokens = TokenSet.from_file(words["token_file"])
    else:
        tokens = TokenSet.from_text(environment.get(TOKENS_VARIABLE, ""))
    return live_settings(
        words["out"],
        TrackSettings().with_options(tracking),
        ApiSettings(
            tokens,
            tuple(_listed(words.get("allow_network", ""))),
            tuple(_whole(port) for port in _listed(words.get("allow_port", ""))) or ApiSettings(None).ports,
            hosts=tuple(_listed(words.get("hosts", ""))) or None,
            detectors=tuple(_listed(words.get("allow_detector", ""))) or ApiSettings(None).detectors,
            max_streams=_whole(words.get("max_streams", "16")),
            click_segmenter=words.get("click_segmenter") or None,
        ),
        hub=words.get("hub", "default"),
        secrets=words.get("secrets"),
        gpus=float(words.get("gpus", "0")),
    )


def live_settings(
    out: str,
    tracking: TrackSettings,
    api: ApiSettings,
    *,
    hub: str = "default",
    secrets: str | None = None,
    gpus: float = 0.0,
    webhook: WebhookSettings | None = None,
    brokers: Sequence[BrokerSettings] = (),
) -> tuple[ApiSettings, HubPlace]:
    """Make the settings of the API and of the hub behind it, for both `xmem serve` and `serve run`.

    Args:
        out: output folder.
        tracking: model, memory and sinks of the hub; its detector settings and box segmenter are defaults for
            streams.
        api: settings of the API, including allowed networks and the maximum number of streams.
        hub, secrets, webhook, brokers: see `HubSettings`.
        gpus: share of a GPU to reserve; 0 with a cuda device means a whole one.
    """
    streams = replace(
        api.streams, finder=tracking.detector.finder, box_segmenter=tracking.commit.box_segmenter
    )
    settings = HubSettings(
        out,
        hub=hub,
        tracking=tracking,
        options=camera_options(api),
        max_streams=api.max_streams,
        secrets=secrets,
        webhook=webhook,
        brokers=tuple(brokers),
    )
    gpus = gpus or float(tracking.model.device.startswith("cuda"))
    return replace(api, streams=streams), HubPlace(live_actor_name(hub), settings, gpus=gpus)


def camera_options(api: ApiSettings) -> LiveOptions:
    """Options of cameras: only allowed networks, checked at each connection."""
    try:
        return LiveOptions(guard=UrlGuard(api.networks, ports=api.ports))
    except ValueError as error:
        raise UsageError(str(error)) from error


def app(options: Mapping[str, str]) -> serve.Application:
    """Entry point of `serve run pipeline.distributed.serve:app out=...` and a RayService.

    See `settings_from`.
    """
    return application(*settings_from(options, os.environ))


_WORDS = (
    "out", "gpus", "hub", "max_streams", "allow_network", "allow_port", "allow_detector", "hosts",
    "token_file", "secrets", "click_segmenter",
)  # fmt: skip


def _listed(text: str) -> list[str]:
    return [part for part in text.replace(",", " ").split() if part]


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{text!r} is not a whole number") from None

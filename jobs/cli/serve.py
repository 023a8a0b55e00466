"""The `xmem serve` command: follows live cameras and serves the HTTP API on Ray Serve."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli.options import tracking_options
from jobs.cli.terminal import fetch_model, say
from pipeline.base.errors import UsageError, XmemError
from pipeline.base.garbage import no_collection
from pipeline.base.redaction import redacted
from pipeline.tracking.settings import NOT_LIVE, TrackSettings

if TYPE_CHECKING:
    from pipeline.api.tokens import TokenSet
    from pipeline.live.hub.brokers import BrokerSettings
    from pipeline.live.hub.webhook import WebhookSettings

_WEBHOOK_SECRET = "XMEM_WEBHOOK_SECRET"


@tracking_options(without=NOT_LIVE)
def serve(
    out: Annotated[str, typer.Option(help="Output folder: a path or any fsspec URI.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    token_file: Annotated[
        str | None,
        typer.Option(
            help="File with the API's bearer tokens, one per line. Default: variable XMEM_API_TOKENS."
        ),
    ] = None,
    insecure_loopback: Annotated[
        bool,
        typer.Option("--insecure-loopback", help="Require no tokens; allowed on loopback addresses only."),
    ] = False,
    allow_network: Annotated[
        list[str] | None,
        typer.Option(metavar="CIDR", help="Network in which cameras are allowed; repeatable. Default: none."),
    ] = None,
    allow_port: Annotated[
        list[int] | None,
        typer.Option(help="Port on which cameras are allowed; repeatable. Default: 322, 554, 8322 and 8554."),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Host name that requests to the API may use; repeatable.")
    ] = None,
    allow_detector: Annotated[
        list[str] | None,
        typer.Option(help="Detector that streams may use; repeatable. Default: people and motion."),
    ] = None,
    click_segmenter: Annotated[
        str | None,
        typer.Option(
            help="What makes a mask of clicks on a stream's page: xmem-click (the bundled network; the "
            "default), grabcut, or an installed plugin's name."
        ),
    ] = None,
    max_streams: Annotated[int, typer.Option(help="Maximum number of streams at the same time.")] = 16,
    hub: Annotated[
        str, typer.Option(help="Name of the hub; one process per output folder and name.")
    ] = "default",
    secrets: Annotated[str | None, typer.Option(help="Folder in which camera passwords are stored.")] = None,
    webhook: Annotated[
        str | None, typer.Option(help="URL to which events of zones and lines are pushed.")
    ] = None,
    webhook_secret_file: Annotated[
        str | None,
        typer.Option(
            help="File with the secret that signs the webhook's requests. Default: variable "
            "XMEM_WEBHOOK_SECRET."
        ),
    ] = None,
    event_topic: Annotated[
        list[str] | None,
        typer.Option(
            envvar="XMEM_EVENT_TOPICS",
            help="Topic to which events of zones and lines are pushed: kafka://host/topic, mqtt://host/topic "
            "or mqtts://host/topic; one of Kafka and one of MQTT.",
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(help="Number of processes that answer requests.")] = 1,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster: auto or host:6379. Default: a local Ray, started for the command."),
    ] = None,
    gpus: Annotated[float, typer.Option(help="Share of a GPU to reserve for the hub.")] = 0.0,
    *,
    tracking: TrackSettings,
) -> None:
    """Track live cameras and serve their streams, pictures and mask records over HTTP."""
    tokens = _tokens(token_file, insecure_loopback, host)
    pushed = _webhook(webhook, webhook_secret_file)
    brokers = _brokers(event_topic or [])
    networks = tuple(allow_network or ())
    if address is None:  # a cluster may have plugins that this machine lacks
        from pipeline.tracking.plugins import check_plugins

        check_plugins(tracking, allow_detector or (), click_segmenter)
    fetch_model(tracking.model.name)

    with no_collection():
        from jobs.cluster.connection import connected
        from pipeline.api import slow_clients
        from pipeline.api.service import ApiSettings
        from pipeline.distributed.serve import application, live_settings
        from pipeline.live.camera.url_guard import CAMERA_PORTS

    api, place = live_settings(
        out,
        tracking,
        ApiSettings(
            tokens,
            networks,
            tuple(allow_port or sorted(CAMERA_PORTS)),
            hosts=_hosts(host, allow_host or []),
            detectors=tuple(allow_detector or ApiSettings(None).detectors),
            max_streams=max_streams,
            click_segmenter=click_segmenter,
        ),
        hub=hub,
        secrets=secrets,
        gpus=gpus,
        webhook=pushed,
        brokers=brokers,
    )
    if not networks:
        say("no network is allowed (--allow-network): all cameras will be refused")
    # Read at start by Ray's processes, including Serve's HTTP proxy.
    os.environ.setdefault(slow_clients.VARIABLE, slow_clients.CALLBACK)
    # On a busy machine the proxy takes longer to start than Ray Serve waits by default (5 s).
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    with connected(address, gpus=tracking.model.device.startswith("cuda")):
        _run(application(api, place, replicas=replicas), place, host, port, out)


def _run(application: object, place: object, host: str, port: int, out: str) -> None:
    import ray
    from ray import serve as ray_serve

    from jobs.cluster.connection import check
    from pipeline.distributed.serve import APPLICATION, NAMESPACE, HubPlace, hub_actor

    assert isinstance(place, HubPlace)
    stop = threading.Event()
    before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        ray_serve.start(http_options={"host": host, "port": port, "location": "HeadOnly"})
        handle = hub_actor(place)
        try:
            ray.get(handle.capacity.remote())  # raises if the hub's settings are wrong
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, XmemError):
                raise cause from None
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise XmemError(f"the hub cannot be started: {lines[-1].strip()}") from error
        ray_serve.run(application, name=APPLICATION, route_prefix="/")  # type: ignore[arg-type]
        shown = f"[{host}]" if ":" in host else host
        say(f"serving http://{shown}:{port} into {redacted(out)}; Ctrl-C ends it")
        while not stop.wait(0.5):
            check()
        say("closing: rows that are under way are committed")
        ray.get(handle.close.remote(), timeout=60)
        ray.kill(ray.get_actor(place.name, namespace=NAMESPACE))
        ray_serve.delete(APPLICATION)
        ray_serve.shutdown()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _webhook(url: str | None, secret_file: str | None) -> WebhookSettings | None:
    """The webhook's settings; UsageError for a URL without a secret and the reverse."""
    from pipeline.live.hub.webhook import WebhookSettings

    if url is None:
        if secret_file is not None:
            raise UsageError("--webhook-secret-file without --webhook: give the URL, too")
        return None
    if secret_file is None:
        secret = os.environ.get(_WEBHOOK_SECRET, "").strip()
        if not secret:
            raise UsageError(
                f"--webhook needs a secret to sign with: set {_WEBHOOK_SECRET}, or give --webhook-secret-file"
            )
        return WebhookSettings(url, secret)
    try:
        return WebhookSettings(url, Path(secret_file).expanduser().read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UsageError(f"webhook secret file {secret_file}: {reason}") from error


def _brokers(urls: list[str]) -> list[BrokerSettings]:
    """The settings of topics; UsageError for two of one kind."""
    from pipeline.live.hub.brokers import BrokerSettings

    brokers = [BrokerSettings(url) for url in urls]
    kinds = [broker.kind.removesuffix("s") for broker in brokers]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise UsageError(f"--event-topic has {kinds.count(kind)} {kind} topics: give one")
    return brokers


def _tokens(token_file: str | None, insecure: bool, host: str) -> TokenSet | None:
    """The API's tokens, None for open access; UsageError if open access was not requested."""
    from pipeline.api.tokens import TOKENS_VARIABLE, TokenSet

    if insecure:
        if token_file is not None:
            raise UsageError("--insecure-loopback and --token-file exclude each other: drop one")
        if not is_loopback(host):
            raise UsageError(
                f"--insecure-loopback with --host {host} is not allowed: others would be let in without a "
                "token; use 127.0.0.1, or give --token-file"
            )
        return None
    if token_file is not None:
        return TokenSet.from_file(token_file)
    text = os.environ.get(TOKENS_VARIABLE, "")
    if not text.strip():
        raise UsageError(
            f"no token is given: set {TOKENS_VARIABLE}, or give --token-file FILE (`openssl rand -hex 32` "
            "makes a token); on 127.0.0.1 --insecure-loopback does without"
        )
    return TokenSet.from_text(text)


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hosts(host: str, named: list[str]) -> tuple[str, ...] | None:
    """Allowed values of the Host header; None: any (the API is then protected by tokens)."""
    from pipeline.api.guard import LOOPBACK_HOSTS

    if is_loopback(host):
        own = f"[{host}]" if ":" in host else host
        return (*LOOPBACK_HOSTS, own, *named)
    return tuple(named) or None

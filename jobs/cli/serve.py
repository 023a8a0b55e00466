"""The `xmem serve` command: follows live cameras and serves the HTTP API on Ray Serve."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import threading
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli.options import tracking_options
from jobs.cli.terminal import fetch_model, say
from pipeline.base.errors import UsageError, XmemError
from pipeline.base.redaction import redacted
from pipeline.tracking.settings import NOT_LIVE, TrackSettings

if TYPE_CHECKING:
    from pipeline.api.tokens import TokenSet


@tracking_options(without=NOT_LIVE)
def serve(
    out: Annotated[str, typer.Option(help="Output folder: a path or any fsspec URI.")],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    token_file: Annotated[
        str | None,
        typer.Option(help="File with the API's bearer tokens, one a line. Default: XMEM_API_TOKENS."),
    ] = None,
    insecure_loopback: Annotated[
        bool, typer.Option("--insecure-loopback", help="No tokens; only on this machine's own address.")
    ] = False,
    allow_network: Annotated[
        list[str] | None,
        typer.Option(metavar="CIDR", help="Where cameras may be; repeatable. Default: nowhere."),
    ] = None,
    allow_port: Annotated[
        list[int] | None, typer.Option(help="On which cameras may be asked [322 554 8322 8554]; repeatable.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Host name by which the API may be asked; repeatable.")
    ] = None,
    allow_detector: Annotated[
        list[str] | None,
        typer.Option(help="Detector that streams may name, such as an installed one [motion]; repeatable."),
    ] = None,
    max_streams: Annotated[int, typer.Option(help="Streams at the same time.")] = 16,
    hub: Annotated[
        str, typer.Option(help="Name of the hub: one process at a time per folder and name.")
    ] = "default",
    secrets: Annotated[str | None, typer.Option(help="Folder for the cameras' passwords.")] = None,
    replicas: Annotated[int, typer.Option(help="Processes that answer requests.")] = 1,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster: auto or host:6379. Default: a Ray of its own.")
    ] = None,
    gpus: Annotated[float, typer.Option(help="Share of a GPU to reserve for the hub.")] = 0.0,
    *,
    tracking: TrackSettings,
) -> None:
    """Follow live cameras, and serve their streams, pictures and records over HTTP."""
    tokens = _tokens(token_file, insecure_loopback, host)
    networks = tuple(allow_network or ())
    if address is None:  # a cluster may have plugins that this machine lacks
        from pipeline.tracking.plugins import check_plugins

        check_plugins(tracking, allow_detector or ())
    fetch_model(tracking.model.name)

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
        ),
        hub=hub,
        secrets=secrets,
        gpus=gpus,
    )
    if not networks:
        say("no network is allowed (--allow-network): every camera is going to be refused")
    # Ray's processes read it when they start, the HTTP proxy among them.
    os.environ.setdefault(slow_clients.VARIABLE, slow_clients.CALLBACK)
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
            ray.get(handle.capacity.remote())  # what is wrong with its settings is said here
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
        ray_serve.shutdown()  # type: ignore[no-untyped-call]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tokens(token_file: str | None, insecure: bool, host: str) -> TokenSet | None:
    """Who is let in; UsageError if that would be everybody by mistake."""
    from pipeline.api.tokens import TOKENS_VARIABLE, TokenSet

    if insecure:
        if token_file is not None:
            raise UsageError("--insecure-loopback and --token-file cannot both be meant: drop one")
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
    """Whether only this machine can reach what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hosts(host: str, named: list[str]) -> tuple[str, ...] | None:
    """Host names that requests may give; None: any, where tokens are what guards the API."""
    from pipeline.api.guard import LOOPBACK_HOSTS

    if is_loopback(host):
        own = f"[{host}]" if ":" in host else host
        return (*LOOPBACK_HOSTS, own, *named)
    return tuple(named) or None

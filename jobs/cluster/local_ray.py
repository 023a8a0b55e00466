"""Protection of a Ray that this process starts: it listens on loopback only and asks clients for a token.

Ray runs any code that a client sends. By default it listens on all addresses of the machine, and before 2.59
it requires no token. A local Ray is for the command that starts it only: its token is random, new each time,
passed to Ray's processes in their environment, and not stored.

Processes that the command does not need are left out, see `lean_start`.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import ray
from ray import _raylet
from ray._private import ray_constants, services, utils
from ray._private.node import Node

from jobs.cluster import auth_token as ray_token
from jobs.cluster import silent_agent, worker_start
from pipeline.base.errors import XmemError

MINIMUM = (2, 59)
"""The first Ray that asks for a token by default. Before 2.58 a Serve replica unpickles what clients send,
even if Ray asks for a token."""

_RAYLET_SECONDS = 120.0
_PRESTART = "RAY_prestart_worker_first_driver"
_AGENT_OPTION = "--dashboard_agent_command="
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: no other node may join, so all is on 127.0.0.1


def check_version() -> None:
    """Raise XmemError if the installed Ray cannot be protected."""
    found = tuple(int(part) for part in re.findall(r"\d+", ray.__version__)[:2])
    if found < MINIMUM:
        least = ".".join(map(str, MINIMUM))
        raise XmemError(
            f"Ray {ray.__version__} is not safe to start: others on the network could run code in it; "
            f"pip install 'ray[serve]>={least}'"
        )


@contextmanager
def protected() -> Iterator[None]:
    """Context in which `ray.init` starts a Ray on loopback with a random token.

    RAY_AUTH_MODE and RAY_AUTH_TOKEN are overridden inside: the user's values are meant for clusters.

    Raises:
        XmemError: the installed Ray is too old.
    """
    check_version()
    ray_token.make_private()
    given = {ray_token.MODE: "token", ray_token.TOKEN: secrets.token_hex(32), _LOOPBACK: "0"}
    before = {name: os.environ.get(name) for name in given}
    clusters = ray_constants.ENABLE_RAY_CLUSTER
    _set(given)
    ray_constants.ENABLE_RAY_CLUSTER = False  # the variable is read once, when Ray is imported
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        _set(before)


@contextmanager
def lean_start(*, logs: bool, agent: bool = False) -> Iterator[None]:
    """Context in which `ray.init` leaves out processes that one command does not need.

    These are the autoscaler's monitor, the log monitor, the API server (the dashboard's, which Ray starts
    without the dashboard too), the dashboard's agent, and idle workers, one per CPU: actors with environment
    variables, such as the trackers, get processes of their own. Workers are started by
    `jobs.cluster.worker_start`, which does not import Ray before they do. Ray has no options for them. Nor
    has it one for the 30 s in which a raylet must start: here it may take longer on a busy machine, and is
    given up as soon as it has ended. Methods that another version of Ray lacks are left alone.

    Args:
        logs: start the log monitor, which passes the workers' output on to this process.
        agent: start the dashboard's agent, which serves metrics, logs and jobs of the node; else
            `jobs.cluster.silent_agent` takes its place.
    """
    ours: dict[str, Any] = {
        "start_monitor": _nothing,
        "start_api_server": _without_api_server,
        "start_raylet": _with_our_programs(Node.start_raylet, agent=agent),
        "start_ray_processes": _patient(Node.start_ray_processes),
    }
    if not logs:
        ours["start_log_monitor"] = _nothing
    theirs = {name: getattr(Node, name) for name in ours if hasattr(Node, name)}
    prestart = os.environ.get(_PRESTART)
    os.environ.setdefault(_PRESTART, "0")
    for name in theirs:
        setattr(Node, name, ours[name])
    try:
        yield
    finally:
        for name, method in theirs.items():
            setattr(Node, name, method)
        if prestart is None:
            del os.environ[_PRESTART]


def _nothing(node: object) -> None:
    pass


def _without_api_server(node: Any, **options: object) -> None:
    node._webui_url = ""  # its address, which the raylet's and the workers' command lines name


def _with_our_programs(start: Callable[..., None], *, agent: bool) -> Callable[..., None]:
    """Wrap `Node.start_raylet`: `jobs.cluster.worker_start` starts its workers, and it gets our agent.

    Args:
        agent: leave it Ray's own agent.
    """

    def started(node: Any, *arguments: Any, **options: Any) -> None:
        node._ray_params.setup_worker_path = worker_start.__file__
        with nullcontext() if agent else _silent_agent():
            start(node, *arguments, **options)

    return started


@contextmanager
def _silent_agent() -> Iterator[None]:
    """Context in which a raylet is started with `jobs.cluster.silent_agent` as the dashboard's agent."""
    module: Any = services
    packages: Any = utils
    theirs, lacks = module.start_ray_process, packages.get_dashboard_dependency_error
    rays = os.path.join(os.path.dirname(ray.__file__), "dashboard", "agent.py")

    def start(command: list[str], *arguments: Any, **options: Any) -> Any:
        ours = [
            part.replace(rays, silent_agent.__file__) if part.startswith(_AGENT_OPTION) else part
            for part in command
        ]
        return theirs(ours, *arguments, **options)

    module.start_ray_process = start
    # It imports what Ray's own agent needs: a quarter of a second of CPU time.
    packages.get_dashboard_dependency_error = lambda: None
    try:
        yield
    finally:
        module.start_ray_process = theirs
        packages.get_dashboard_dependency_error = lacks


def _patient(start: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap `Node.start_ray_processes`: it returns once the raylet is registered.

    If that fails, the wrapper stops all processes of the node and raises RuntimeError.
    """

    def started(node: Any) -> None:
        start(node)
        (raylet,) = node.all_processes[ray_constants.PROCESS_TYPE_RAYLET]
        end = time.monotonic() + _RAYLET_SECONDS
        while raylet.process.poll() is None and time.monotonic() < end:
            with suppress(RuntimeError):  # it is not registered yet
                services.get_node(node.gcs_address, node._node_id)
                return
            time.sleep(0.05)
        ended = raylet.process.poll()
        node.kill_all_processes(check_alive=False, allow_graceful=False)  # `ray.shutdown` does not know them
        raise RuntimeError(
            f"the raylet did not start in {_RAYLET_SECONDS:g} s"
            if ended is None
            else f"the raylet ended while it started, exit code {ended}"
        )

    return started


def check_address() -> None:
    """Raise XmemError if the local Ray can be reached from other machines."""
    address = ray.get_runtime_context().gcs_address
    if not ipaddress.ip_address(address.rpartition(":")[0].strip("[]")).is_loopback:
        raise XmemError(f"Ray {ray.__version__} listens at {address}, not on loopback only: it is not used")


def _set(variables: Mapping[str, str | None]) -> None:
    module: Any = _raylet

    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    # Ray has read both by now.
    module.Config.initialize("")
    module.AuthenticationTokenLoader.instance().reset_cache()

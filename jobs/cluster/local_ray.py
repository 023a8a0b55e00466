"""Protection of a Ray that this process starts: it listens on loopback only and asks clients for a token.

Ray runs any code that a client sends. By default it listens on all addresses of the machine, and before 2.59
it requires no token. A local Ray is for the command that starts it only: its token is random, new each time,
passed to Ray's processes in their environment, and not stored.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray import _raylet
from ray._private import ray_constants

from jobs.cluster import auth_token as ray_token
from pipeline.base.errors import XmemError

MINIMUM = (2, 59)
"""The first Ray that asks for a token by default. Before 2.58 a Serve replica unpickles what clients send,
even if Ray asks for a token."""

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

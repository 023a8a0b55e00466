"""Binds a Serve replica's gRPC port to loopback if its Ray runs on loopback.

Ray Serve binds that port to all addresses, whatever the node's own address is, and has no setting for it.
"""

from __future__ import annotations

import ipaddress
from typing import Any

import ray
from ray.serve._private import replica

_EVERYWHERE = "[::]:"


def keep_on_loopback() -> None:
    """In a replica, before it listens: bind to the node's own address if that is loopback."""
    host = str(ray.util.get_node_ip_address())
    if not ipaddress.ip_address(host).is_loopback:
        return
    module: Any = replica
    add_port = module.add_port_to_grpc_server

    def add_loopback_port(server: Any, address: str) -> int:
        if address.startswith(_EVERYWHERE):
            name = f"[{host}]" if ":" in host else host
            address = f"{name}:{address.removeprefix(_EVERYWHERE)}"
        return int(add_port(server, address))

    module.add_port_to_grpc_server = add_loopback_port

"""Listening TCP sockets of processes, read from the kernel (Linux)."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Iterable
from pathlib import Path


def listeners(pids: Iterable[int]) -> set[tuple[str, str, int]]:
    """(command, address, port) of each; IPv4 addresses embedded in IPv6 are returned as IPv4."""
    listening = _listening()
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = re.fullmatch(r"socket:\[(\d+)\]", str(descriptor.readlink()))
                    if target and target[1] in listening:
                        found.add((name, *listening[target[1]]))
    return found


def is_loopback(address: str) -> bool:
    """Whether an address can be reached from this machine only."""
    return ipaddress.ip_address(address).is_loopback


def _listening() -> dict[str, tuple[str, int]]:
    """Addresses and ports by inode."""
    found = {}
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                words, _, port = fields[1].partition(":")
                raw = bytes.fromhex(words)
                packed = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
                found[fields[9]] = (socket.inet_ntop(family, packed).removeprefix("::ffff:"), int(port, 16))
    return found

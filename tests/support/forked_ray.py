"""Ray workers that are forked from a process that has imported what Ray and the pipeline import.

A worker of Ray imports Ray twice and then the pipeline, two to four seconds of CPU time in which nothing is
tested. Within `forking_workers`, a Ray that is started gets this module as the program that sets its workers
up. It asks the server of `support.forked` for a fork, which runs Ray's own worker program. Ray itself is
imported in the fork, since it reads a worker's environment when it is imported.

Workers with other packages or more OpenMP threads than the server has start as ever. The parent of a forked
worker is the server, not the raylet: `pipeline.distributed.parent` is not tested with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.cluster import worker_start

ADDRESS = "XMEM_TESTS_FORKS"
"""Variable with the address of the socket at which workers are forked."""

_SERVERS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
"""Variables of a worker's runtime environment that the server has, too."""


@contextlib.contextmanager
def forking_workers() -> Iterator[None]:
    """Context in which `ray.init` starts a Ray whose workers are forked, by the server at `ADDRESS`."""
    from ray._private.node import Node

    theirs: Any = Node.start_raylet

    def start_raylet(node: Any, *arguments: Any, **options: Any) -> Any:
        node._ray_params.setup_worker_path = str(Path(__file__).resolve())
        return theirs(node, *arguments, **options)

    methods: Any = Node
    methods.start_raylet = start_raylet
    try:
        yield
    finally:
        methods.start_raylet = theirs


def request_of(arguments: list[str]) -> dict[str, Any] | None:
    """The request for a fork; None if the worker needs a start of its own.

    Args:
        arguments: the command line of Ray's program that sets workers up: its own options, the worker's
            program and the worker's options.
    """
    found = worker_start.worker_command(arguments)
    if found is None:
        return None
    (python, program, *rest), variables = found
    if python != sys.executable or not variables.items() <= _SERVERS.items():
        return None
    return {"program": program, "arguments": rest, "cwd": os.getcwd(), "env": {**os.environ, **variables}}


def main(arguments: list[str]) -> None:
    """Have the worker forked; else start it as ever."""
    request = request_of(arguments)
    address = os.environ.get(ADDRESS)
    if request is not None and address is not None:
        content = json.dumps(request).encode()
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as server:
            server.connect(address)
            socket.send_fds(server, [len(content).to_bytes(8, "big")], [0, 1, 2])
            server.sendall(content)
            if server.recv(8):
                return
    worker_start.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])

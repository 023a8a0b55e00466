"""Stands in for the dashboard's agent on a local Ray, where there is no dashboard to serve.

A raylet does not start without this agent: it waits for the files with the agent's ports, and ends if the
agent does. Ray's own takes a second of CPU time to start and serves metrics, logs and jobs that nobody asks
for. This program writes to the files that nothing is served, as Ray's own does if its packages are missing,
and waits for the raylet's end. It uses the standard library only.
"""

import os
import sys
import time

PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
_NOTHING = "-1"
_LOOK_SECONDS = 1.0


def report(folder: str, node: str) -> None:
    """Write to the files of the agent's ports that it serves nothing.

    Args:
        folder: folder of the Ray session.
        node: id of the node, as hexadecimal digits.
    """
    for name in PORTS:
        path = os.path.join(folder, f"{name}_{node}")
        with open(f"{path}.new", "w", encoding="ascii") as file:
            file.write(_NOTHING)
        os.replace(f"{path}.new", path)  # the raylet may be reading


def main(arguments: list[str]) -> None:
    """Report, and wait until the raylet, this process's parent, is gone.

    Args:
        arguments: those of Ray's agent.
    """
    raylet = int(os.environ.get("RAY_RAYLET_PID") or os.getppid())
    given = dict(argument.lstrip("-").split("=", 1) for argument in arguments if "=" in argument)
    report(given["session-dir"], given["node-id"])
    while os.getppid() == raylet:
        time.sleep(_LOOK_SECONDS)


if __name__ == "__main__":
    main(sys.argv[1:])

"""A hub with real cameras and the bundled network, in its own process: live_camera_worker.py OUT [SIZE].

With a size, on one thread with a small memory; without one, with the defaults of `xmem serve`. Reads one
JSON list [method, arguments...] per line and responds with one JSON line: "add", "status", "request",
"remove", "tracks" of a stream, and "exposition" for the Prometheus metrics.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2])]

from pipeline.api.metrics import metrics_text  # noqa: E402
from pipeline.base.errors import XmemError  # noqa: E402
from pipeline.live.hub.hub import HubSettings, LiveHub  # noqa: E402
from pipeline.live.recent import LiveView  # noqa: E402
from pipeline.live.spec import LiveSettings, LiveSpec  # noqa: E402
from pipeline.tracking.settings import TrackSettings  # noqa: E402
from xmem_core import MemoryConfig  # noqa: E402

# Full within a minute, so that growth after that is a leak.
MEMORY = MemoryConfig(max_long_term_elements=1000, num_prototypes=32)


def respond(hub: LiveHub, method: str, arguments: list[Any]) -> Any:
    """Call the method. Named one by one, so that mypy sees a change of the hub."""
    match method:
        case "add":
            values = arguments[0]
            values["settings"] = LiveSettings.from_dict(values.get("settings", {}))
            return hub.add(LiveSpec(**values))
        case "status":
            return hub.status(arguments[0])
        case "request":
            return hub.request(*arguments)
        case "tracks":
            stream_id, since, limit = arguments
            return hub.view(stream_id, LiveView.tracks, since, limit)
        case "remove":
            stream_id, wait = arguments
            return hub.remove(stream_id, wait)
        case "exposition":
            return metrics_text(hub.list(), hub.capacity()).decode()
    raise ValueError(f"method {method!r} is not one of add, status, request, tracks, remove, exposition")


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    tracking = TrackSettings()
    if len(sys.argv) > 2:
        tracking = TrackSettings.of(memory=MEMORY, size=int(sys.argv[2]), threads=1)
    hub = LiveHub(HubSettings(sys.argv[1], tracking=tracking))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        try:
            answer = respond(hub, method, arguments)
        except XmemError as error:
            answer = {"error": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    hub.close()


if __name__ == "__main__":
    main()

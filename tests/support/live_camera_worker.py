"""A hub with real cameras and the bundled network, in its own process: python live_camera_worker.py OUT SIZE.

Reads one JSON list [method, arguments...] per line and responds with one JSON line: `LiveHub`'s methods, and
"exposition" for the Prometheus metrics.
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
from pipeline.live.spec import LiveSettings, LiveSpec  # noqa: E402
from pipeline.tracking.settings import TrackSettings  # noqa: E402
from xmem_core import MemoryConfig  # noqa: E402

# Full within a minute, so that growth after that is a leak.
MEMORY = MemoryConfig(max_long_term_elements=1000, num_prototypes=32)


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    hub = LiveHub(
        HubSettings(sys.argv[1], tracking=TrackSettings.of(memory=MEMORY, size=int(sys.argv[2]), threads=1))
    )
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    answer: Any
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        try:
            if method == "add":
                values = arguments[0]
                values["settings"] = LiveSettings.from_dict(values.get("settings", {}))
                answer = hub.add(LiveSpec(**values))
            elif method == "exposition":
                answer = metrics_text(hub.list(), hub.capacity()).decode()
            else:
                answer = getattr(hub, method)(*arguments)
        except XmemError as error:
            answer = {"error": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    hub.close()


if __name__ == "__main__":
    main()

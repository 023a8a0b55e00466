"""A hub in a separate process, to be killed: python live_hub_worker.py OUT [name=value ...].

Reads one JSON list [method, arguments...] per line, answers with one JSON line. Fake cameras, small network.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from support.live_fake import FakeFeed  # noqa: E402
from support.small_net import SMALL_MEMORY, small_model  # noqa: E402

from pipeline.base.errors import XmemError  # noqa: E402
from pipeline.live.hub.hub import HubSettings, LiveHub  # noqa: E402
from pipeline.live.recent import LiveView  # noqa: E402
from pipeline.live.spec import LiveSettings, LiveSpec  # noqa: E402
from pipeline.tracking.settings import TrackSettings  # noqa: E402
from xmem_core import VideoSegmenter  # noqa: E402


def main() -> None:
    out = sys.argv[1]
    settings = HubSettings(
        out,
        tracking=TrackSettings.of(memory=SMALL_MEMORY, threads=1),
        secrets=out + "-secrets",
        calibrate=False,
    )
    hub = LiveHub(settings, segmenter=VideoSegmenter(small_model(), SMALL_MEMORY), open_feed=FakeFeed)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        try:
            answer: Any
            if method == "add":
                values = arguments[0]
                values["settings"] = LiveSettings.from_dict(values.get("settings", {}))
                answer = hub.add(LiveSpec(**values))
            elif method == "tracks":
                answer = hub.view(arguments[0], LiveView.tracks, *arguments[1:])
            else:
                answer = getattr(hub, method)(*arguments)
        except XmemError as error:
            answer = {"error": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    hub.close()


if __name__ == "__main__":
    main()

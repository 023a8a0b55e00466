"""Follow a live camera in this process: print rows as they come, then ask for them in SQL.

    python examples/live.py rtsp://user:password@10.20.0.31/street --seconds 60
    python examples/live.py rtsp://10.20.0.31/street --box 400,300,40,60

Without a box, the detector `motion` finds what moves. The camera may drop and come back. `xmem serve` does
the same for many cameras, with an HTTP API, a page, and recovery after a crash.
"""

from __future__ import annotations

import argparse
import sys
import time

from pipeline import TrackSettings, query
from pipeline.live.hub.hub import LiveHub
from pipeline.live.hub.settings import HubSettings
from pipeline.live.recent import LiveView
from pipeline.live.spec import LiveSpec


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 if frames of the camera were tracked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", help="rtsp:// or rtsps:// URL of the camera")
    parser.add_argument("--box", help="x,y,w,h on the first frame; default: find what moves")
    parser.add_argument("--seconds", type=float, default=30, help="how long to follow it (default: 30)")
    parser.add_argument("--out", default="live", help="output folder (default: live)")
    parser.add_argument("--secrets", help="folder that keeps the URL's password; default: ~/.xmem/secrets")
    parser.add_argument("--model", default="xmem-lite")
    options = parser.parse_args(arguments)

    box = [float(n) for n in options.box.split(",")] if options.box else None
    spec = LiveSpec(
        "camera",
        options.url,
        prompts={"objects": [{"id": 1, "box": box}]} if box else None,
        detector=None if box else "motion",
    )
    settings = HubSettings(
        options.out, tracking=TrackSettings.of(model=options.model), secrets=options.secrets
    )
    with LiveHub(settings) as hub:
        hub.add(spec)
        end, newest = time.monotonic() + options.seconds, -1
        while (left := end - time.monotonic()) > 0:
            # The newest frame after one that is known; None: none came in time.
            found = hub.view("camera", LiveView.wait, newest, left)
            if found is None:
                continue
            newest = found["seq"]
            for record in found["records"]:
                print(f"frame {newest}: object {record['object_id']} at {record['bbox']}")
        status = hub.remove("camera", wait=30)  # the last rows are committed, and stay

    # Every frame that came is accounted for: dropped and corrupt ones by reason.
    ledger = status["ledger"]
    dropped, corrupt = sum(ledger["dropped"].values()), sum(ledger["corrupt"].values())
    received, tracked = ledger["received"], ledger["tracked"]
    print(f"{received} frames received = {tracked} tracked + {dropped} dropped + {corrupt} corrupt")
    if newest < 0:
        print(f"no frame came: {status['cause']}")
        return 1
    rows = query(options.out, "SELECT kind, count(*) AS n FROM events GROUP BY kind ORDER BY kind")
    for row in rows.to_pylist():
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())

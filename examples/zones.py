"""Ask an output folder who stayed in a zone for how long, and who crossed a line.

    python examples/zones.py tracks zones.json
    python examples/zones.py tracks --zone "door=100,200 300,200 300,400 100,400" --line "kerb=0,300 640,300"

The zones may be drawn long after the videos were tracked: only rows are read, no video is decoded.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from pipeline import ZoneSet, load_zones, query, zone_views
from pipeline.zones.config import parse_zones

QUESTIONS = {
    "Who stayed in which zone for how long?": """
        SELECT stream_id, zone, object_id, category, round(dwell_seconds, 2) AS seconds, state
        FROM visits ORDER BY dwell_seconds DESC LIMIT 10
    """,
    "How full was each zone, period by period?": """
        SELECT stream_id, zone, begin_seconds, begin_time, round(mean_objects, 2) AS mean, max_objects AS most
        FROM occupancy ORDER BY ALL LIMIT 20
    """,
    "How often was each line crossed, and in which direction?": """
        SELECT stream_id, line, direction, count(*) AS crossings, round(avg(speed_pixels), 1) AS speed
        FROM crossings GROUP BY ALL ORDER BY ALL
    """,
    "Who is tracked and was in no zone?": """
        SELECT DISTINCT stream_id, object_id FROM tracks
        ANTI JOIN visits USING (stream_id, object_id)
        ORDER BY ALL LIMIT 10
    """,
}


def drawn(zones: list[str], lines: list[str]) -> ZoneSet:
    """Zones and lines from NAME=X,Y X,Y ... texts."""

    def entry(text: str) -> tuple[str, list[Any]]:
        name, _, points = text.partition("=")
        return name, [[float(number) for number in point.split(",")] for point in points.split()]

    polygons = [{"name": name, "polygon": points} for name, points in map(entry, zones)]
    ends = [{"name": name, "from": points[0], "to": points[-1]} for name, points in map(entry, lines)]
    return parse_zones({"zones": polygons, "lines": ends})


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask an output folder about zones and lines.")
    parser.add_argument("folder", help="output folder")
    parser.add_argument("file", nargs="?", help="zones file (xmem schema zones)")
    parser.add_argument("--zone", action="append", default=[], metavar="NAME=X,Y X,Y X,Y ...")
    parser.add_argument("--line", action="append", default=[], metavar="NAME=X,Y X,Y")
    parser.add_argument("--period", type=float, default=60.0, help="seconds of a row of the second answer")
    given = parser.parse_args()
    zones = load_zones(given.file) if given.file else drawn(given.zone, given.line)
    views = zone_views(given.folder, zones, period_seconds=given.period, inside=False)
    for question, sql in QUESTIONS.items():
        print(question)
        rows = query(given.folder, sql, tables=views).to_pylist()
        for row in rows or ["none"]:
            print(f"    {row}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

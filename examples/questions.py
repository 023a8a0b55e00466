"""Ask an output folder questions in SQL (DuckDB) over the views `tracks`, `events` and `streams`.

    python examples/questions.py tracks
    python examples/questions.py s3://results/tracks --sql "SELECT stream_id, state FROM streams"

The folder may be written to meanwhile: each question sees what is committed when it is asked.
"""

from __future__ import annotations

import argparse
import sys

from pipeline import query

QUESTIONS = {
    "How long was each object in sight?": """
        SELECT stream_id, object_id, any_value(category) AS category, count(*) AS frames,
               min(frame_index) AS first_frame, max(frame_index) AS last_frame
        FROM tracks WHERE area > 0 GROUP BY ALL ORDER BY ALL
    """,
    "How many objects are in the picture, second by second?": """
        SELECT stream_id, floor(pts_seconds)::INT AS second, count(DISTINCT object_id) AS objects
        FROM tracks WHERE area > 0 GROUP BY ALL ORDER BY ALL LIMIT 20
    """,
    "How fast is each object, in pixels per frame?": """
        WITH steps AS (
            SELECT stream_id, object_id,
                   sqrt(pow(centroid_x - lag(centroid_x) OVER track, 2)
                        + pow(centroid_y - lag(centroid_y) OVER track, 2))
                       / (frame_index - lag(frame_index) OVER track) AS speed
            FROM tracks WHERE area > 0
            WINDOW track AS (PARTITION BY stream_id, object_id ORDER BY frame_index)
        )
        SELECT stream_id, object_id, round(median(speed), 1) AS median, round(max(speed), 1) AS fastest
        FROM steps GROUP BY ALL ORDER BY ALL
    """,
    "When was each object out of sight?": """
        WITH marked AS (
            SELECT stream_id, object_id, frame_index, area,
                   frame_index - row_number() OVER (
                       PARTITION BY stream_id, object_id, area > 0 ORDER BY frame_index) AS spell
            FROM tracks
        )
        SELECT stream_id, object_id, min(frame_index) AS gone, max(frame_index) AS until
        FROM marked WHERE area = 0 GROUP BY stream_id, object_id, spell ORDER BY ALL LIMIT 20
    """,
    "What else happened?": """
        SELECT stream_id, kind, reason, count(*) AS events FROM events GROUP BY ALL ORDER BY ALL
    """,
    "What are the streams?": """
        SELECT stream_id, state, next_frame AS frames, width, height, model FROM streams ORDER BY stream_id
    """,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", help="output folder: a path or any fsspec URI")
    parser.add_argument("--sql", action="append", help="a question of your own instead; repeatable")
    options = parser.parse_args(arguments)

    for title, sql in [(sql, sql) for sql in options.sql or []] or QUESTIONS.items():
        print(title)
        rows = query(options.out, sql).to_pylist()  # `query` returns a pyarrow.Table; .to_pandas() works too
        for row in rows:
            print("   ", ", ".join(f"{name}={value}" for name, value in row.items()))
        if not rows:
            print("    none")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A writer in a separate process, to be killed or raced.

python store_worker.py ROOT END CHUNK SALT [OPTIONS] commits frames 0..END - 1 as a tracker would (prepare,
committed, snapshots, record) once it reads "go", and prints the next frame after each chunk. PYTHONPATH
leads to the repository and tests/.
"""

import json
import sys

from support.chunks import NO_EVENTS, events, rows

from pipeline.base.errors import AnotherWriterError
from pipeline.tracks.store import StreamStore


def say(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def main() -> int:
    root, end, chunk, salt = sys.argv[1], *(int(a) for a in sys.argv[2:5])
    store = StreamStore(root, "cam-1", json.loads(sys.argv[5]) if len(sys.argv) > 5 else None)
    store.prepare()
    frame = store.committed().next_frame
    found = store.load_snapshot(frame, bytes)
    if found is not None and found[1] != b"state %d" % found[0] * 50_000:
        return 5
    say("ready")
    if sys.stdin.readline() != "go\n":
        return 6
    try:
        while frame < end:
            last = min(frame + chunk, end) - 1
            store.commit(
                frame, last, rows(frame, last, salt), events(frame, salt) if frame % 3 else NO_EVENTS
            )
            say(last + 1)
            frame = last + 1
            store.save_snapshot(frame, b"state %d" % frame * 50_000)
            store.write_record({"state": "running", "next_frame": frame, "padding": "x" * 5000})
    except AnotherWriterError as error:
        say(error)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())

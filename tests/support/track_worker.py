"""Tracks a video in a separate process, to be killed: python track_worker.py JSON.

JSON: the arguments of `pipeline.tracking.files.track.track`, prompts as the content of a prompts file. Prints
"go" once it is loaded.
"""

import json
import sys

from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.files.track import track
from xmem_core import MemoryConfig


def main() -> None:
    arguments = json.loads(sys.argv[1])
    arguments["prompts"] = PromptSet.from_record(arguments["prompts"])
    arguments["memory"] = MemoryConfig(**arguments["memory"])
    sys.stdout.write("go\n")
    sys.stdout.flush()
    track(arguments.pop("video"), arguments.pop("out"), arguments.pop("prompts"), **arguments)


if __name__ == "__main__":
    main()

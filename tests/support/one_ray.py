"""The order of pytest-xdist's `--dist loadfile` with the files that share a Ray on one worker.

To start the Ray of `local_ray`, and the processes that its workers are forked from, takes six seconds of CPU
time on each worker that has one of these files.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from xdist.scheduler import LoadFileScheduling

SHARED = "files with local_ray"
_USED = re.compile(r"usefixtures\([^)]*\"local_ray\"|\blocal_ray: None")


@cache
def uses_local_ray(path: Path) -> bool:
    """Whether the tests of a file, or their fixtures, ask for the fixture `local_ray`."""
    return path.is_file() and bool(_USED.search(path.read_text(encoding="utf-8")))


class OneRay(LoadFileScheduling):  # type: ignore[misc]
    """Gives a worker one file after the other, and the files with `local_ray` as if they were one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return SHARED if uses_local_ray(self.config.rootpath / file) else file

"""Makes this checkout's packages and the helper modules beside this file importable from every test."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from servers import s3_server  # noqa: E402, F401

# A busy machine is no fault of the code: no test is judged by the clock.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

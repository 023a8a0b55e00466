"""Makes the helper modules beside this file (`videos`, ...) importable from every test."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from servers import s3_server  # noqa: F401

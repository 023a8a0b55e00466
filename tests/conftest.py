"""Makes this checkout and the helper modules beside this file importable; fixtures that many tests share."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from servers import s3_server  # noqa: E402, F401

# Before any test imports torch: see `xmem_core.openmp`.
import xmem_core as _core  # noqa: E402, F401

# A busy machine is no fault of the code: no test is judged by the clock.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


# torch is imported by the fixtures: most of the tests do without it.


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread: with small tensors several only wait for each other, and bits depend on their number."""
    from threads import torch_threads

    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of a tiny model, see `tiny.tiny_weights`."""
    from tiny import tiny_weights

    return tiny_weights(tmp_path_factory.mktemp("model"))

"""Alias of the public face of `pipeline`, for projects that have a folder of that name.

    from xmem_pipeline import query, track

A program with a folder or module `pipeline` of its own cannot import the installed one by that name: Python
finds the program's first. This package loads the installed one from beside its own folder and enters it as
`pipeline`, so that its modules find each other. From then on `pipeline` is the installed package in this
process, and the program's own cannot be imported. If that was imported before, importing this one is an
ImportError.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline import *  # noqa: F403


def _installed() -> ModuleType:
    """The package `pipeline` of this distribution."""
    folder = Path(__file__).resolve().parents[1] / "pipeline"
    module = sys.modules.get("pipeline")
    if module is not None:
        paths = {Path(path).resolve() for path in getattr(module, "__path__", ())}
        if folder in paths:
            return module
        where = getattr(module, "__file__", None) or ", ".join(map(str, paths))
        raise ImportError(
            f"another package 'pipeline' ({where}) is imported already, and one process can have only one: "
            "import xmem_pipeline before it, or rename it",
            name="pipeline",
        )
    spec = spec_from_file_location(
        "pipeline", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None or not (folder / "__init__.py").is_file():
        raise ImportError(f"the package 'pipeline' is not at {folder}: install xmem-pipeline again")
    module = module_from_spec(spec)
    sys.modules["pipeline"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["pipeline"]
        raise
    return module


_pipeline = _installed()

if not TYPE_CHECKING:
    __all__ = list(_pipeline.__all__)

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(_pipeline, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

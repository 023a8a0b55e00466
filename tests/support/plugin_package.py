"""Installs the example plugins of tests/plugins as a package, and runs processes that have it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tests" / "plugins" / "xmem_example_plugins"


def install(folder: Path) -> Path:
    """Install the package with pip, offline, into a new folder for PYTHONPATH."""
    source, target = folder / "source", folder / "installed"
    # From a copy: setuptools leaves build folders beside the sources.
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    offline = ["--no-deps", "--no-build-isolation", "--target", str(target), str(source)]
    done = subprocess.run([*pip, *offline], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return target


def python(installed: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the package of that folder, and this checkout, on its path."""
    paths = os.pathsep.join(map(str, (installed, ROOT)))
    known = dict(os.environ, PYTHONPATH=paths, **environment)
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=known)

"""Ships this package's code to a cluster's workers (Ray runtime environments)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jobs
import pipeline
import xmem_core

PACKAGES = (xmem_core, pipeline, jobs)
_EXCLUDES = ("__pycache__/", "*.pyc")
# Variable that Ray sets in the process of a submitted job, which has the packages already.
_JOB_MARK = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def package_folders() -> list[str]:
    """Folders of the packages, bundled model included, in a checkout or an installed wheel."""
    return [str(Path(package.__path__[0]).resolve()) for package in PACKAGES]


def runtime_env() -> dict[str, Any]:
    """Ray `runtime_env` that makes workers import these packages, whatever is installed there."""
    return {"py_modules": package_folders(), "excludes": list(_EXCLUDES)}


def is_submitted_job() -> bool:
    """Whether this process was started by Ray's Jobs API, and its workers inherit the packages."""
    return _JOB_MARK in os.environ

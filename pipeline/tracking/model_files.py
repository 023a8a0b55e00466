"""Finds a model's weights, and reports it where they cannot be had. Without torch, for drivers."""

from __future__ import annotations

from pathlib import Path

from pipeline.base.errors import UsageError, XmemError
from xmem_core.weight_files import MODEL_NAMES, Progress, WeightsError, find_weights


def find_model(name: str, progress: Progress | None = None) -> Path:
    """Path of a model's weights; published ones are downloaded if they are not cached.

    Args:
        progress: called with the bytes received and expected during a download.

    Raises:
        UsageError: there is no such model or file. XmemError: the download failed.
    """
    try:
        return find_weights(name, progress=progress)
    except WeightsError as error:
        raise weights_failure(name, error) from error


def weights_failure(model: str, error: WeightsError) -> XmemError:
    """The error to report: a name or file that was given is a request, a known model's absence a failure."""
    return XmemError(str(error)) if model in MODEL_NAMES else UsageError(str(error))

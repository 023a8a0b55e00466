"""Batch jobs, evaluation and the `xmem` command."""

# Imported for what it does before torch is: see `xmem_core.openmp`.
import xmem_core as _core  # noqa: F401

"""One stream from source to Parquet: decoding, prompts, tracking, commits, queries and overlays."""

# Imported for what it does before torch is: see `xmem_core.openmp`.
import xmem_core as _core  # noqa: F401

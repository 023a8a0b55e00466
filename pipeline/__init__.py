"""Follows objects through video: tracking, mask tracks in Parquet, SQL, overlays.

    from pipeline import gather_prompts, query, render, track

    track("match.mp4", "tracks", gather_prompts(boxes=["412,230,64,170:7:player"]))
    query("tracks", "select frame_index, area from tracks where object_id = 7")
    render("match.mp4", "tracks", "overlay.mp4")

These names are the public face. Each is imported when it is first used: `query` loads no torch, `track` no
Ray. `xmem_pipeline` has the same names, for programs that have a folder `pipeline` of their own.
"""

from importlib import import_module
from typing import TYPE_CHECKING

# Imported for what it does before torch is: see `xmem_core.openmp`.
import xmem_core as _core  # noqa: F401

if TYPE_CHECKING:
    from pipeline.analytics.archive import Archive, open_archive
    from pipeline.analytics.query import connect, query
    from pipeline.analytics.zones import query_zones, zone_views
    from pipeline.base.errors import (
        AnotherWriterError,
        PromptError,
        SettingsConflictError,
        SourceError,
        StoreError,
        UsageError,
        XmemError,
    )
    from pipeline.base.records import Frame, MaskRecord
    from pipeline.detect.protocol import Detection, Detector
    from pipeline.distributed.ray_data import TrackVideos
    from pipeline.draw.render import render
    from pipeline.memory.editing import edit_memory
    from pipeline.memory.memory_reads import MemoryReads, memory_reads
    from pipeline.memory.stream_memory import StreamMemory, stream_memory, write_thumbnails
    from pipeline.plots.stream_report import plot
    from pipeline.prompts.box_segmenters import BoxSegmenter
    from pipeline.prompts.files import PromptSet, gather_prompts, load_prompts
    from pipeline.tracking.files.track import track
    from pipeline.tracking.settings import CommitSettings, DetectorSettings, ModelSettings, TrackSettings
    from pipeline.tracking.snapshots.object_states import prompts_from_state
    from pipeline.tracking.stream_record import StreamSummary
    from pipeline.tracks.reader import TrackReader, open_tracks
    from pipeline.tracks.sinks import Sink
    from pipeline.video.plugin_video import Source
    from pipeline.video.sources import VideoSource, open_source
    from pipeline.zones.config import ZoneSet, load_zones
    from xmem_core import MemoryConfig

__all__ = [
    "AnotherWriterError",
    "Archive",
    "BoxSegmenter",
    "CommitSettings",
    "Detection",
    "Detector",
    "DetectorSettings",
    "Frame",
    "MaskRecord",
    "MemoryConfig",
    "MemoryReads",
    "ModelSettings",
    "PromptError",
    "PromptSet",
    "SettingsConflictError",
    "Sink",
    "Source",
    "SourceError",
    "StoreError",
    "StreamMemory",
    "StreamSummary",
    "TrackReader",
    "TrackSettings",
    "TrackVideos",
    "UsageError",
    "VideoSource",
    "XmemError",
    "ZoneSet",
    "connect",
    "edit_memory",
    "gather_prompts",
    "load_prompts",
    "load_zones",
    "memory_reads",
    "open_archive",
    "open_source",
    "open_tracks",
    "plot",
    "prompts_from_state",
    "query",
    "query_zones",
    "render",
    "stream_memory",
    "track",
    "write_thumbnails",
    "zone_views",
]

if not TYPE_CHECKING:
    _NAMES = {
        "analytics.archive": ("Archive", "open_archive"),
        "analytics.query": ("connect", "query"),
        "analytics.zones": ("query_zones", "zone_views"),
        "base.errors": (
            "AnotherWriterError",
            "PromptError",
            "SettingsConflictError",
            "SourceError",
            "StoreError",
            "UsageError",
            "XmemError",
        ),
        "base.records": ("Frame", "MaskRecord"),
        "detect.protocol": ("Detection", "Detector"),
        "distributed.ray_data": ("TrackVideos",),
        "draw.render": ("render",),
        "memory.editing": ("edit_memory",),
        "memory.memory_reads": ("MemoryReads", "memory_reads"),
        "memory.stream_memory": ("StreamMemory", "stream_memory", "write_thumbnails"),
        "plots.stream_report": ("plot",),
        "prompts.box_segmenters": ("BoxSegmenter",),
        "prompts.files": ("PromptSet", "gather_prompts", "load_prompts"),
        "tracking.snapshots.object_states": ("prompts_from_state",),
        "tracking.settings": (
            "CommitSettings",
            "DetectorSettings",
            "MemoryConfig",
            "ModelSettings",
            "TrackSettings",
        ),
        "tracking.stream_record": ("StreamSummary",),
        "tracking.files.track": ("track",),
        "tracks.reader": ("TrackReader", "open_tracks"),
        "tracks.sinks": ("Sink",),
        "video.plugin_video": ("Source",),
        "video.sources": ("VideoSource", "open_source"),
        "zones.config": ("ZoneSet", "load_zones"),
    }
    _MODULES = {name: module for module, names in _NAMES.items() for name in names}

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"pipeline.{_MODULES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

"""Settings of tracking: model, memory, detector and commits. Each is defined here, once.

They are nested in `TrackSettings` and handed through whole: by the command line and the HTTP API to a batch,
a live hub or a Ray Data stage, from there to the trackers, and into the stream record. To add an option, add
a field to one of these classes (limits in `setting`, help in the docstring) and, for a typed keyword of
`pipeline.tracking.files.track.track`, its name to `TrackOptions`. Commands, API limits and records follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from pipeline.base.errors import UsageError
from pipeline.base.picture_size import MAX_PIXELS
from pipeline.base.setting_fields import (
    MAX_SIZE,
    MIN_SIZE,
    Option,
    check,
    from_flat,
    options_of,
    recorded,
    setting,
)
from pipeline.detect.settings import FinderSettings
from pipeline.video.torchcodec_decoding import AV, DECODERS
from xmem_core.config import MemoryConfig

if TYPE_CHECKING:
    from xmem_core import VideoSegmenter

FORWARD, BACKWARD, BOTH = "forward", "backward", "both"
DIRECTIONS = (FORWARD, BACKWARD, BOTH)
DTYPES = ("float32", "bfloat16", "float16")
AUTO = "auto"
"""Value of `dtype` that selects one of `DTYPES` by machine and model, see
`pipeline.tracking.segmenters.open_segmenter`."""


def dtype_name(segmenter: VideoSegmenter) -> str:
    """The precision of a segmenter, as one of `DTYPES`."""
    return str(segmenter.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class ModelSettings:
    """The network, and where and how it runs.

    Args:
        name: network: xmem-lite, xmem, xmem-s012, xmem-s2, xmem-no-sensory, cutie-base, cutie-small, or a
            file.
        size: shorter side of the network's input, in pixels; 0: frames are not resized. Default: the model's.
        small_size: size if an object is small: if a mask of the first frame with prompts has a longer side of
            less than 64 pixels at `size`. Not with a detector, nor for cameras. 0: the same as `size`.
            Default: the model's (xmem-lite: 512) if no `size` is given.
        full_size: do not resize frames; the same as a size of 0.
        device: device that the network runs on: cpu, cuda, cuda:1, ...
        dtype: precision of the network: float32, bfloat16, float16, or auto: float16 on a GPU, bfloat16 if
            the CPU has AMX, float32 for the published models. With auto, a resumed stream keeps its
            precision.
        threads: CPU threads of the network. Default: for a resumed stream, its previous number, else as many
            as the process or machine has. The number of threads affects the last bits of the results.
        compile: compile the network with torch.compile (on a GPU into CUDA graphs), which takes up to a
            minute for each size and number of objects. Needs a compiler on the machine; on a CPU objects are
            then searched in whole frames. Affects the last bits of the results.
    """

    name: str = setting("xmem-lite", flat="model", decisive=False)
    size: int | None = setting(None, least=MIN_SIZE, most=MAX_SIZE)
    small_size: int | None = setting(None, least=0, most=MAX_SIZE, later=True)
    full_size: bool = setting(False, recorded=False)
    device: str = setting("cpu", recorded=False)
    dtype: str = setting(AUTO, choices=(*DTYPES, AUTO))
    threads: int | None = setting(None, least=1)
    compile: bool = setting(False, later=True)

    def __post_init__(self) -> None:
        if self.size == 0 and not isinstance(self.size, bool):
            object.__setattr__(self, "size", None)
            object.__setattr__(self, "full_size", True)
        check(self)
        if self.small_size and self.small_size < MIN_SIZE:
            raise UsageError(
                f"small_size={self.small_size} is not allowed: {MIN_SIZE} or more, or 0 for the same as size"
            )


@dataclass(frozen=True)
class DetectorSettings:
    """The detector that finds new objects, and when these start and end.

    Args:
        name: detector that finds new objects: people, motion, file:PATH (detections in MOT text or CSV),
            onnx:FILE (an exported detection network), or the name of an installed plugin. Default: none.
        finder: when detected objects start and end.
    """

    name: str | None = setting(None, flat="detector")
    finder: FinderSettings = field(default_factory=FinderSettings)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class CommitSettings:
    """How a stream's rows are committed: chunks, snapshots, limits and sinks.

    Args:
        chunk_frames: frames per commit.
        snapshot_chunks: commits between two snapshots of the tracker's state.
        max_frames: stop after this many frames. Default: the end of the video.
        max_pixels: reject pictures with more pixels than this (width x height) before they are decoded.
        box_segmenter: what converts boxes to masks: xmem-click (a small network), grabcut (OpenCV), or an
            installed plugin.
        sinks: plugin that also receives the rows, by name; repeatable.
        decoder: what decodes video files: av (PyAV, on the CPU), or torchcodec, on the network's device: by
            NVDEC on a GPU, where images stay. Frames have the same numbers and times; images differ by
            rounding. PyAV decodes what torchcodec cannot.
        keep_state: save a snapshot at the end of the video, from which its objects are found in other videos.
    """

    chunk_frames: int = setting(100, least=1)
    # Not decisive: the snapshot interval does not affect rows.
    snapshot_chunks: int = setting(4, least=1, decisive=False)
    # Not decisive: a stream may be resumed with a larger limit, see `pipeline.tracking.files.stream_tracker`.
    max_frames: int | None = setting(None, least=1, decisive=False)
    max_pixels: int = setting(MAX_PIXELS, least=1, recorded=False)
    box_segmenter: str = setting("xmem-click")
    sinks: tuple[str, ...] = setting((), recorded=False)
    # Not recorded, as the device is not: images differ by rounding.
    decoder: str = setting(AV, choices=DECODERS, recorded=False)
    keep_state: bool = setting(True, recorded=False)

    def __post_init__(self) -> None:
        if isinstance(self.sinks, list):
            object.__setattr__(self, "sinks", tuple(self.sinks))
        check(self)


class TrackOptions(TypedDict, total=False):
    """Tracking settings by flat name, as keyword arguments of `track` and `TrackSettings.of`."""

    model: str
    size: int | None
    small_size: int | None
    full_size: bool
    device: str
    dtype: str
    threads: int | None
    compile: bool
    memory: MemoryConfig | None
    detector: str | None
    detect_every: int
    detect_confirmations: int
    detect_score: float
    give_up_looks: int
    detect_span: int
    max_objects: int
    out_of_sight_frames: int
    detect_classes: str | None
    kept_for_prompts: int
    chunk_frames: int
    snapshot_chunks: int
    max_frames: int | None
    max_pixels: int
    box_segmenter: str
    sinks: Sequence[str]
    decoder: str
    keep_state: bool
    direction: str


@dataclass(frozen=True)
class TrackSettings:
    """Settings of a stream as requested; `of_segmenter` resolves defaults for the stream record.

    Args:
        model: the network and where it runs.
        memory: memory settings.
        commit: chunks, snapshots, sinks.
        detector: the detector that finds new objects.
        direction: where objects are tracked from their prompts: forward, to the end of the video; backward,
            from their first prompt to the beginning; or both. Detected objects have no rows before their
            detection.
        model_fingerprint: fingerprint of the model's weights; "" until they are loaded.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    commit: CommitSettings = field(default_factory=CommitSettings)
    detector: DetectorSettings = field(default_factory=DetectorSettings)
    direction: str = setting(FORWARD, choices=DIRECTIONS, later=True)
    model_fingerprint: str = field(default="", metadata={"option": False})

    def __post_init__(self) -> None:
        check(self)
        if self.direction == BACKWARD and self.detector.name is not None:
            raise UsageError(
                f"direction={BACKWARD!r} is not allowed with a detector, whose objects have no earlier "
                f"frames: use {BOTH!r}, or leave the detector out"
            )

    @classmethod
    def of(cls, **options: Unpack[TrackOptions]) -> TrackSettings:
        """Build from flat names: `TrackSettings.of(model="xmem", detect_every=10)`. See `with_options`."""
        return cls().with_options(options)

    def with_options(self, options: Mapping[str, Any]) -> TrackSettings:
        """Copy of these settings with some replaced by flat name, memory settings included.

        Raises:
            UsageError: a name is unknown, or a value not allowed.
        """
        given = dict(options)
        memory = given.pop("memory", None)
        if "sinks" in given:
            given["sinks"] = tuple(given["sinks"] or ())
        return from_flat(self if memory is None else replace(self, memory=memory), given)

    def of_segmenter(self, segmenter: VideoSegmenter, threads: int) -> TrackSettings:
        """Resolved settings for the stream record, available once the model is loaded.

        Args:
            segmenter: segmenter made from these settings; provides the actual size, precision and memory.
            threads: CPU threads that the network runs with.
        """
        model = replace(
            self.model,
            size=segmenter.size,
            small_size=self._small_size(segmenter),
            full_size=segmenter.size is None,
            dtype=dtype_name(segmenter),
            threads=threads,
        )
        return replace(
            self, model=model, memory=segmenter.memory_config, model_fingerprint=segmenter.fingerprint
        )

    def _small_size(self, segmenter: VideoSegmenter) -> int | None:
        """The size for small objects; None if it is that of all."""
        asked, size = self.model.small_size, segmenter.size
        if size is None or self.detector.name is not None:
            return None
        if asked is None and self.model.size is None:
            asked = segmenter.config.default_small_size
        return asked if asked and asked > size else None

    @property
    def threads(self) -> int:
        """CPU threads of the network; 1 if not set."""
        return self.model.threads or 1

    def to_dict(self) -> dict[str, Any]:
        """Flat, JSON-ready dict for the stream record. Device and sinks are not included."""
        values = recorded(self, _RECORDED)
        first = {"model": values.pop("model"), "model_fingerprint": self.model_fingerprint}
        return {**first, "memory": self.memory.to_dict(), **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrackSettings:
        """Build from `to_dict`'s output; UsageError for unknown names and values that are not allowed."""
        given = dict(values)
        fingerprint = str(given.pop("model_fingerprint", ""))
        memory = MemoryConfig.from_dict(given.pop("memory", {}))
        full_size = given.get("size") is None
        settings = cls(memory=memory, model_fingerprint=fingerprint).with_options(given)
        return replace(settings, model=replace(settings.model, full_size=full_size))

    def decisive(self) -> dict[str, Any]:
        """The settings that affect rows, as a flat dict."""
        return _decisive(self.to_dict())

    def as_begun(self, stored: Mapping[str, Any]) -> TrackSettings:
        """These settings, with the defaults that a stream was begun with.

        That is GrabCut, if it was the default then and none is named, and one size for all objects, if there
        was no other.

        Args:
            stored: settings of the stream's record.
        """
        begun, former = self, stored.get("box_segmenter")
        if former == _FORMER_BOXES and self.commit.box_segmenter == CommitSettings().box_segmenter:
            begun = replace(begun, commit=replace(begun.commit, box_segmenter=former))
        if stored.get("small_size") is None and self.model.small_size is not None:
            begun = replace(begun, model=replace(begun.model, small_size=None))
        return begun

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """Differences to the settings of a record, one phrase each; only settings that affect rows.

        A stream goes on with the defaults that it was begun with, see `as_begun`.
        """
        own, other = _DEFAULTS | self.as_begun(stored).decisive(), _DEFAULTS | _decisive(stored)
        return [
            f"{name} was {other.get(name)!r}, now {own.get(name)!r}"
            for name in sorted(set(own) | set(other))
            if own.get(name) != other.get(name)
        ]


def track_options() -> tuple[Option, ...]:
    """All options of tracking, as commands offer them."""
    return options_of(TrackSettings)


NOT_LIVE = {
    "detector": "each stream of the API names its own, of those that --allow-detector names",
    "full_size": "a size of 0 says the same",
    "small_size": "the load that a camera is admitted with is that of one size",
    "chunk_frames": "a live stream's rows are committed after rotate_seconds or rotate_rows",
    "snapshot_chunks": "a live stream's snapshots follow after snapshot_seconds",
    "max_frames": "a camera has no end",
    "keep_state": "a camera has no end",
    "decoder": "a camera's packets are decoded by PyAV, which tells damaged pictures",
    "max_pixels": "cameras have a limit of their own, see LiveOptions",
    "direction": "a camera's earlier frames are gone",
}
"""Tracking options that a live hub does not offer, and why."""

_RECORDED = tuple(o for o in track_options() if o.path[0] != "memory" and o.metadata.get("recorded", True))
# The model's name may differ (a file name, for instance): its fingerprint is compared instead.
_INDIFFERENT = tuple(o.name for o in _RECORDED if not o.metadata.get("decisive", True))
# Left out of records while they have their default.
_DEFAULTS = {"direction": FORWARD, "small_size": None, "compile": False}
# The default box segmenter of earlier versions.
_FORMER_BOXES = "grabcut"
# Ignored without a detector, so that records written before detectors existed still match.
_OF_DETECTOR = tuple(o.name for o in _RECORDED if o.path[0] == "detector")


def _decisive(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    without = _OF_DETECTOR if values.get("detector") is None else ()
    for name, value in values.items():
        if name in _INDIFFERENT or name in without:
            continue
        if isinstance(value, Mapping):
            flat.update({f"{name}.{inner}": v for inner, v in value.items()})
        else:
            flat[name] = value
    return flat

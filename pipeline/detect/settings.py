"""Settings of detected objects: when they are started and when they are given up."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.base.errors import UsageError
from pipeline.base.setting_fields import check, setting

SOON = 5
"""Objects were out of sight for long after this share (one in five) of `out_of_sight`."""


@dataclass(frozen=True)
class FinderSettings:
    """When detected objects start and end.

    Args:
        every: frames between two runs of the detector; half as many while a detection is to be confirmed.
        confirmations: detections that are needed before an object is started; twice as many while it touches
            the frame's edge, so that objects are whole when they start.
        max_objects: maximum number of objects at the same time, objects from prompts included. At this number
            the detector starts no new objects.
        out_of_sight: frames without a mask after which a detected object ends; a fifth of that while
            `max_objects` is reached, a twenty-fifth if it left the picture.
        classes: classes whose detections may start objects, separated by commas, such as person,car. Default:
            all detections may, those without a class included.
        least_score: detections with a smaller score only confirm objects, they start none.
        give_up_looks: runs of the detector in a row that search where an object is and do not detect it,
            after which it ends; three times as many while its mask moves on as one thing and is inside
            another object's detection, or it was detected often.
        span: frames that runs of the detector must be apart to count one by one among `give_up_looks`; half
            as many among `confirmations`, if `every` is smaller than that. Frames that are closer look nearly
            the same: what is missed on one of them is missed on the next one, too.
        kept_for_prompts: number of the `max_objects` that the detector leaves free for prompts.
    """

    every: int = setting(5, least=1, most=100_000, flat="detect_every")
    confirmations: int = setting(3, least=1, most=1000, flat="detect_confirmations")
    max_objects: int = setting(8, least=1, most=256)
    out_of_sight: int = setting(250, least=1, most=10_000_000, flat="out_of_sight_frames")
    classes: str | None = setting(None, flat="detect_classes", later=True)
    least_score: float = setting(0.5, least=0.0, most=1.0, flat="detect_score", later=True)
    give_up_looks: int = setting(4, least=1, most=100_000, later=True)
    span: int = setting(5, least=1, most=100_000, flat="detect_span", later=True)
    kept_for_prompts: int = setting(0, least=0, most=255, later=True)

    def __post_init__(self) -> None:
        check(self)
        if self.classes is not None and not all(part.strip() for part in self.classes.split(",")):
            raise UsageError(
                f"detect_classes={self.classes!r} is not allowed: give names of classes, separated by "
                "commas, such as person,car"
            )

    @property
    def long_unseen(self) -> int:
        """Frames after which an object was out of sight for long."""
        return max(1, self.out_of_sight // SOON)

    @property
    def wanted(self) -> frozenset[str] | None:
        """The classes whose detections may start objects; None: all."""
        if self.classes is None:
            return None
        return frozenset(part.strip() for part in self.classes.split(","))

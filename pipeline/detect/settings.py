"""Settings of detected objects: when they are started and given up."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.base.setting_fields import check, setting


@dataclass(frozen=True)
class FinderSettings:
    """When objects are started and given up.

    Args:
        every: frames from one look of the detector to the next.
        confirmations: looks that must find a thing before it becomes an object; twice as many while it
            reaches beyond the frame's edge, so that objects are started whole.
        max_objects: with so many objects at the same time, those of prompts included, the detector starts no
            further one.
        out_of_sight: frames without a pixel after which an object that the detector started is given up; a
            fifth of them, while there is no room for new ones.
    """

    every: int = setting(5, least=1, most=100_000, flat="detect_every")
    confirmations: int = setting(3, least=1, most=1000, flat="detect_confirmations")
    max_objects: int = setting(8, least=1, most=256)
    out_of_sight: int = setting(250, least=1, most=10_000_000, flat="out_of_sight_frames")

    def __post_init__(self) -> None:
        check(self)

"""Recipe: what the rows of an annotated stream depend on besides its video and its fixed settings.

Prompts and edits of the memory act from their frame on, so that a change re-tracks only from there. Settings
of the memory belong to the whole stream, as they do with `xmem track`: a change re-tracks from frame 0. So
the rows are always those that `xmem track` writes with the same prompts, edits and settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pipeline.base.errors import StoreError, UsageError
from pipeline.prompts.files import PromptSet
from pipeline.storage.files import Files
from pipeline.tracking.files.backward import BackwardPlan
from pipeline.tracking.settings import FORWARD, TrackSettings
from pipeline.tracking.snapshots.memory_edit import COPY, MemoryEdit, planned_edits
from pipeline.tracks.edit_log import EditLog
from pipeline.tracks.store import StreamStore
from xmem_core.config import MemoryConfig

CHANGEABLE = (
    "mem_every",
    "min_mid_term_frames",
    "max_mid_term_frames",
    "max_long_term_elements",
    "num_prototypes",
    "top_k",
)
"""Fields of `MemoryConfig` that can be changed while annotating."""

Edits = Mapping[int, tuple[MemoryEdit, ...]]
"""Edits of the memory by the frame before which they are made, in their order."""


@dataclass(frozen=True)
class Recipe:
    """Prompts, edits of the memory, the settings of `CHANGEABLE`, and where objects are tracked."""

    prompts: PromptSet
    edits: Edits = field(default_factory=dict)
    memory: Mapping[str, int | None] = field(default_factory=dict)
    direction: str = FORWARD

    def first_change(self, other: Recipe) -> int | None:
        """The first frame whose rows may differ between two recipes; None if all are equal.

        A change of what a backward pass tracks may change the rows of every frame.
        """
        if dict(self.memory) != dict(other.memory):
            return 0
        if BackwardPlan.of(self.prompts, self.direction) != BackwardPlan.of(other.prompts, other.direction):
            return 0
        frames = sorted({*self.edits, *other.edits})
        changes = [
            self.prompts.first_difference(other.prompts),
            next((f for f in frames if self.edits.get(f, ()) != other.edits.get(f, ())), None),
        ]
        return min((change for change in changes if change is not None), default=None)

    def equals(self, other: Recipe) -> bool:
        """Whether both give the same rows."""
        return self.first_change(other) is None

    def digest_text(self, usual: TrackSettings) -> str:
        """Text that equal recipes share; that of the prompts alone where nothing else is special.

        Args:
            usual: settings with which the project was begun.
        """
        record = self.prompts.to_record()
        if self.edits:
            record["edits"] = [[f, e.to_json()] for f in sorted(self.edits) for e in self.edits[f]]
        changed = {k: v for k, v in self.memory.items() if v != getattr(usual.memory, k)}
        if changed:
            record["memory"] = changed
        if self.direction != usual.direction:
            record["direction"] = self.direction
        return json.dumps(record, sort_keys=True)


def memory_values(config: MemoryConfig) -> dict[str, int | None]:
    """The values of `CHANGEABLE`."""
    return {name: getattr(config, name) for name in CHANGEABLE}


def changed_memory(config: MemoryConfig, values: Mapping[str, int | None]) -> MemoryConfig:
    """A copy of memory settings with some of `CHANGEABLE` replaced.

    Raises:
        UsageError: a value is not allowed.
    """
    try:
        return replace(config, **values)  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(str(error)) from None


def edits_of(files: Files, stream_id: str) -> Edits:
    """The edits of the memory that the rows of a stream were made with, or will be.

    Raises:
        StoreError: an edit is damaged or of a newer version.
        UsageError: an object was copied from another stream.
    """
    if not EditLog(files, stream_id).list():
        return {}
    store = StreamStore(files.root, stream_id)
    found: dict[int, tuple[MemoryEdit, ...]] = {}
    for planned in planned_edits(store, 0, store.committed().next_frame):
        if planned.edit.kind == COPY:
            raise UsageError(
                f"stream {stream_id!r} has an object that was copied from another stream before frame "
                f"{planned.frame}: it cannot be annotated"
            )
        found[planned.frame] = (*found.get(planned.frame, ()), planned.edit)
    return found


def write_edits(files: Files, stream_id: str, edits: Edits) -> None:
    """Write the edits into a folder in which the stream has no rows of their frames yet.

    Raises:
        StoreError: it holds other edits.
    """
    log = EditLog(files, stream_id)
    for frame, edited in sorted(edits.items()):
        for number, edit in enumerate(edited):
            if log.add(frame, number, {"edit": edit.to_json()}) is None:
                raise StoreError(f"{files.root} holds another edit {number} of frame {frame}: start over")

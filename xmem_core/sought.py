"""Sought objects: copied from another stream's memory, and not yet seen in this stream.

Until then an object is background on every frame. If it could read these frames, they would answer better
than what was copied, which is of another picture, and it would stay background wherever it stands. So it
reads only what was copied, with a sensory memory of zeros, as on the first frame of a video.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from xmem_core.presence import PresenceConstants, presence_scores
from xmem_core.state import TrackerState

# Pixels of the network's input: smaller masks are not the object yet.
_LEAST_AREA = 32
# With calibrated presence, a mask below is more probably on something else.
_LEAST_PRESENCE = 0.5


def end_search(
    state: TrackerState,
    object_ids: Sequence[int],
    final: Tensor,
    given: Collection[int],
    constants: PresenceConstants | None,
) -> None:
    """Stop seeking the objects that are seen on a frame, or prompted.

    Args:
        final: the frame's probabilities, (O + 1, H', W').
        constants: of `presence_scores`; None: a mask suffices.
    """
    if not state.sought:
        return
    areas = (final[1:] > 0.5).flatten(1).sum(1).tolist()
    presence = [1.0] * len(areas) if constants is None else presence_scores(final, constants).tolist()
    for object_id, area, likely in zip(object_ids, areas, presence, strict=True):
        if object_id in given or (area >= _LEAST_AREA and likely >= _LEAST_PRESENCE):
            state.sought.discard(object_id)


def keep_searching(state: TrackerState, object_ids: Sequence[int]) -> None:
    """Clear what a frame left of the objects that are still sought."""
    if not state.sought:
        return
    rows = [k for k, i in enumerate(object_ids) if i in state.sought]
    for part in (state.hidden, state.masks):
        if part is not None:
            part[rows] = 0

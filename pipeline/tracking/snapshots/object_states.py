"""Reads what a stream remembers of its objects, to be copied into other streams of the same model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pipeline.base.errors import PromptError, UsageError
from pipeline.prompts.files import PromptObject, PromptSet
from pipeline.prompts.remembered_object import RememberedObject
from pipeline.tracking.snapshots.newest import remembered_state
from pipeline.tracks.reader import chosen_stream
from pipeline.tracks.store import StreamStore
from xmem_core.object_copy import MOST_ELEMENTS, ObjectCopy


def prompts_from_state(
    out: str | os.PathLike[str],
    stream_id: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> PromptSet:
    """Prompts that start every object of a tracked stream in another video, without masks.

    The objects keep their ids and categories. On frame 0 each is out of sight, and it is sought from then on.

    Args:
        out: output folder of the tracked stream.
        stream_id: the stream; may be left out if there is one only.

    Raises:
        UsageError: there is no such stream, or it has no snapshot or object. StoreError: the folder cannot be
            read.
    """
    store = StreamStore(out, _chosen(out, stream_id, storage_options), storage_options)
    found = remembered_state(store)
    categories = dict(found.snapshot.categories)
    if not found.state.object_ids:
        raise UsageError(
            f"stream {store.stream_id!r} in {store.root} remembers no object at frame "
            f"{found.snapshot.next_frame - 1}: all were removed"
        )
    entries = []
    for object_id in found.state.object_ids:
        source = {"object": object_id, "stream": store.stream_id, "out": store.root}
        name = RememberedObject.from_json(source, f"the state of {store.root}")
        entries.append(PromptObject(object_id, categories.get(object_id), state=name))
    return PromptSet({0: tuple(entries)})


def read_object(
    source: RememberedObject, target: StreamStore, model_fingerprint: str, most: int = MOST_ELEMENTS
) -> tuple[ObjectCopy, str | None]:
    """What a stream remembers of an object, and the object's category.

    Args:
        target: the stream that receives the copy; its storage options are used.
        model_fingerprint: the model of that stream.
        most: number of elements of the copy at most.

    Raises:
        PromptError: there is no such stream or object, it has no snapshot, or it was tracked with another
            model. StoreError: the folder cannot be read.
    """
    out, options = source.out or target.root, target.storage_options
    try:
        stream_id = _chosen(out, source.stream_id, options)
        store = StreamStore(out, stream_id, options)
        if (store.root, stream_id) == (target.root, target.stream_id):
            raise UsageError(f"stream {stream_id!r} is the one that would receive the copy")
        found = remembered_state(store)
        copy = found.state.copy_object(source.object_id, max(1, min(most, MOST_ELEMENTS)))
    except (UsageError, ValueError) as error:
        raise PromptError(f"{source} cannot be copied: {error}") from error
    if copy.model_fingerprint != model_fingerprint:
        raise PromptError(
            f"{source} cannot be copied: stream {stream_id!r} was tracked with other weights "
            f"({copy.model_fingerprint[:8]}, this stream's are {model_fingerprint[:8]}): use its --model"
        )
    return copy, dict(found.snapshot.categories).get(source.object_id)


def _chosen(
    out: str | os.PathLike[str], stream_id: str | None, storage_options: Mapping[str, Any] | None
) -> str:
    return chosen_stream(out, stream_id, storage_options, option="--from-stream")

"""RememberedObject: names an object that another stream remembers, to be copied from its state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.base.errors import PromptError, UsageError
from pipeline.base.redaction import redacted
from pipeline.base.stream_ids import validate_stream_id
from pipeline.prompts import values as check

_KEYS = ("object", "stream", "out")


@dataclass(frozen=True)
class RememberedObject:
    """An object in the newest state of a tracked stream.

    Args:
        object_id: its id there.
        stream_id: the stream; None: the only one in `out`.
        out: path or fsspec URI of its output folder; None: the folder of the stream that receives the copy.
    """

    object_id: int
    stream_id: str | None = None
    out: str | None = None

    def __str__(self) -> str:
        place = "" if self.stream_id is None else f" of stream {self.stream_id}"
        return f"object {self.object_id}{place}" + ("" if self.out is None else f" in {self.out}")

    def to_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        values = {"object": self.object_id, "stream": self.stream_id, "out": self.out}
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, value: Any, where: str) -> RememberedObject:
        """Of {"object": id, "stream": id, "out": folder}; the last two may be left out.

        Raises:
            PromptError: it is anything else, or the folder's URI holds credentials.
        """
        if not isinstance(value, Mapping) or "object" not in value or set(value) - set(_KEYS):
            raise PromptError(
                f'{where}: {check.short(value)} names no remembered object: {{"object": id, "stream": id, '
                '"out": folder}, the last two may be left out'
            )
        stream, out = None, value.get("out")
        if "out" in value and (not isinstance(out, str) or not out or "\0" in out):
            raise PromptError(f"{where}: out {check.short(out)} is not a folder's path or URI")
        if out is not None and redacted(out) != out:
            raise PromptError(f"{where}: {redacted(out)} is stored as it is: leave credentials out of it")
        try:
            if "stream" in value:
                stream = validate_stream_id(value["stream"])
        except UsageError as error:
            raise PromptError(f"{where}: {error}") from None
        return cls(check.object_id(value["object"], where), stream, out)

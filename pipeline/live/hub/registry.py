"""Registry of a hub's live streams in its output folder, read again after a restart.

The output folder may be readable by many, so URLs are stored there without credentials. The complete URLs are
stored on this machine, in a file that only its owner may read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.base.errors import StoreError, XmemError
from pipeline.base.stream_ids import validate_stream_id
from pipeline.live.spec import LiveSettings, LiveSpec
from pipeline.storage.files import Files

logger = logging.getLogger(__name__)

_VERSION = 1


def default_secrets() -> Path:
    """The folder for URLs with credentials: XMEM_SECRETS_DIR, or a folder in the user's home."""
    chosen = os.environ.get("XMEM_SECRETS_DIR")
    return Path(chosen) if chosen else Path.home() / ".xmem" / "secrets"


class LiveList:
    """The stored list of a hub's streams.

    Args:
        files: the output folder.
        hub: name of the hub; the same rules as for stream ids apply.
        secrets: folder on this machine; see `default_secrets`.
    """

    def __init__(self, files: Files, hub: str, secrets: Path | None = None) -> None:
        self._files = files
        self._hub = validate_stream_id(hub)
        self._name = f"live/{hub}.json"
        place = hashlib.sha256(files.uri(self._name).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        self._secrets = (secrets or default_secrets()) / f"live-{hub}-{place}.json"
        self._unusable: dict[str, Mapping[str, Any]] = {}  # entries that `load` could not use, unchanged

    def save(self, specs: Iterable[LiveSpec], *, without: str | None = None) -> None:
        """Replace the list; durable when it returns. StoreError if it cannot be written.

        Entries that `load` could not use are kept for a machine or version that can, until a stream with the
        same id is added, or the id is given as `without`.
        """
        specs = list(specs)
        replaced = {without, *(spec.stream_id for spec in specs)}
        kept = {name: entry for name, entry in self._unusable.items() if name not in replaced}
        known = self._read_secrets() if kept else {}
        streams: list[Mapping[str, Any]] = list(kept.values())
        secrets = {name: known[name] for name in kept if name in known}
        for spec in specs:
            shown = spec.shown_url
            streams.append(
                {
                    "id": spec.stream_id,
                    "url": shown,
                    "secret": shown != spec.url,
                    "prompts": spec.prompts,
                    "detector": spec.detector,
                    "settings": spec.settings.to_dict(),
                    "zones": spec.zones,
                }
            )
            if shown != spec.url:
                secrets[spec.stream_id] = spec.url
        # Secrets first: a list without its secrets would be useless.
        self._write_secrets(secrets)
        text = json.dumps({"format_version": _VERSION, "streams": streams}, indent=2) + "\n"
        self._files.replace(self._name, text.encode(), self._hub)
        self._unusable = kept

    def load(self) -> tuple[list[LiveSpec], dict[str, XmemError]]:
        """The usable streams of the list, and the errors of the other entries by stream id.

        Raises:
            StoreError: the list is damaged or cannot be read.
        """
        try:
            content = json.loads(self._files.read(self._name))
            if content["format_version"] > _VERSION:
                raise StoreError(
                    f"{self._files.uri(self._name)} has format version {content['format_version']}, and this "
                    f"xmem reads up to {_VERSION}: upgrade it"
                )
            streams = list(content["streams"])
        except FileNotFoundError:
            return [], {}
        except (ValueError, TypeError, LookupError) as error:
            raise StoreError(
                f"the list of live streams {self._files.uri(self._name)} is damaged ({error}): restore it "
                "from a copy, or remove it and add the streams again"
            ) from error
        secrets = self._read_secrets()
        specs: list[LiveSpec] = []
        lost: dict[str, XmemError] = {}
        self._unusable = {}
        for stream in streams:
            name = str(stream.get("id"))
            try:
                specs.append(_spec(stream, secrets))
            except XmemError as error:
                lost[name] = error
            except (LookupError, TypeError, ValueError) as error:
                lost[name] = StoreError(f"stream {name}: its entry in the list is damaged: {error}")
            if name in lost:
                self._unusable[name] = stream
        return specs, lost

    def _write_secrets(self, secrets: Mapping[str, str]) -> None:
        if not secrets and not self._secrets.exists():
            return
        try:
            self._secrets.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._secrets.parent)  # readable by its owner only
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(dict(secrets), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self._secrets)
        except OSError as error:
            raise StoreError(
                f"URLs with credentials cannot be kept in {self._secrets.parent}: {error.strerror}; "
                "set XMEM_SECRETS_DIR to a folder that can be written"
            ) from error

    def _read_secrets(self) -> dict[str, str]:
        try:
            return dict(json.loads(self._secrets.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s cannot be read: %s", self._secrets, type(error).__name__)
            return {}


def _spec(stream: Mapping[str, Any], secrets: Mapping[str, str]) -> LiveSpec:
    url = stream["url"]
    if stream["secret"]:
        if stream["id"] not in secrets:
            raise StoreError(
                f"the credentials of {url} are not on this machine: remove stream {stream['id']} and add it "
                "again"
            )
        url = secrets[stream["id"]]
    settings = LiveSettings.from_dict(stream["settings"])
    zones = stream.get("zones")
    return LiveSpec(stream["id"], url, stream["prompts"], stream["detector"], settings, zones)

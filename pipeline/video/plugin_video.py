"""Source plugins, and the videos they open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, cast

from pipeline.base.closeable import Closing
from pipeline.base.errors import SourceError
from pipeline.base.plugins import load_entry_point
from pipeline.base.records import Event, Frame
from pipeline.storage.locations import scheme_of

ENTRY_POINT_GROUP = "xmem.sources"


class Source(Protocol):
    """A plugin that reads the URIs of one scheme: entry point `<scheme>` in the group `xmem.sources`."""

    def open(self, uri: str, start: int) -> Iterator[Frame]:
        """Yield frames from `frame_index` `start` on, numbered as in a decode from the beginning."""
        ...


def find_plugin(scheme: str) -> Source | None:
    """Return the installed source for a URI scheme, or None.

    An entry point may name an instance or a class.
    """
    plugin = load_entry_point(
        ENTRY_POINT_GROUP,
        scheme,
        f"{scheme}://: the source plugin",
        lambda loaded: loaded() if isinstance(loaded, type) else loaded,
        SourceError,
    )
    return None if plugin is None else cast(Source, plugin[0])


class OpenedVideo(Closing):
    """A source that keeps nothing open between iterations unless it overrides `close`."""

    def close(self) -> None:
        """Do nothing: each iteration of `frames` closes what it opened."""


class PluginVideo(OpenedVideo):
    """A video read by an installed `Source`; properties that the plugin does not provide are None."""

    rate: float | None = None
    frame_count: int | None = None
    container = "plugin"
    codec = "unknown"
    fingerprint = ""
    damaged = False

    def __init__(self, uri: str, plugin: Source) -> None:
        self.uri = uri
        self.trailing_losses: tuple[Event, ...] = ()
        self._plugin = plugin
        first = next(self.frames(), None)
        if first is None:
            raise SourceError(
                f"{uri}: the source plugin for {scheme_of(uri)}:// delivered no frame; check the URI"
            )
        self.height, self.width = first.size

    def frames(self, start: int = 0, *, previous_pts_seconds: float | None = None) -> Iterator[Frame]:
        """Yield frames from `start` on; the plugin decides how to get there."""
        return iter(self._plugin.open(self.uri, start))

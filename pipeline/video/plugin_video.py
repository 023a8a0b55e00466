"""Sources that come as plugins, and the videos they open."""

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
        """Frames from `frame_index` `start` on, as a decode from the beginning would number them."""
        ...


def find_plugin(scheme: str) -> Source | None:
    """The installed source for a URI scheme, if any; an entry point may name an instance or a class."""
    plugin = load_entry_point(
        ENTRY_POINT_GROUP,
        scheme,
        f"{scheme}://: the source plugin",
        lambda loaded: loaded() if isinstance(loaded, type) else loaded,
        SourceError,
    )
    return None if plugin is None else cast(Source, plugin[0])


class OpenedVideo(Closing):
    """A source that holds nothing open between iterations, unless it says otherwise."""

    def close(self) -> None:
        """Each iteration of `frames` closes what it opened."""


class PluginVideo(OpenedVideo):
    """A video that an installed `Source` reads; what the plugin does not tell is unknown (None)."""

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
        """Frames from `start` on; the plugin alone decides how it gets there."""
        return iter(self._plugin.open(self.uri, start))

"""Plugin loading: entry points of installed packages by group and name.

Every failure is one line that names the plugin and what to do about it. Only the requested entry point is
imported, so that a broken package does not affect those who do not use it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

from pipeline.base.errors import UsageError, XmemError, one_line
from pipeline.base.redaction import shareable


def load_plugin(
    name: str, *, group: str, kind: str, protocol: type, lacking: str, built_in: Sequence[str] = ()
) -> Any:
    """Create a plugin: its entry point, a class or function, is called without arguments.

    Args:
        name: name of the entry point.
        group: group of entry points.
        kind: what messages call the plugin, such as "detector".
        protocol: runtime-checkable Protocol that the plugin must implement.
        lacking: what messages say if it does not, such as "has no method detect(frame)".
        built_in: names that need no plugin, for the list of available names.

    Raises:
        UsageError: there is no plugin of that name, it cannot be loaded, or it does not implement the
            protocol.
    """
    plugin = load_entry_point(group, name, f"{kind} {name!r}", lambda loaded: loaded())
    if plugin is None:
        names = [*built_in, *sorted(entry_points(group=group).names)]
        known = ", ".join(names) or "none; install the package that provides it"
        raise UsageError(f"no {kind} {name!r}; available: {known}")
    made, value = plugin
    if not isinstance(made, protocol):
        raise UsageError(f"{kind} {name!r} ({value}) {lacking}; repair or uninstall it")
    return made


def load_entry_point(
    group: str,
    name: str,
    what: str,
    make: Callable[[Any], Any],
    failure: type[XmemError] = UsageError,
) -> tuple[Any, str] | None:
    """Apply `make` to the object of an entry point; return the result and the entry point's value.

    Returns None if there is no such entry point.

    Raises:
        failure: importing or `make` raised; the message begins with `what`.
    """
    for entry in entry_points(group=group):
        if entry.name != name:
            continue
        try:
            return make(entry.load()), entry.value
        except Exception as error:
            raise failure(
                f"{what} ({entry.value}) cannot be loaded: {type(error).__name__}: {one_line(error)}; "
                "repair or uninstall it"
            ) from shareable(error)
    return None

"""Plugin loading: entry points of installed packages by group and name.

Every failure is one line that names the plugin and what to do about it. Only the entry point that was asked
for is imported: a broken package must not stop those who do not want it.
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
    """A new plugin of that name: its entry point, a class or function, called without arguments.

    Args:
        name: of the entry point.
        group: of entry points.
        kind: what messages call it, "detector" or the like.
        protocol: what it has to be an instance of (a runtime-checkable Protocol).
        lacking: what messages say of one that is not, "has no method detect(frame)" or the like.
        built_in: names that need no plugin, for the list of what there is.

    Raises:
        UsageError: there is none of that name, or it cannot be loaded, or is not of the protocol.
    """
    plugin = load_entry_point(group, name, f"{kind} {name!r}", lambda loaded: loaded())
    if plugin is None:
        names = [*built_in, *sorted(entry_points(group=group).names)]
        known = ", ".join(names) or "none; install the package that has it"
        raise UsageError(f"no {kind} {name!r}; there are: {known}")
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
    """What `make` makes of what an entry point names, and the entry point's value; None if there is none.

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

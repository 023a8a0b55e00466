"""Declares fields of settings dataclasses: default, limits, help and external name in one place.

    @dataclass(frozen=True)
    class FinderSettings:
        \"\"\"When objects are started and given up.

        Args:
            every: frames between two runs of the detector. ...
        \"\"\"
        every: int = setting(5, least=1, most=100_000, flat="detect_every")

Everything else follows from that: `check` validates an instance, `options_of` lists the fields of nested
settings under their flat names, and the command line, the HTTP API and the Serve application build their
options from that list. The help text of an option is the field's paragraph in the docstring's Args.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pipeline.base.errors import UsageError

S = TypeVar("S")

MIN_SIZE, MAX_SIZE = 16, 8192
"""Limits of the network's input size: the frame's shorter side, in pixels."""

_KEY = "setting"


@dataclass(frozen=True, slots=True)
class Limits:
    """Allowed values of a setting.

    Args:
        least, most: smallest and largest value; None: no limit.
        above: the value must be larger than this.
        choices: the allowed values, if they are enumerated.
        flat: the option's name outside the dataclass. None: the field's name.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    flat: str | None = None

    def allow(self, value: Any) -> bool:
        """Whether a value of the right type is within the limits."""
        if self.choices:
            return value in self.choices
        if isinstance(value, int | float):
            # Written so that NaN fails every comparison.
            return (
                (self.least is None or value >= self.least)
                and (self.above is None or value > self.above)
                and (self.most is None or value <= self.most)
            )
        return True


def setting(
    default: Any = MISSING,
    *,
    factory: Callable[[], Any] | None = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    flat: str | None = None,
    **more: Any,
) -> Any:
    """Dataclass field with limits, see `Limits`; `more` are further metadata entries."""
    metadata = {_KEY: Limits(least, most, above, choices, flat), **more}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Option:
    """One setting of a possibly nested settings dataclass, addressed by a flat name.

    Args:
        name: flat name, unique among the settings.
        path: field names that lead to the setting, outermost first.
        kind: int, float, bool, str, or tuple for a list of strings.
        optional: whether None is allowed.
        default: default value.
        limits: allowed values.
        help: one paragraph of help.
        metadata: metadata of the dataclass field.
    """

    name: str
    path: tuple[str, ...]
    kind: type
    optional: bool
    default: Any
    limits: Limits
    help: str
    metadata: Mapping[str, Any]

    @property
    def summary(self) -> str:
        """The first sentence of the help, for tables of options."""
        return re.split(r"(?<=\.)\s+(?=[A-Z])", self.help, maxsplit=1)[0]

    def of(self, settings: object) -> Any:
        """The setting's value in an instance of the dataclass."""
        for name in self.path:
            settings = getattr(settings, name)
        return settings

    def check(self, value: Any) -> None:
        """Raise UsageError if the value is not allowed."""
        if value is None and self.optional:
            return
        if not (self._right_type(value) and self.limits.allow(value)):
            raise UsageError(f"{self.name}={value!r} is not allowed: {self.allowed}")

    def parse(self, text: str) -> Any:
        """Parse the value from a string, as given by an environment variable or `serve run name=text`.

        Raises:
            UsageError: the string is not of the right type. Limits are checked when settings are built.
        """
        text = text.strip()
        if self.optional and text.lower() in ("", "none"):
            return None
        if self.kind is tuple:
            return tuple(part for part in text.replace(",", " ").split() if part)
        if self.kind is bool:
            words = {"true": True, "1": True, "yes": True, "on": True}
            words |= {"false": False, "0": False, "no": False, "off": False}
            if text.lower() not in words:
                raise UsageError(f"{self.name}={text!r} is not allowed: true or false")
            return words[text.lower()]
        try:
            return self.kind(text)
        except ValueError:
            number = "a whole number" if self.kind is int else "a number"
            raise UsageError(f"{self.name}: {text!r} is not {number}") from None

    @property
    def allowed(self) -> str:
        """The allowed values, in words, for error messages."""
        limits = self.limits
        if limits.choices:
            return f"choose one of {', '.join(limits.choices)}"
        if self.kind not in (int, float):
            kinds: dict[type, str] = {bool: "true or false", tuple: "a list of names"}
            return kinds.get(self.kind, "a text")
        said = "a whole number" if self.kind is int else "a number"
        if limits.least is not None and limits.most is not None:
            return f"{said} from {_shown(limits.least)} to {_shown(limits.most)}"
        low = "" if limits.least is None else f"at least {_shown(limits.least)}"
        low = low if limits.above is None else f"above {_shown(limits.above)}"
        high = "" if limits.most is None else f"at most {_shown(limits.most)}"
        return ", ".join(part for part in (said, low, high) if part)

    def _right_type(self, value: Any) -> bool:
        if self.kind in (int, float):
            kinds: Any = int if self.kind is int else int | float
            return isinstance(value, kinds) and not isinstance(value, bool)
        if self.kind is tuple:
            return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
        return isinstance(value, self.kind)


def check(settings: object) -> None:
    """Validate the fields of a settings dataclass, except nested settings, which validate themselves.

    Raises:
        UsageError: a value is of the wrong type or outside its limits.
    """
    for option in _of(settings):
        if len(option.path) == 1 and _KEY in option.metadata:
            option.check(option.of(settings))


@cache
def options_of(cls: Any) -> tuple[Option, ...]:
    """All settings of a dataclass, including those of nested settings, in field order.

    Fields of types other than numbers, strings, booleans and tuples of strings are skipped, as are fields
    with `option=False` in their metadata, which users do not set.
    """
    return tuple(_walk(cls, ()))


def recorded(settings: Any, options: Iterable[Option]) -> dict[str, Any]:
    """Values by flat name, as records hold them.

    Options with the metadata `later`, which are younger than the first records, are left out while they have
    their default: older records and their digests still match.
    """
    values = ((option, option.of(settings)) for option in options)
    return {o.name: value for o, value in values if value != o.default or not o.metadata.get("later")}


def _of(settings: Any) -> tuple[Option, ...]:
    cls: Any = type(settings)
    return options_of(cls)


def _walk(cls: Any, path: tuple[str, ...]) -> Iterator[Option]:
    hints, helps = get_type_hints(cls), help_of(cls)
    for each in fields(cls):
        kind, optional = _kind(hints[each.name])
        inner = (*path, each.name)
        if kind is None or not each.metadata.get("option", True):
            continue
        if is_dataclass(kind):
            yield from _walk(kind, inner)
            continue
        limits = each.metadata.get(_KEY, Limits())
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if _KEY not in each.metadata and default is MISSING:
            continue  # a required argument, such as an output folder, rather than a setting
        choices = get_args(hints[each.name]) if get_origin(hints[each.name]) is Literal else limits.choices
        yield Option(
            limits.flat or each.name,
            inner,
            kind,
            optional,
            default,
            replace(limits, choices=choices),
            helps.get(each.name, ""),
            each.metadata,
        )


def _kind(hint: Any) -> tuple[Any, bool]:
    """The field's type (None if the field is not a setting) and whether it may be None."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    inner = [o for o in options if o is not type(None)]
    if len(inner) != 1:
        return None, False
    kind = inner[0]
    if get_origin(kind) is Literal:
        kind = str
    if get_origin(kind) is tuple:
        kind = tuple if get_args(kind) == (str, ...) else None
    known = kind in (int, float, bool, str, tuple) or is_dataclass(kind)
    return (kind if known else None), len(inner) < len(options)


def from_flat(base: S, values: Mapping[str, Any]) -> S:
    """Copy of settings with some values replaced, given by flat name.

    Args:
        base: settings that provide all other values.
        values: flat name to new value.

    Raises:
        UsageError: a name is unknown, or a value not allowed.
    """
    known = {option.name: option for option in _of(base)}
    if unknown := sorted(set(map(str, values)) - set(known)):
        raise UsageError(f"unknown setting {unknown[0]!r}; available: {', '.join(known)}")
    nested: dict[tuple[str, ...], dict[str, Any]] = {}
    for name, value in values.items():
        *parents, last = known[name].path
        nested.setdefault(tuple(parents), {})[last] = value
    replaced: S = _replaced(base, nested, ())
    return replaced


def _replaced(settings: Any, nested: Mapping[tuple[str, ...], dict[str, Any]], path: tuple[str, ...]) -> Any:
    changes = dict(nested.get(path, {}))
    below = {inner[len(path)] for inner in nested if len(inner) > len(path) and inner[: len(path)] == path}
    for name in below:
        changes[name] = _replaced(getattr(settings, name), nested, (*path, name))
    if not changes:
        return settings
    try:
        return replace(settings, **changes)
    except (TypeError, ValueError) as error:  # raised by settings that do not use UsageError
        raise UsageError(str(error)) from error


def help_of(cls: type) -> dict[str, str]:
    """Field name to its paragraph in the docstring's Args section, base classes included."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        text = inspect.cleandoc(one.__dict__.get("__doc__") or "")
        _, _, rest = text.partition("Args:\n")
        arguments = re.split(r"\n(?=\S)", rest, maxsplit=1)[0]
        for entry in re.split(r"\n(?=    \S)", "\n" + arguments):
            names, colon, words = entry.strip().partition(": ")
            if colon and re.fullmatch(r"\w+(, \w+)*", names):
                said = " ".join(words.split())
                found.update(dict.fromkeys(names.split(", "), said[:1].upper() + said[1:]))
    return found


def _shown(number: float) -> str:
    return f"{number:,.0f}".replace(",", "_") if number >= 10_000 else f"{number:g}"

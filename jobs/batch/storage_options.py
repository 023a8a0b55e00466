"""`--storage-options`: fsspec options from the command line. They may hold credentials."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pipeline.base.errors import UsageError
from pipeline.base.stream_ids import expanded


def parse_storage_options(
    given: Sequence[str] | None, option: str = "--storage-options"
) -> dict[str, Any] | None:
    """Merge options given as JSON objects, `@FILE` with JSON, `key=value` or `outer.inner=value`.

    Raises:
        UsageError: an item has none of these forms. Messages do not contain values.
    """
    if not given:
        return None
    options: dict[str, Any] = {}
    for text in given:
        if text.startswith("@"):
            path = expanded(text[1:])
            try:
                with open(path, encoding="utf-8") as file:
                    _merge(options, _parsed(file.read(), f"{option} {text}"))
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "not UTF-8"
                raise UsageError(f"{option} {text} cannot be read: {reason}") from None
        elif text.lstrip().startswith("{"):
            _merge(options, _parsed(text, option))
        else:
            name, equals, value = text.partition("=")
            if not equals or not name.strip():
                raise UsageError(f"{option}: give JSON, @FILE with JSON, or key=value")
            _merge(options, _nested(name.strip().split("."), _value(value)))
    return options


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON (line {getattr(error, 'lineno', 1)})") from None
    if not isinstance(value, dict):
        raise UsageError(f"{where} is not a JSON object")
    return value


def _nested(names: Sequence[str], value: Any) -> dict[str, Any]:
    for name in reversed(names):
        value = {name: value}
    return dict(value)


def _value(text: str) -> Any:
    """Parse booleans and nested JSON; anything else is a string, including keys made of digits."""
    if text in ("true", "false", "null") or text.startswith(("{", "[")):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value

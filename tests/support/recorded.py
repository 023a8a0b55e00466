"""Calls written down on their way to the function that they are meant for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def recorded(
    function: Callable[..., Any], calls: list[Any], argument: int | None = None
) -> Callable[..., Any]:
    """`function`, which also appends its positional arguments, or one of them, to `calls`."""

    def call(*args: Any, **options: Any) -> Any:
        calls.append(args if argument is None else args[argument])
        return function(*args, **options)

    return call

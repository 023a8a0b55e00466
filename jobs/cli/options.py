"""Command-line options generated from the settings dataclasses.

    @app.command()
    @tracking_options(without={"max_frames": "a camera has no end"})
    def serve(out: ..., *, tracking: TrackSettings) -> None: ...

A decorated command has one option per field of `pipeline.tracking.settings.TrackSettings`, with the field's
default and help, and receives the settings as `tracking`. A new field becomes an option of all commands.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from pipeline.base.setting_fields import Option
from pipeline.tracking.settings import TrackSettings, track_options

_PANELS = {
    "model": "Network",
    "memory": "Memory",
    "commit": "Commits",
    "detector": "Detector",
    "direction": "Tracking",
}
_FLAGS = {
    "detector": ("--detect",),
    "sinks": ("--sink",),
    "chunk_frames": ("--chunk-frames", "--chunk"),
    "keep_state": ("--keep-state/--no-keep-state",),
    "enable_long_term": ("--long-term/--no-long-term",),
}
SAID_BY_SIZE = {"full_size": "--size 0 says the same"}
"""For `without`: options that duplicate another one."""

_PARAMETER = "tracking"


def tracking_options(
    *, without: Mapping[str, str] = SAID_BY_SIZE, defaults: Mapping[str, Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Replace a command's keyword-only parameter `tracking` by one option per setting.

    Args:
        without: settings that the command does not offer, and why.
        defaults: this command's defaults where they differ from the settings'.

    Raises:
        UsageError: when the command is called with values that are not allowed.
    """
    offered = [option for option in track_options() if option.name not in without]
    others = dict(defaults or {})

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def called(*args: Any, **given: Any) -> Any:
            chosen = {option.name: given.pop(option.name) for option in offered}
            return command(*args, **given, tracking=TrackSettings().with_options(chosen))

        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != _PARAMETER]
        parameters = own + [_parameter(option, others.get(option.name, option.default)) for option in offered]
        called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in parameters} | {
            "return": signature.return_annotation
        }
        called.tracking_without = dict(without)  # type: ignore[attr-defined]
        return called

    return decorate


def _parameter(option: Option, default: Any) -> inspect.Parameter:
    kind: Any = list[str] if option.kind is tuple else option.kind
    shown = typer.Option(
        *_FLAGS.get(option.name, (_flag(option),)),
        # The full help of memory settings is too long for --help; see `MemoryConfig`.
        help=(option.summary if option.path[0] == "memory" else option.help) + _limits(option),
        metavar="|".join(option.limits.choices) or None,
        rich_help_panel=_PANELS[option.path[0]],
    )
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default or None if option.kind is tuple else default,
        annotation=Annotated[kind | None if option.optional or option.kind is tuple else kind, shown],
    )


def _flag(option: Option) -> str:
    words = option.name.replace("_", "-")
    return f"--{words}/--no-{words}" if option.kind is bool else f"--{words}"


def _limits(option: Option) -> str:
    low, high = option.limits.least, option.limits.most
    return f" From {low:g} to {high:,.0f}.".replace(",", " ") if low is not None and high is not None else ""

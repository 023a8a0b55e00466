"""Every command offers every tracking option in the same way, except for a short list."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from jobs.cli import app as cli
from jobs.cli import batch as batch_cli
from jobs.cli.options import tracking_options
from pipeline.api.app import create_routes
from pipeline.api.service import ApiSettings
from pipeline.base.setting_fields import Option
from pipeline.distributed.messages import WorkerSettings
from pipeline.live.spec import JPEG_QUALITIES, JPEG_SIDES, LiveSettings
from pipeline.tracking.settings import NOT_LIVE, TrackSettings, track_options

OPTIONS = track_options()
COMMANDS = (("track",), ("batch", "run"), ("serve",), ("evaluate",))
# What a command does not offer; the reasons stand where the command says so.
WITHOUT = {
    "track": {"full_size"},
    "batch run": {"full_size"},
    "serve": {
        "full_size", "small_size", "detector", "chunk_frames", "snapshot_chunks", "max_frames", "max_pixels",
        "direction", "keep_state", "decoder",
    },
    "evaluate": {
        "full_size", "detector", "detect_every", "detect_confirmations", "max_objects", "out_of_sight_frames",
        "detect_classes", "detect_score", "give_up_looks", "detect_span", "kept_for_prompts",
        "chunk_frames", "snapshot_chunks", "max_frames", "max_pixels", "box_segmenter",
        "sinks", "size", "small_size", "direction", "keep_state", "decoder",
    },
}  # fmt: skip
# Figures of different machines are compared, and not all have bfloat16.
OTHER_DEFAULTS = {("evaluate", "dtype"): "float32"}


def command_of(path: tuple[str, ...]) -> Any:
    found: Any = get_command(cli.app)
    for name in path:
        found = found.commands[name]
    return found


def another_value(option: Option) -> Any:
    """An allowed value that is not the default."""
    given: dict[str, Any] = {
        "model": "xmem",
        "size": 96,
        "small_size": 128,
        "device": "cuda",
        "dtype": "float16",
        "deep_update_every": 6,
        "min_mid_term_frames": 4,
        "search_window": 160,
        "least_area": 0.5,
        "box_segmenter": "ellipse",
        "sinks": ("one", "two"),
        "detector": "motion",
        "detect_score": 0.25,
        "detect_classes": "person,car",
        "direction": "both",
        "decoder": "torchcodec",
    }
    if option.name in given:
        return given[option.name]
    return not option.default if option.kind is bool else (option.default or 0) + 1


def flags_of(parameter: Any, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [parameter.opts[0] if value else parameter.secondary_opts[0]]
    values = value if isinstance(value, tuple) else (value,)
    return [word for one in values for word in (parameter.opts[0], str(one))]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_command_offers_every_option_alike(path: tuple[str, ...]) -> None:
    command, name = command_of(path), " ".join(path)
    parameters = {p.name: p for p in command.params}
    reasons = command.callback.__wrapped__.tracking_without
    assert set(reasons) == WITHOUT[name]
    assert all(len(reason) > 10 for reason in reasons.values())
    for option in OPTIONS:
        if option.name in reasons:
            continue
        parameter = parameters[option.name]
        default = OTHER_DEFAULTS.get((name, option.name), option.default)
        assert parameter.default == (default if option.kind is not tuple else None), option.name
        assert parameter.help.startswith(option.summary), option.name
        assert parameter.rich_help_panel in ("Network", "Memory", "Commits", "Detector", "Tracking")
        assert parameter.show_default or parameter.default is None


def test_annotations_are_tracked_with_the_options_of_the_network() -> None:
    parameters = {p.name: p for p in command_of(("annotate",)).params}
    for option in OPTIONS:
        if option.path[0] == "model" and option.name != "full_size":
            assert parameters[option.name].default == option.default, option.name


def test_what_is_given_arrives() -> None:
    app, seen = typer.Typer(), []

    @app.command()
    @tracking_options(without={})
    def command(*, tracking: TrackSettings) -> None:
        seen.append(tracking)

    runner, parameters = CliRunner(), {p.name: p for p in get_command(app).params}
    assert runner.invoke(app, []).exit_code == 0
    assert seen.pop() == TrackSettings()
    arguments: list[str] = []
    for option in OPTIONS:
        value = another_value(option)
        assert value != option.default
        if option.name != "full_size":  # and a size besides would contradict it
            arguments += flags_of(parameters[option.name], value)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for option in OPTIONS:
        if option.name != "full_size":
            assert option.of(seen[0]) == another_value(option), option.name


def test_submit_takes_what_run_takes() -> None:
    parameters = {p.name: p for p in command_of(("batch", "run")).params}
    offered = [o for o in OPTIONS if o.name not in WITHOUT["batch run"]]
    arguments = [word for o in offered for word in flags_of(parameters[o.name], another_value(o))]
    videos, options = batch_cli._checked(["clips", *arguments])
    assert (videos, sorted(options)) == (["clips"], sorted(arguments))


def test_the_ray_data_stage_takes_every_option() -> None:
    for option in OPTIONS:
        settings = WorkerSettings.of("out", **{option.name: another_value(option)})
        assert option.of(settings.tracking) == another_value(option)


@pytest.mark.filterwarnings("ignore")
def test_serve_run_is_xmem_serve() -> None:
    """Its options are those of `xmem serve`, by name, with the same defaults."""
    from pipeline.distributed.serve import settings_from

    tokens = {"XMEM_API_TOKENS": "a-token-for-tests-0123456789"}
    api, place = settings_from({"out": "o"}, tokens)
    assert place.settings is not None
    assert place.settings.tracking == TrackSettings()
    assert api.streams == LiveSettings()
    for option in OPTIONS:
        if option.name in NOT_LIVE:
            continue
        value = another_value(option)
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        api, place = settings_from({"out": "o", option.name: text}, tokens)
        assert place.settings is not None
        assert option.of(place.settings.tracking) == value, option.name
    words = {"out": "o", "detect_every": "9", "box_segmenter": "ellipse"}
    words["allow_detector"] = "motion,people"
    api, _ = settings_from(words, tokens)
    assert (api.streams.finder.every, api.streams.box_segmenter) == (9, "ellipse")
    assert api.detectors == ("motion", "people")


def test_the_apis_pictures_have_the_limits_of_the_hub() -> None:
    paths = create_routes(None, ApiSettings(None)).openapi()["paths"]  # type: ignore[arg-type]
    for route in ("frame.jpg", "preview.mjpeg"):
        asked = paths[f"/v1/streams/{{stream_id}}/{route}"]["get"]["parameters"]
        given = {p["name"]: p["schema"] for p in asked}
        for name, (least, most) in (("max_side", JPEG_SIDES), ("quality", JPEG_QUALITIES)):
            assert (given[name]["minimum"], given[name]["maximum"]) == (least, most), json.dumps(given[name])


def test_help_loads_no_network_and_no_ray() -> None:
    heavy = ("torch", "cv2", "ray", "av", "duckdb", "pydantic")
    program = f"import jobs.cli.app, sys; print(*(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"

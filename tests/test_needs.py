"""Tests are marked by their needs, on workers of pytest-xdist only where a marker selects tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.needs import MARKERS, selected_by

ROOT = Path(__file__).parents[1]
OTHER_PROCESS = "tests/pipeline/live/hub/test_hub_kill.py"


def markers_of(request: pytest.FixtureRequest, path: str) -> set[str]:
    found = [item for item in request.session.items if item.path == ROOT / path]
    if not found:
        pytest.skip(f"{path} is not part of this run")
    return {marker.name for item in found for marker in item.iter_markers()} & set(MARKERS)


def test_make_quick_selects_by_needs_and_make_test_does_not() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    quick = re.search(r"^QUICK := (.*)$", makefile, re.M)
    whole = re.search(r"--durations=20 -m '([^']*)'", makefile)
    assert quick is not None
    assert whole is not None
    assert selected_by(quick[1], "")
    assert not selected_by(whole[1], "")


@pytest.mark.parametrize("marker", MARKERS)
def test_a_marker_or_a_part_of_a_name_selects(marker: str) -> None:
    assert selected_by(f"not {marker} and not soak", "")
    assert selected_by("", f"{marker} or commit")
    assert not selected_by("not soak and not alone", "commit")


def test_workers_look_for_needs_only_if_tests_are_selected_by_them(request: pytest.FixtureRequest) -> None:
    config = request.config
    looked = not hasattr(config, "workerinput") or selected_by(config.option.markexpr, config.option.keyword)
    assert markers_of(request, OTHER_PROCESS) == ({"process"} if looked else set())

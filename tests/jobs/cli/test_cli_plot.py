"""`xmem plot` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.walks import random_walk, walked_folder

from jobs.cli.app import main


def call(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def test_plots_of_one_of_several_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate(("gate-1", "gate-2")):
        walked_folder(str(tmp_path / "out"), name, random_walk(seed, with_mask=True))
    assert call("plot", tmp_path / "out", "-o", tmp_path / "plots") == 2
    assert "has 2 streams: choose one with --stream-id: gate-1, gate-2" in capsys.readouterr().err
    options = ("--stream-id", "gate-2", "--only", "heat", "--first", "3")
    assert call("plot", tmp_path / "out", "-o", tmp_path / "plots", *options) == 0
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["heat.png", "report.html"]
    assert f"1 plot and {tmp_path}/plots/report.html written" in capsys.readouterr().err


def test_zones_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    walked_folder(str(tmp_path / "out"), "gate", random_walk(1))
    assert call("plot", tmp_path / "out", "-o", tmp_path / "plots", "--zones", tmp_path / "no.json") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no.json cannot be read" in line

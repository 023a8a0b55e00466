"""Training stages in processes of a real Ray, by Ray Train."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.stage_data import write_stage_data
from support.tiny import TINY, tiny_weights

from jobs.cli import app as cli
from jobs.training.ray_processes import _cause, train_on_ray
from jobs.training.settings import StageConfig, published_stages
from jobs.training.stages import StageRun, train_stages
from pipeline.base.errors import UsageError

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    # Ray Train copies the options of Ray Data, which warns of its own.
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]


def small() -> StageConfig:
    changes = {"model": TINY.to_dict(), "steps": 3, "finetune": 0, "batch": 2, "size": 48, "frames": 3}
    changes |= {"lr": 1e-3, "workers": 0, "threads": 1, "log_every": 1, "pictures_every": 0}
    return published_stages("3")[0].with_overrides(changes | {"validate_every": 0})


def losses(folder: Path) -> list[float]:
    with (folder / "stage-3/log.csv").open(newline="") as file:
        return [float(line["loss"]) for line in csv.DictReader(file)]


def test_two_processes_of_ray_continue_as_one_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run was begun by one process; two of Ray Train have half of each further batch."""
    data, start = write_stage_data(tmp_path / "data"), tiny_weights(tmp_path)
    alone = train_stages([small()], data, tmp_path / "one", StageRun(init=start))
    assert alone is not None
    assert train_stages([small()], data, tmp_path / "two", StageRun(init=start, max_hours=1e-9)) is None
    small().save(tmp_path / "stage.json")
    arguments = ["train", "--config", str(tmp_path / "stage.json"), "--data", str(data), "--init", start]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--out", str(tmp_path / "two"), "--address", "auto", "--processes", "2"])
    assert ended.value.code == 0, capsys.readouterr().err
    own, other = load_file(alone), load_file(tmp_path / "two/stage-3/weights.safetensors")
    apart = torch.cat([(own[n].double() - other[n].double()).abs().flatten() for n in own])
    assert float(apart.mean()) < 1e-5
    assert len(losses(tmp_path / "two")) == 3
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def test_more_processes_than_there_is_room_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="9 training processes are not allowed: the Ray cluster has 3 CPUs"):
        train_on_ray([small()], tmp_path, tmp_path / "out", StageRun(), processes=9)
    with pytest.raises(UsageError, match="--processes 0 is not allowed: must be at least 1"):
        train_on_ray([small()], tmp_path, tmp_path / "out", StageRun(), processes=0)


def test_what_a_process_refuses_is_reported_and_not_what_its_partners_lost() -> None:
    refused = RuntimeError("Traceback ...")
    refused.__cause__ = UsageError("data has no folder DAVIS")
    cause = _cause({0: RuntimeError("Connection closed by peer"), 1: refused})
    assert (type(cause), str(cause)) == (UsageError, "data has no folder DAVIS")
    lost = _cause({1: RuntimeError("the worker died\nof a signal")})
    assert not isinstance(lost, UsageError)
    assert str(lost) == "training process 1 failed: the worker died of a signal"

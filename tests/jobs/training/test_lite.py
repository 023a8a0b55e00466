from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from support.pictures import write_pictures
from support.tiny import TINY

from jobs.cli import app as cli
from jobs.training.lite import parse_settings, run
from pipeline.base.errors import UsageError
from xmem_core import VideoSegmenter, load_model
from xmem_core.network import XMem
from xmem_core.training import trainer
from xmem_core.training.settings import RECIPE, Phase, TrainConfig


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    TrainConfig(
        model=TINY,
        phases=(Phase(size=64, batch=1),),
        steps=2,
        warmup=0,
        threads=1,
        workers=0,
        held_out_people=0,
    ).save(path)
    return str(path)


@pytest.fixture
def start(tmp_path: Path) -> str:
    path = tmp_path / "start.safetensors"
    save_file(XMem(TINY).state_dict(), path)
    return str(path)


def xmem(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", *map(str, arguments)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def steps_logged(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_run_takes_its_file_and_overrides_and_goes_on_with_its_own(
    tmp_path: Path, config: str, start: str
) -> None:
    root, out = str(write_pictures(tmp_path / "data")), tmp_path / "out"
    weights = run(config, root, str(out), {"init": start, "log_every": 1, "max_hours": 1e-9})
    assert weights == out / "weights-ema.safetensors"
    assert steps_logged(out) == [1]
    # No file given: the run's own settings, and on from its checkpoint.
    assert run(None, root, str(out), {"max_hours": 0.0, "init": start}) == weights
    assert steps_logged(out) == [1, 2]


def test_requests_that_cannot_work_are_usage_errors(tmp_path: Path, config: str, start: str) -> None:
    root, out = str(write_pictures(tmp_path / "data")), str(tmp_path / "out")
    with pytest.raises(UsageError, match=r"nowhere\.json"):
        run(str(tmp_path / "nowhere.json"), root, out, {})
    with pytest.raises(UsageError, match="unknown training setting speed"):
        run(config, root, out, {"speed": 3})
    with pytest.raises(UsageError, match="no training pictures under"):
        run(config, str(tmp_path / "empty"), out, {"init": start})
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UsageError, match=r"broken\.json"):
        run(str(broken), root, out, {})
    wrong = tmp_path / "wrong.safetensors"
    state = XMem(TINY).state_dict()
    save_file({k: v for k, v in state.items() if not k.startswith("decoder")}, wrong)
    with pytest.raises(UsageError, match="does not fit the model"):
        run(config, root, out, {"init": str(wrong)})


def test_xmem_train_goes_on_and_its_weights_can_be_tracked_with(
    tmp_path: Path, config: str, start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = write_pictures(tmp_path / "data"), tmp_path / "out"
    given = ("--data", root, "--out", out)
    few = ("--set", "log_every=1", "--max-hours", "1e-9")
    assert xmem(*given, "--config", config, "--init", start, *few) == 0
    assert steps_logged(out) == [1]
    assert "step 1 of 2" in capsys.readouterr().err
    assert xmem(*given, "--set", "max_hours=0") == 0
    assert steps_logged(out) == [1, 2]
    assert str(out / "weights-ema.safetensors") in capsys.readouterr().err.replace("\n", "")
    model = load_model(out / "weights-ema.safetensors")
    assert model.config == TINY
    assert not model.training
    VideoSegmenter(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "steps"), "--set 'steps' is not allowed: give name=value"),
        (("--set", "stepz=3"), "unknown training setting stepz"),
        (("--set", "steps=many"), "steps='many' is not allowed: a whole number is needed"),
        (("--set", 'phases=[{"size":50}]'), "size is 50: must be a multiple of 16"),
        (("--config", "nowhere.json"), "nowhere.json"),
        ((), "no training pictures under"),
    ],
)
def test_xmem_train_says_in_one_line_what_is_wrong(
    tmp_path: Path,
    start: str,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert xmem("--data", tmp_path / "nothing", "--out", tmp_path / "out", "--init", start, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_settings_of_the_command_line_are_json_or_text() -> None:
    assert parse_settings(["steps=9", "bf16=false", "device=cuda", "init=a=b", 'phases=[{"batch": 2}]']) == {
        "steps": 9,
        "bf16": False,
        "device": "cuda",
        "init": "a=b",
        "phases": [{"batch": 2}],
    }
    with pytest.raises(UsageError, match="give name=value"):
        parse_settings(["=3"])


def test_without_a_file_the_recipe_is_used_and_imagenet_only_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def instead(config: TrainConfig, data_root: str, out: str, **options: Any) -> Path:
        seen.append({"config": config, **options})
        return Path(out)

    monkeypatch.setattr(trainer, "train", instead)
    monkeypatch.setattr("jobs.training.lite._installed_backbone", lambda: "imagenet.pth")
    out = tmp_path / "out"
    run(None, "data", str(out), {"steps": 3000})
    run(None, "data", str(out), {"init": "w.safetensors"})
    (out / "checkpoint-00000001").mkdir(parents=True)
    run(None, "data", str(out), {})
    run(None, "data", str(out), {"resume": False})
    recipe = TrainConfig.load(RECIPE)
    # From ImageNet alone, keys have to be made first; the weights that it started from have them.
    assert seen[0]["config"] == recipe.with_overrides({"steps": 3000, "whiten_keys": True})
    assert seen[1]["config"] == seen[2]["config"] == recipe
    assert seen[3]["config"] == recipe.with_overrides({"whiten_keys": True})
    recipe.save(tmp_path / "own.json")
    run(str(tmp_path / "own.json"), "data", str(tmp_path / "other"), {})
    run(None, "data", str(tmp_path / "other"), {"whiten_keys": False})
    assert [s["config"] for s in seen[4:]] == [recipe] * 2
    seen = seen[:4]
    assert [s["backbone"] for s in seen] == ["imagenet.pth", None, None, "imagenet.pth"]
    assert seen[1]["init"] == "w.safetensors"

"""The published training stages: their settings, data, steps, outputs and refusals."""

from __future__ import annotations

import contextlib
import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.stage_data import square, write_stage_data
from support.tiny import TINY, tiny_weights

from jobs.cli import app as cli
from jobs.evaluation.pictures import palette_png
from jobs.training.imagenet import load_resnets
from jobs.training.loop import StageTrainer, _batches
from jobs.training.processes import Group
from jobs.training.samples import StageData, choose_frames
from jobs.training.settings import StageConfig, published_stages
from jobs.training.stages import StageRun, train_stages
from pipeline.base.errors import UsageError
from xmem_core import ModelConfig, XMem, load_model

ALONE = Group(0, 1, torch.device("cpu"))
SMALL: dict[str, Any] = {
    "model": TINY.to_dict(),
    "steps": 2,
    "finetune": 0,
    "batch": 2,
    "size": 48,
    "frames": 3,
    "lr": 1e-3,
    "workers": 0,
    "threads": 1,
    "log_every": 1,
    "pictures_every": 0,
    "validate_every": 0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stage_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_weights(tmp_path_factory.mktemp("start"))


def small(stage: str, **changes: Any) -> StageConfig:
    return published_stages(stage)[0].with_overrides(SMALL | changes)


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def equal(a: Path, b: Path) -> None:
    one, two = load_file(a), load_file(b)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


# --- settings ------------------------------------------------------------------------------------


def test_the_published_stages_have_the_published_numbers() -> None:
    stages = published_stages("0123")
    assert [s.steps for s in stages] == [150_000, 250_000, 150_000, 100_000]
    assert [s.finetune for s in stages] == [0, 0, 10_000, 10_000]
    assert [s.batch for s in stages] == [16, 8, 8, 8]
    assert [(s.frames, s.memory_frames, s.max_objects) for s in stages] == [(3, 2, 1)] + [(8, 3, 3)] * 3
    assert [s.lr_steps for s in stages] == [(), (200_000,), (120_000,), (80_000,)]
    for stage in stages:
        assert (stage.lr, stage.weight_decay, stage.size, stage.deep_update) == (1e-5, 0.05, 384, 0.2)
        assert (stage.hard_start, stage.hard_end, stage.hard_fraction) == (20_000, 70_000, 0.15)
        assert stage.model == ModelConfig()
        assert stage == StageConfig.from_dict(json.loads(json.dumps(stage.to_dict())))
    third = stages[3]
    assert [third.max_gap(s) for s in (0, 9_999, 10_000, 30_000, 89_999, 90_000, 109_999)] == [
        5,
        5,
        10,
        15,
        15,
        5,
        5,
    ]
    assert [third.learning_rate(s) for s in (0, 79_999, 80_000)] == pytest.approx([1e-5, 1e-5, 1e-6])
    assert [third.is_finetuning(s) for s in (99_999, 100_000)] == [False, True]


@pytest.mark.parametrize("stages", ["", "4", "00", "s0"])
def test_stages_that_do_not_exist_are_refused(stages: str) -> None:
    with pytest.raises(UsageError, match=r"--stage '.*' is not allowed: give stages in their order"):
        published_stages(stages)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 50}, "size=50 is not allowed"),
        ({"amp": "float16"}, "amp='float16' is not allowed: bfloat16 or off on a CPU"),
        ({"gaps": [[0.1, 5]]}, "gaps="),
        ({"frames": 2}, "frames=2 is not allowed"),
        ({"sources": [{"layout": "tar", "folders": ["x"]}]}, "layout='tar' is not allowed"),
        ({"speed": 1}, "unknown setting of a stage speed"),
    ],
)
def test_settings_that_are_not_allowed_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small("3", **change)


# --- data ----------------------------------------------------------------------------------------


def test_frames_are_distinct_in_order_or_reversed_and_close_to_each_other() -> None:
    directions = set()
    for seed in range(50):
        found = choose_frames(60, 8, 5, np.random.default_rng(seed))
        steps = np.diff(found)
        directions.add(bool(steps[0] > 0))
        assert len(set(found)) == 8
        assert (np.sign(steps) == np.sign(steps[0])).all()
        assert np.abs(steps).max() <= 5
        assert 0 <= min(found) <= max(found) < 60
    assert directions == {True, False}
    assert sorted(choose_frames(8, 8, 1, np.random.default_rng(0))) == list(range(8))


def test_each_item_occurs_once_per_epoch_and_davis_five_times(data: Path) -> None:
    config = small("3", batch=1)
    found = StageData(config, data)
    names = [found._item(n).frames[0].parts[-4:-1] for n in range(len(found.items))]
    # clip1 of DAVIS is of the validation split.
    davis = [n for n in names if n[1:] == ("480p", "clip0") or n[-2:] == ("480p", "clip0")]
    assert len(davis) == 5
    assert len(names) == 7
    assert not any("480p" in n and "clip1" in n for n in names)


@pytest.mark.parametrize("stage", list("0123"))
def test_clips_depend_on_seed_and_step_alone_and_masks_follow_the_pictures(stage: str, data: Path) -> None:
    config = small(stage, batch=4, size=64)
    whole = StageData(config, data).batch(7, 0, 4)
    again = StageData(config, data)
    again.batch(3, 0, 1)
    parts = [again.batch(7, 0, 2), again.batch(7, 2, 4)]
    np.testing.assert_array_equal(whole.frames, np.concatenate([p.frames for p in parts]))
    np.testing.assert_array_equal(whole.labels, np.concatenate([p.labels for p in parts]))
    assert whole.frames.shape == (4, 3, 64, 64, 3)
    assert not np.array_equal(whole.frames, again.batch(8, 0, 4).frames)
    checked = 0
    for clip in range(4):
        assert 1 <= whole.objects[clip] <= config.max_objects
        for number in range(1, whole.objects[clip] + 1):
            assert (whole.labels[clip, 0] == number).any()
        for frame, labels in zip(whole.frames[clip], whole.labels[clip], strict=True):
            inner = cv2.erode((labels == 1).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
            if inner.sum() < 20:
                continue
            # Objects are flat squares, one red, one green; the rest is grey.
            spread = frame[inner].astype(int).std(axis=0).max()
            assert spread < 12
            checked += 1
    assert checked >= 4


@pytest.mark.parametrize(
    ("stage", "break_", "message"),
    [
        ("0", "no static", "has none of the folders static/fss"),
        ("0", "no mask", r"2\.jpg has no mask 2\.png beside it"),
        ("1", "no BL30K", "has no folder BL30K, which this stage needs"),
        ("1", "other layout", "BL30K has no folder JPEGImages: need JPEGImages/<clip>"),
        ("2", "missing clip", r"train\.txt names clip 'ghost', which is not in .*480p \(1 missing\)"),
        ("2", "no list", r"there is no list .*train\.txt"),
        ("2", "short", r"YouTube/train has no clip of 3 frames of the layout 'clips'"),
    ],
)
def test_data_of_no_known_layout_is_refused_in_one_line(
    tmp_path: Path, start: str, stage: str, break_: str, message: str
) -> None:
    root = write_stage_data(tmp_path / "data", frames=3)
    if break_.startswith("no ") and break_ not in ("no mask", "no list"):
        (root / break_[3:]).rename(tmp_path / "away")
    elif break_ == "no mask":
        (root / "static/fss/cup/2.png").unlink()
    elif break_ == "other layout":
        (root / "BL30K/JPEGImages").rename(root / "BL30K/pictures")
    elif break_ == "missing clip":
        (root / "DAVIS/ImageSets/2017/train.txt").write_text("clip0\nghost\n")
    elif break_ == "no list":
        (root / "DAVIS/ImageSets/2017/train.txt").unlink()
    else:
        for path in (root / "YouTube/train/Annotations").glob("*/00000.png"):
            path.unlink()
    with pytest.raises(UsageError, match=message) as caught:
        train_stages([small(stage)], root, tmp_path / "out", StageRun(init=start))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_mask_of_another_size_or_without_objects_is_refused(tmp_path: Path) -> None:
    root = write_stage_data(tmp_path / "data", frames=3)
    folder = root / "BL30K/Annotations"
    for path in folder.glob("*/*.png"):
        path.write_bytes(palette_png(square(0, 70, 80)[1]))
    with pytest.raises(UsageError, match=r"\.png is 80x70, its picture 80x64: they must be of one size"):
        StageData(small("1"), root).batch(0, 0, 1)
    for path in folder.glob("*/*.png"):
        path.write_bytes(palette_png(np.zeros((64, 80), np.uint8)))
    with pytest.raises(UsageError, match="no object on the first frames of 20 clips in a row"):
        StageData(small("1"), root).batch(0, 0, 1)


def test_workers_prepare_the_same_batches_and_outlive_an_interrupt(tmp_path: Path) -> None:
    root = write_stage_data(tmp_path / "data", frames=3)
    config = small("1", batch=1, steps=12, workers=1)
    direct = StageData(config, root)
    prepared = _batches(direct, (0, 1), 2)
    for step in range(2, 8):
        np.testing.assert_array_equal(next(prepared).frames, direct.batch(step, 0, 1).frames)
        for worker in multiprocessing.active_children():  # as a terminal does, to all processes
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
    for path in (root / "BL30K/Annotations").glob("*/*.png"):
        path.write_bytes(palette_png(square(0, 70, 80)[1]))
    with pytest.raises(UsageError, match=r"\.png is 80x70, its picture 80x64: .*") as caught:
        list(prepared)
    assert "\n" not in str(caught.value)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", list("0123"))
def test_loss_falls_in_every_stage(stage: str, data: Path, start: str) -> None:
    config = small(stage, batch=1, lr=3e-3)
    torch.set_num_threads(1)
    trainer = StageTrainer(config, ALONE)
    trainer.model.load_state_dict(load_model(start).state_dict())
    batch = StageData(config, data).batch(0, 0, 1)
    losses = [trainer.step(0, batch)[0]["loss"] for _ in range(8)]
    assert losses[-1] < 0.85 * losses[0]


def test_a_chain_of_all_stages_from_the_command_line(
    tmp_path: Path, data: Path, start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    settings = [f"--set={k}={json.dumps(v)}" for k, v in (SMALL | {"pictures_every": 1, "steps": 1}).items()]
    arguments = ["train", "--stage", "0123", "--data", str(data), "--out", str(out), "--init", start]
    arguments += [*settings, "--validation", str(data / "DAVIS"), "--validation-split", "2017/val"]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0, capsys.readouterr().err
    before = load_file(start)
    for stage in "0123":
        folder = out / f"stage-{stage}"
        assert StageConfig.load(folder / "config.json").stage == stage
        (line,) = lines(folder / "log.csv")
        assert 0 < float(line["loss"]) < 10
        assert (folder / "pictures/00000001.jpg").stat().st_size > 500
        assert len(list((folder / "tensorboard").glob("events.out.tfevents.*"))) == 1
        (line,) = lines(folder / "validation.csv")
        assert 0 <= float(line["J&F"]) <= 100
        weights = load_file(folder / "weights.safetensors")
        assert (weights["decoder.pred.weight"] - before["decoder.pred.weight"]).abs().max() > 1e-6
        before = weights
    assert load_model(out / "stage-3/weights.safetensors").config == TINY
    # Again: everything is finished.
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    assert "stage 3 is finished" in capsys.readouterr().err.replace("\n", " ")
    with pytest.raises(SystemExit) as ended:
        cli.main(
            [
                "evaluate",
                str(data / "DAVIS"),
                "--split",
                "2017/val",
                "--model",
                f"{out}/stage-3/weights.safetensors",
            ]
        )
    assert ended.value.code == 0


def test_a_stage_starts_from_the_weights_of_the_one_before(tmp_path: Path, data: Path, start: str) -> None:
    chain = [small("0", steps=1), small("3", steps=1)]
    together, apart = tmp_path / "together", tmp_path / "apart"
    train_stages(chain, data, together, StageRun(init=start))
    first = train_stages(chain[:1], data, apart, StageRun(init=start))
    assert first is not None
    second = train_stages(chain[1:], data, apart, StageRun(init=str(first)))
    assert second is not None
    equal(together / "stage-3/weights.safetensors", second)


def test_a_stopped_run_continues_exactly(tmp_path: Path, data: Path, start: str) -> None:
    config = small("2", steps=2, finetune=1, workers=0, accumulate=2)
    whole = train_stages([config], data, tmp_path / "whole", StageRun(init=start))
    assert whole is not None
    stopped = train_stages([config], data, tmp_path / "cut", StageRun(init=start, max_hours=1e-9))
    assert stopped is None
    assert [x["step"] for x in lines(tmp_path / "cut/stage-2/log.csv")] == ["1"]
    again = train_stages([config], data, tmp_path / "cut", StageRun(init=start))
    assert again is not None
    equal(whole, again)
    seen = [
        [{k: v for k, v in x.items() if k != "s_per_step"} for x in lines(p.parent / "log.csv")]
        for p in (whole, again)
    ]
    assert seen[0] == seen[1]
    assert [x["step"] for x in seen[0]] == ["1", "2", "3"]


def test_accumulated_parts_equal_the_whole_batch(data: Path, start: str) -> None:
    states = []
    for accumulate in (1, 2):
        config = small("3", accumulate=accumulate, batch=2)
        trainer = StageTrainer(config, ALONE)
        trainer.model.load_state_dict(load_model(start).state_dict())
        batch = StageData(config, data).batch(0, 0, 2)
        values, _ = trainer.step(0, batch)
        states.append((values, {n: p.grad for n, p in trainer.model.named_parameters()}))
    (a, grads), (b, others) = states
    assert a == pytest.approx(b, rel=1e-4)
    for name, grad in grads.items():
        other = others[name]
        assert (grad is None) == (other is None), name
        if grad is not None and other is not None:
            scale = float(grad.abs().max())
            torch.testing.assert_close(grad, other, rtol=0, atol=1e-6 + 1e-3 * scale, msg=name)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UsageError, match="batch=3 is not allowed: must be a multiple of 2 processes"):
        StageTrainer(small("3", batch=3), Group(0, 2, torch.device("cpu")))


def test_bfloat16_trains(data: Path, start: str) -> None:
    config = small("3", amp="bfloat16", batch=1)
    trainer = StageTrainer(config, ALONE)
    trainer.model.load_state_dict(load_model(start).state_dict())
    values, labels = trainer.step(0, StageData(config, data).batch(0, 0, 1), show=True)
    assert np.isfinite(values["loss"])
    assert labels is not None
    assert labels.shape == (1, 3, 48, 48)


def test_two_processes_equal_one_with_the_doubled_batch_also_from_a_checkpoint(
    tmp_path: Path, data: Path, start: str
) -> None:
    """Two processes of torchrun on Gloo have half of the batch each; the run was begun by one process."""
    config = small("3", steps=2)
    alone = train_stages([config], data, tmp_path / "one", StageRun(init=start))
    assert alone is not None
    train_stages([config], data, tmp_path / "two", StageRun(init=start, max_hours=1e-9))
    config.save(tmp_path / "stage.json")
    command = [str(Path(sysconfig.get_path("scripts")) / "torchrun"), "--standalone", "--nproc-per-node=2"]
    command += ["-m", "jobs.cli", "train", "--config", str(tmp_path / "stage.json"), "--set=workers=1"]
    command += ["--data", str(data), "--out", str(tmp_path / "two"), "--init", start]
    running = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said = running.communicate(timeout=300)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 0, said
    # Adam's step has the size of the learning rate, 1e-3, also where a gradient is hardly more than rounding.
    own, other = load_file(alone), load_file(tmp_path / "two/stage-3/weights.safetensors")
    apart = torch.cat([(own[n].double() - other[n].double()).abs().flatten() for n in own])
    assert float(apart.mean()) < 1e-5
    one, two = (lines(tmp_path / f"{n}/stage-3/log.csv") for n in ("one", "two"))
    assert [x["step"] for x in two] == ["1", "2"]
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "ce", "dice", "iou", "grad_norm"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3)


# --- what cannot be started from -------------------------------------------------------------------


def test_a_folder_or_checkpoint_of_another_stage_or_model_is_refused(
    tmp_path: Path, data: Path, start: str
) -> None:
    out = tmp_path / "out"
    assert train_stages([small("0", steps=1)], data, out, StageRun(init=start))
    (out / "stage-0").rename(out / "stage-3")
    with pytest.raises(UsageError, match="stage-3 holds a run of stage 0, not of this stage 3"):
        train_stages([small("3")], data, out, StageRun(init=start))
    small("3").save(out / "stage-3/config.json")
    (out / "stage-3/weights.safetensors").unlink()
    with pytest.raises(UsageError, match="checkpoint-00000001 was made with another stage"):
        train_stages([small("3")], data, out, StageRun(init=start))
    wide = TINY.to_dict() | {"key_dim": 32}
    with pytest.raises(UsageError, match="another shape than this stage"):
        train_stages([small("0", model=wide)], data, tmp_path / "new", StageRun(init=start))
    with pytest.raises(UsageError, match="initial weights: "):
        train_stages([small("0")], data, tmp_path / "new", StageRun(init=str(tmp_path / "none.pth")))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stage", "7"), "--stage '7' is not allowed"),
        (("--stage", "0", "--config", "x.json"), "--stage and --config exclude each other"),
        (("--stage", "0", "--set", "batch=0"), "batch=0 is not allowed: at least 1"),
        (("--stage", "0", "--set", "device=cuda:9"), "no CUDA"),
        (("--backbone", "x.pth"), "--backbone, --validation and --validation-split are for stages"),
        (("--processes", "2"), "--address and --processes are for stages"),
        (("--stage", "0", "--validation", "nowhere"), "nowhere is no folder"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--data", str(data), "--out", str(tmp_path / "out"), *arguments])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_imagenet_weights_start_both_encoders(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source, target = XMem(ModelConfig()), XMem(ModelConfig())
    key = {n.replace("res2.", "layer1."): t for n, t in source.key_encoder.state_dict().items()}
    value = {
        n: t for n, t in source.value_encoder.state_dict().items() if n.startswith(("conv1", "bn1", "layer"))
    }
    value["conv1.weight"] = value["conv1.weight"][:, :3]
    torch.save({**key, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "resnet50.pth")
    torch.save({**value, "fc.weight": torch.zeros(1000, 512)}, tmp_path / "resnet18.pth")
    own = target.value_encoder.conv1.weight[:, 3:].clone()
    load_resnets(target, [tmp_path / "resnet18.pth", tmp_path / "resnet50.pth"])
    for name, tensor in source.key_encoder.state_dict().items():
        assert torch.equal(target.key_encoder.state_dict()[name], tensor), name
    for name in ("layer3.1.conv2.weight", "layer1.0.bn2.running_var", "bn1.bias"):
        states = [model.value_encoder.state_dict()[name] for model in (source, target)]
        assert torch.equal(states[0], states[1]), name
    assert torch.equal(target.value_encoder.conv1.weight[:, :3], source.value_encoder.conv1.weight[:, :3])
    assert torch.equal(target.value_encoder.conv1.weight[:, 3:], own)
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises(UsageError, match=r"text\.pth is no checkpoint of a ResNet"):
        load_resnets(target, [tmp_path / "text.pth"])
    del value["layer2.0.conv1.weight"]
    torch.save(value, tmp_path / "part.pth")
    with pytest.raises(UsageError, match=r"part\.pth does not fit the model: layer2\.0\.conv1\.weight"):
        load_resnets(target, [tmp_path / "part.pth"])

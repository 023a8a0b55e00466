from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.pictures import write_pictures
from support.tiny import TINY, tiny_model

from xmem_core import MemoryConfig, Prompt, VideoSegmenter
from xmem_core.config import ModelConfig
from xmem_core.network import XMem
from xmem_core.training import keep
from xmem_core.training.clips import Batch, ClipOptions, make_batch
from xmem_core.training.library import Library
from xmem_core.training.loader import batches
from xmem_core.training.narrow import narrow
from xmem_core.training.settings import RECIPE, Phase, TrainConfig
from xmem_core.training.speed import tune_for_cpu
from xmem_core.training.trainer import Trainer, train
from xmem_core.training.unroll import Plan, draw_plan, one_hot, unroll
from xmem_core.weights import save_weights

pytestmark = pytest.mark.slow

SMALL = TrainConfig(
    model=TINY,
    phases=(Phase(size=64, batch=2), Phase(from_step=3, size=64, batch=2, frames=4, max_objects=3)),
    seed=3,
    steps=6,
    warmup=2,
    hard_start=1,
    hard_end=4,
    freeze_norm=0.7,
    checkpoint_every=3,
    log_every=1,
    held_out_people=0,
    threads=1,
    workers=0,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def undisturbed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    train(SMALL, root, out)
    return out


def log_without_times(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "s_per_step"} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    assert log_without_times(a) == log_without_times(b)
    for name in ("model", "averaged"):
        ours, theirs = (load_file(x / "checkpoint-00000006" / f"{name}.safetensors") for x in (a, b))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours), name
    assert (a / "weights-ema.safetensors").read_bytes() == (b / "weights-ema.safetensors").read_bytes()


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    """Runs `action` in the middle of a step."""
    plain = Trainer.step

    def stepping(self: Trainer, number: int, batch: Batch) -> dict[str, float]:
        if number == step:
            action()
        return plain(self, number, batch)

    monkeypatch.setattr(Trainer, "step", stepping)


# Whole runs


def test_a_run_leaves_its_files_and_the_newest_two_checkpoints(undisturbed: Path) -> None:
    assert sorted(p.name for p in undisturbed.iterdir()) == [
        "checkpoint-00000003",
        "checkpoint-00000006",
        "config.json",
        "log.jsonl",
        "loss.png",
        "weights-ema.safetensors",
    ]
    assert TrainConfig.load(undisturbed / "config.json") == SMALL
    lines = log_without_times(undisturbed)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite([line["loss"], line["ce"], line["dice"], line["grad"]]).all() for line in lines)
    assert (undisturbed / "weights-ema.safetensors").stat().st_size < 2.2 * sum(
        p.numel() for p in XMem(TINY).parameters()
    )


def test_a_crashed_run_gone_on_with_equals_an_undisturbed_one(
    root: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        stop_at(patch, 4, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(SMALL, root, tmp_path)
    # Step 4 was logged after the checkpoint at 3, and a line torn by the crash follows it.
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert keep.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-00000003"
    train(SMALL, root, tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_sigterm_ends_a_run_with_a_checkpoint_of_its_step(
    root: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        stop_at(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(SMALL, root, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    assert keep.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-00000002"
    train(SMALL, root, tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_max_hours_ends_a_run_with_a_checkpoint(root: Path, tmp_path: Path) -> None:
    train(replace(SMALL, max_hours=1e-9), root, tmp_path)
    assert keep.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-00000001"


def test_another_seed_is_another_run_and_is_not_mixed_in(
    root: Path, undisturbed: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="was made with another seed"):
        train(replace(SMALL, seed=4), root, undisturbed)
    other = replace(SMALL, seed=4, steps=2, warmup=1)
    train(other, root, tmp_path)
    assert log_without_times(tmp_path)[0]["loss"] != log_without_times(undisturbed)[0]["loss"]


def test_a_finished_run_started_again_stays_as_it_is(root: Path, undisturbed: Path) -> None:
    before = {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file()}
    assert train(SMALL, root, undisturbed) == undisturbed / "weights-ema.safetensors"
    assert {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file()} == before


def test_without_resume_a_run_starts_over(root: Path, undisturbed: Path, tmp_path: Path) -> None:
    train(replace(SMALL, steps=3), root, tmp_path)
    train(SMALL, root, tmp_path, resume=False)
    assert_same_run(tmp_path, undisturbed)


def test_a_half_written_checkpoint_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-00000009.partial").mkdir()
    assert keep.latest_checkpoint(tmp_path) is None


def spoil(out: Path, step: int, name: str, damage: str) -> None:
    path = out / f"checkpoint-{step:08d}" / name
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", "flipped"),
        ("averaged.safetensors", "gone"),
        ("optimizer.pt", "cut"),
        ("state.json", "cut"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    root: Path,
    undisturbed: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: str,
) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    spoil(out, 6, name, damage)
    train(SMALL, root, out)
    assert "checkpoint-00000006 is damaged" in caplog.text
    assert_same_run(out, undisturbed)


def test_nothing_but_damaged_checkpoints_is_an_error_that_names_them(
    root: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    for step in (3, 6):
        spoil(out, step, "optimizer.pt", "cut")
    with pytest.raises(
        ValueError, match=r"00000006 is damaged: optimizer.pt .*-00000003 is damaged"
    ) as caught:
        train(SMALL, root, out)
    assert "\n" not in str(caught.value)
    # Nothing was touched, and starting over takes nothing of it along.
    assert len(log_without_times(out)) == 6
    train(SMALL, root, out, resume=False)
    assert_same_run(out, undisturbed)


def test_checkpoints_without_digests_are_taken_and_damage_still_seen(
    undisturbed: Path, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint-00000006"
    shutil.copytree(undisturbed / path.name, path)
    state = json.loads((path / "state.json").read_text())
    del state["sha256"]
    (path / "state.json").write_text(json.dumps(state))
    trainer = Trainer(SMALL)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    kept = (path / "optimizer.pt").read_bytes()
    (path / "optimizer.pt").write_bytes(kept[:1000])
    with pytest.raises(keep.DamagedCheckpointError, match="00000006 is damaged"):
        keep.load_checkpoint(path, trainer.model, trainer.averaged, trainer.optimizer, SMALL)
    # All or nothing: the weights had been read, but not taken over.
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    (path / "optimizer.pt").write_bytes(kept)
    assert keep.load_checkpoint(path, trainer.model, trainer.averaged, trainer.optimizer, SMALL) == 6


def test_starting_over_leaves_no_checkpoint_of_the_run_before(
    root: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    train(replace(SMALL, steps=2, warmup=0), root, out, resume=False)
    assert [p.name for p in keep.checkpoints(out)] == ["checkpoint-00000002"]


def test_no_pictures_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no training pictures under"):
        train(SMALL, tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_published_weights_have_the_frozen_statistics(undisturbed: Path) -> None:
    """The last step keeps the value encoder's statistics, since the weights were trained with them."""
    newest = undisturbed / "checkpoint-00000006"
    own, averaged = load_file(newest / "model.safetensors"), load_file(newest / "averaged.safetensors")
    name = "value_encoder.bn1.running_mean"
    assert torch.equal(averaged[name], own[name])
    assert not torch.equal(averaged["value_encoder.bn1.weight"], own["value_encoder.bn1.weight"])
    published = load_file(undisturbed / "weights-ema.safetensors")
    assert torch.equal(published[name], own[name].half())


def test_a_loss_that_is_not_a_number_changes_no_weights(root: Path, tmp_path: Path) -> None:
    trainer = Trainer(SMALL)
    with torch.no_grad():
        bias = trainer.model.decoder.pred.bias
        assert bias is not None
        bias.fill_(float("nan"))
    before = {k: v.clone() for k, v in trainer.model.named_parameters()}
    result = trainer.step(0, next(batches(SMALL, root, 0, 1)))
    assert not np.isfinite(result["loss"])
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.named_parameters() if "pred" not in k)


# What a step trains


def test_the_frozen_part_and_imagenets_statistics_stay(undisturbed: Path) -> None:
    start = Trainer(SMALL).model.state_dict()
    end = load_file(undisturbed / "checkpoint-00000006" / "model.safetensors")
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    stem = ("key_encoder.conv_stem.", "key_encoder.bn0.", *(f"key_encoder.blocks.{i}." for i in range(3)))
    assert not [n for n in changed if n.startswith(stem)]
    assert not [n for n in changed if n.startswith("key_encoder.") and "running" in n]
    for name in (
        "key_encoder.blocks.10.project_conv.weight",
        "value_encoder.conv1.weight",
        "value_encoder.bn1.running_mean",
        "value_encoder.hidden_reinforce.transform.weight",
        "decoder.hidden_update.transform.weight",
        "key_proj.e_proj.weight",
    ):
        assert name in changed
    untouched = set(start) - changed - {n for n in start if n.startswith(stem)}
    # So narrow, the channel gate has one unit behind its ReLU; where that is always 0, its bias stays.
    dead = "attention.ChannelGate.mlp.1.bias"
    assert not [n for n in untouched if "running" not in n and "num_batches" not in n and dead not in n]


def test_the_value_encoders_statistics_stay_from_freeze_norm_on(root: Path) -> None:
    config = replace(SMALL, freeze_norm=0.5)
    trainer = Trainer(config)
    batch = next(batches(config, root, 0, 1))
    mean = trainer.model.value_encoder.bn1.running_mean
    assert mean is not None
    seen = [mean.clone()]
    for step in (2, 3):
        trainer.step(step, batch)
        seen.append(mean.clone())
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])


def test_the_loss_of_one_batch_falls(root: Path) -> None:
    config = replace(SMALL, steps=100, lr=3e-3, warmup=1, hard_start=1000, hard_end=2000, bf16=False)
    trainer = Trainer(config)
    batch = make_batch(Library(root, 0), ClipOptions(size=64, mixture=(0, 1, 0), max_objects=1), 0, 0, 2)
    losses = [trainer.step(step, batch)["loss"] for step in range(30)]
    assert np.mean(losses[-3:]) < 0.75 * np.mean(losses[:3])


def test_learning_rate_rises_then_falls_to_its_last() -> None:
    trainer = Trainer(replace(SMALL, steps=1000, warmup=100, lr=1e-3, last_lr=0.01))
    rates = [trainer.learning_rate(s) for s in (0, 49, 99, 100, 550, 1000)]
    assert rates == pytest.approx([1e-5, 5e-4, 1e-3, 1e-3, 1e-3 * (0.01 + 0.99 / 2), 1e-5])


def test_the_backbone_learns_slower_and_biases_do_not_decay(root: Path) -> None:
    trainer = Trainer(replace(SMALL, warmup=0, weight_decay=0.05, backbone_lr=0.25))
    trainer.step(0, next(batches(SMALL, root, 0, 1)))
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        members = [names[id(p)] for p in group["params"]]
        backbone = {n.startswith("key_encoder.") for n in members}
        assert len(backbone) == 1
        assert group["lr"] == pytest.approx(4e-4 * (0.25 if backbone == {True} else 1.0))
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}
    grouped = [n for g in trainer.optimizer.param_groups for n in (names[id(p)] for p in g["params"])]
    assert sorted(grouped) == sorted(n for n, p in trainer.model.named_parameters() if p.requires_grad)


def test_the_average_forgets_fast_at_first_and_slowly_later() -> None:
    trainer = Trainer(replace(SMALL, ema=0.9))
    name = "decoder.pred.weight"
    start = trainer.averaged[name].clone()
    with torch.no_grad():
        trainer.model.decoder.pred.weight.add_(1.0)
    trainer._average(0)
    assert torch.allclose(trainer.averaged[name], start + 0.9)
    trainer._average(10_000)
    assert torch.allclose(trainer.averaged[name], start + 0.9 + 0.01)


# Unrolling


def clip_inputs(frames: int = 4, objects: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    masks = torch.zeros(1, objects, 64, 64)
    for i in range(objects):
        masks[0, i, 8 + 24 * i : 24 + 24 * i, 10:40] = 1
    return torch.randn(1, frames, 3, 64, 64, generator=rng), masks


def test_frames_see_only_what_is_before_them() -> None:
    model = XMem(TINY).eval()
    images, masks = clip_inputs()
    plan = draw_plan(np.random.default_rng(0), 4, 0.5)
    changed = images.clone()
    changed[:, 2] += 1
    with torch.no_grad():
        a, b = (unroll(model, x, masks, torch.ones(1, 2), plan) for x in (images, changed))
    assert len(a) == 3
    assert a[0].shape == (1, 3, 64, 64)
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[1], b[1])
    assert not torch.equal(a[2], b[2])


@pytest.mark.parametrize(
    ("settings", "plan"),
    [
        # Only the first frame is remembered; the sensory memory goes on by the decoder alone.
        ({"mem_every": 100}, Plan(((), (0,), (0,), (0,)), (True, False, False, False))),
        # Every frame is remembered and renews the sensory memory, after the decoder did.
        (
            {"mem_every": 1, "deep_update_every": 1},
            Plan(((), (0,), (0, 1), (0, 1, 2)), (True, True, True, True)),
        ),
    ],
)
def test_training_computes_what_tracking_computes(settings: dict[str, Any], plan: Plan) -> None:
    """From the same pixels: channel order and scaling, masks, memory, readout, gates, aggregation."""
    model = tiny_model(1)
    rng = np.random.default_rng(2)
    frames = rng.integers(0, 256, (4, 64, 80, 3), dtype=np.uint8)
    labels = np.zeros((64, 80), np.uint8)
    labels[8:30, 10:40], labels[30:60, 35:70] = 1, 2
    segmenter = VideoSegmenter(model, MemoryConfig(top_k=10_000, **settings))
    state = segmenter.new_state()
    tracked = [
        segmenter.step(state, frame, Prompt({1: labels == 1, 2: labels == 2}) if t == 0 else None)
        for t, frame in enumerate(frames)
    ]
    batch = Batch(
        frames[None], np.repeat(labels[None, None], 4, 1), np.array([2], np.int64), kinds=("stills",)
    )
    images, truth = Trainer(SMALL)._tensors(batch)
    with torch.no_grad():
        logits = unroll(model, images, one_hot(truth[:, 0], 2), torch.ones(1, 2), plan)
    for result, ours in zip(tracked[1:], logits, strict=True):
        theirs = result.probabilities
        assert theirs.std() > 1e-3
        assert torch.allclose(torch.softmax(ours[0], 0), theirs, atol=2e-5)


def test_an_absent_object_is_never_painted_and_changes_nobody() -> None:
    model = XMem(TINY).eval()
    images, masks = clip_inputs()
    plan = draw_plan(np.random.default_rng(0), 4, 0.5)
    with torch.no_grad():
        alone = unroll(model, images, masks[:, :1], torch.ones(1, 1), plan)
        padded_masks = masks * torch.tensor([1.0, 0.0])[None, :, None, None]
        padded = unroll(model, images, padded_masks, torch.tensor([[1.0, 0.0]]), plan)
    for a, b in zip(alone, padded, strict=True):
        assert torch.allclose(a.softmax(1)[:, :2], b.softmax(1)[:, :2], atol=1e-4)
        assert float(b.softmax(1)[:, 2].max()) < 1e-5


def test_plans_read_the_first_frame_and_earlier_ones() -> None:
    deep: list[Any] = []
    for seed in range(100):
        plan = draw_plan(np.random.default_rng(seed), 6, 0.2)
        assert plan.read[0] == ()
        for t in range(1, 6):
            assert plan.read[t][0] == 0
            assert max(plan.read[t]) < t
            assert len(set(plan.read[t])) == len(plan.read[t]) == min(t, 3)
        assert plan.deep[0]
        deep += plan.deep[1:]
    assert 0.1 < np.mean(deep) < 0.3


def test_aged_frames_are_run_but_not_learnt_from() -> None:
    model = XMem(TINY).eval()
    images, masks = clip_inputs(frames=6)
    plan = draw_plan(np.random.default_rng(0), 6, 0.5)
    with torch.no_grad():
        all_of_them = unroll(model, images, masks, torch.ones(1, 2), plan)
        aged = unroll(model, images, masks, torch.ones(1, 2), plan, aged=3)
    assert len(aged) == 2
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(aged, all_of_them[3:], strict=True))


@pytest.mark.parametrize("bf16", [False, True])
def test_every_weight_learns_after_aged_frames(bf16: bool) -> None:
    """Autocast keeps cast weights: those cast without gradients would be used, and not trained."""
    images, masks = clip_inputs(frames=5)
    plan = Plan(((), (0,), (0, 1), (0, 2), (0, 3)), (True,) * 5)

    def learning(aged: int) -> set[str]:
        torch.manual_seed(1)
        model = XMem(TINY).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = unroll(model, images, masks, torch.ones(1, 2), plan, aged=aged)
        torch.stack([out.float().square().mean() for out in outputs]).sum().backward()
        return {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}

    assert "decoder.pred.weight" in learning(2)
    assert learning(2) == learning(0)


def test_a_step_ages_its_clips_by_a_number_of_its_own(root: Path) -> None:
    config = replace(SMALL, phases=(Phase(size=64, batch=1, frames=2, aged=3),))
    ages = [config.aged(step) for step in range(40)]
    assert set(ages) == {0, 1, 2, 3}
    assert [config.aged(step) for step in range(40)] == ages
    made = batches(config, root, 0, 6)
    assert [b.frames.shape[1] for b in made] == [2 + a for a in ages[:6]]
    assert SMALL.aged(0) == 0
    with pytest.raises(ValueError, match="aged=-1"):
        Phase(aged=-1)


def test_a_step_with_aged_frames_compares_the_right_frames(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, phases=(Phase(size=64, batch=1, frames=3, aged=2),))
    step = next(s for s in range(5, 100, 5) if config.aged(s) == 2)
    (batch,) = list(batches(config, root, step, step + 1))
    seen: list[torch.Tensor] = []

    def watched(logits: torch.Tensor, labels: torch.Tensor, fraction: float) -> torch.Tensor:
        seen.append(labels)
        return logits.mean()

    monkeypatch.setattr("xmem_core.training.trainer.bootstrapped_cross_entropy", watched)
    Trainer(config).step(step, batch)
    wanted = torch.from_numpy(batch.labels[:, 3:]).long()
    assert torch.equal(torch.stack(seen, 1), wanted)


def test_weights_on_the_trunks_features_take_smaller_steps() -> None:
    plain, scaled = (Trainer(replace(SMALL, feature_scale=s)) for s in (1.0, 5.0))
    moved: list[dict[str, torch.Tensor]] = []
    for trainer in (plain, scaled):
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        for p in trainer.model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        trainer._update()
        moved.append({n: p.detach() - before[n] for n, p in trainer.model.named_parameters()})
    for name, move in moved[0].items():
        ours = moved[1][name]
        if name == "decoder.fuser.block1.conv1.weight":
            n = plain.model.key_encoder.channels[0]
            assert torch.allclose(ours[:, :n], move[:, :n] / 5, atol=1e-7)
            assert torch.allclose(ours[:, n:], move[:, n:], atol=1e-7)
        elif name == "decoder.up_8_4.skip_conv.weight":
            assert move.any()
            assert torch.allclose(ours, move / 5, atol=1e-7)
        elif name == "decoder.pred.weight":
            assert torch.allclose(ours, move, atol=1e-7)
    with pytest.raises(ValueError, match="feature_scale=0"):
        replace(SMALL, feature_scale=0)


def test_whitened_keys_have_variance_1_and_shrinkage_is_near_1(root: Path) -> None:
    trainer = Trainer(SMALL)
    trainer.whiten_keys(Library(root, 0))
    with torch.no_grad():
        batch = make_batch(Library(root, 0), ClipOptions(size=64), 0, 0, 8)
        images, _ = trainer._tensors(batch)
        features = trainer.model.encode_key(images[:, 0].contiguous())
    assert 0.2 < float(features.key.std()) < 3
    assert 1 <= float(features.shrinkage.mean()) < 1.6
    assert abs(float(features.selection.mean()) - 0.5) < 0.3
    weight = trainer.averaged["key_proj.key_proj.weight"]
    assert torch.equal(weight, trainer.model.state_dict()["key_proj.key_proj.weight"])


def test_whitening_makes_keys_of_variance_1_that_do_not_depend_on_each_other() -> None:
    torch.manual_seed(0)
    projection = XMem(replace(TINY, key_dim=8)).key_proj
    channels = projection.key_proj.in_channels
    f16 = torch.randn(5000, channels) @ torch.randn(channels, channels) * 6 + 3
    projection.whiten(f16)
    # Positions as images of one pixel: a 3x3 convolution's neighbours are padding.
    key, shrinkage, _ = projection(f16[:, :, None, None])
    covariance = torch.cov(key.detach().flatten(1).T)
    assert torch.allclose(covariance, torch.eye(8), atol=0.1)
    assert float(shrinkage.detach().mean()) < 1.5
    with pytest.raises(ValueError, match="rows"):
        projection.whiten(f16[: channels - 1])


def test_one_hot() -> None:
    masks = one_hot(torch.tensor([[[0, 1], [2, 1]]]), 3)
    assert masks.tolist() == [[[[0, 1], [0, 1]], [[0, 0], [1, 0]], [[0, 0], [0, 0]]]]


def test_tuning_for_the_cpu_keeps_results_and_names() -> None:
    model = XMem(TINY).eval()
    images, masks = clip_inputs()
    plan = draw_plan(np.random.default_rng(0), 4, 0.5)
    names = list(model.state_dict())
    with torch.no_grad():
        before = unroll(model, images, masks, torch.ones(1, 2), plan)
        tune_for_cpu(model)
        after = unroll(model, images, masks, torch.ones(1, 2), plan)
    assert list(model.state_dict()) == names
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(before, after, strict=True))


# Loader, weights, settings


def test_a_worker_process_makes_the_same_batches(root: Path) -> None:
    here = list(batches(SMALL, root, 2, 5))
    beside = list(batches(replace(SMALL, workers=1), root, 2, 5))
    assert [b.frames.shape[1] for b in here] == [3, 4, 4]
    for a, b in zip(here, beside, strict=True):
        assert np.array_equal(a.frames, b.frames)
        assert np.array_equal(a.labels, b.labels)
        assert np.array_equal(a.objects, b.objects)


def test_a_worker_without_pictures_fails_the_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no training pictures"):
        next(batches(replace(SMALL, workers=1), tmp_path, 0, 1))


def test_published_weights_start_another_run(root: Path, undisturbed: Path, tmp_path: Path) -> None:
    published = undisturbed / "weights-ema.safetensors"
    trainer = Trainer(SMALL)
    trainer.use_weights(published)
    averaged = load_file(undisturbed / "checkpoint-00000006" / "averaged.safetensors")
    for name, value in trainer.model.state_dict().items():
        assert torch.allclose(value.float(), averaged[name].float(), atol=1e-3, rtol=1e-3), name
        assert torch.equal(value, trainer.averaged[name])
    train(replace(SMALL, steps=1, warmup=0), root, tmp_path, init=published)
    assert log_without_times(tmp_path)[0]["loss"] != log_without_times(undisturbed)[0]["loss"]


def test_a_run_may_start_from_the_mean_of_weights(root: Path, undisturbed: Path, tmp_path: Path) -> None:
    published = undisturbed / "weights-ema.safetensors"
    other = tmp_path / "other.safetensors"
    save_weights(tiny_model(5), other)
    trainer = Trainer(SMALL)
    trainer.use_weights(published, other)
    one, two = load_file(published), load_file(other)
    for name, value in trainer.model.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, (one[name].float() + two[name].float()) / 2, atol=1e-6), name
            assert torch.equal(value, trainer.averaged[name])
    train(replace(SMALL, steps=1, warmup=0), root, tmp_path / "run", init=[published, other])
    assert len(log_without_times(tmp_path / "run")) == 1


def test_weights_of_another_shape_are_refused(undisturbed: Path) -> None:
    trainer = Trainer(replace(SMALL, model=replace(TINY, value_dim=32)))
    with pytest.raises(ValueError, match="another shape"):
        trainer.use_weights(undisturbed / "weights-ema.safetensors")


def test_settings_survive_json(tmp_path: Path) -> None:
    config = replace(SMALL, lr=1e-3, phases=(Phase(), Phase(from_step=9, mixture=(1, 0, 0))))
    config.save(tmp_path / "c.json")
    assert TrainConfig.load(tmp_path / "c.json") == config
    assert TrainConfig().model == ModelConfig.lite()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 3}, "unknown training setting stepz"),
        ({"phases": [{"sise": 64}]}, "unknown phase setting sise"),
        ({"phases": [{"from_step": 5}]}, "the first must start at 0"),
        ({"phases": [{}, {"from_step": 5}, {"from_step": 5}]}, "later, in order"),
        ({"phases": []}, "the first must start at 0"),
        ({"phases": [{"size": 50}]}, "multiple of 16"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 10, "warmup": 10}, "warmup is 10"),
        ({"ema": 1.0}, "ema must be in"),
        ({"workers": 2}, "workers is 2"),
        ({"threads": 0}, "threads 0"),
        ({"steps": "many"}, "steps='many' is not allowed: a whole number"),
        ({"seed": 1.5}, "seed=1.5 is not allowed: a whole number"),
        ({"lr": True}, "lr=True is not allowed: a number"),
        ({"lr": float("nan")}, "lr=nan is not allowed"),
        ({"bf16": 1}, "bf16=1 is not allowed: true or false"),
        ({"phases": 3}, "phases=3 is not allowed"),
        ({"phases": [3]}, "phase 3 is not allowed"),
        ({"phases": [{"mixture": [1, "x", 0]}]}, "mixture="),
    ],
)
def test_bad_settings_say_what_is_wrong(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(values)


def test_the_runs_before_the_bundled_models_made_weights_that_it_can_start_from() -> None:
    names = ("xmem-lite-start.json", "xmem-lite-more.json", "xmem-lite-memory.json")
    wide, *others = (TrainConfig.load(RECIPE.with_name(name)).model for name in names)
    assert others == [wide] * 2
    for name in ("xmem-lite-narrow.json", "xmem-lite-leave.json"):
        assert TrainConfig.load(RECIPE.with_name(name)).model == ModelConfig.lite()
    narrow(XMem(wide).state_dict(), wide, ModelConfig.lite())


def test_the_recipe_of_the_bundled_model_is_valid() -> None:
    config = TrainConfig.load(RECIPE)
    assert config.model == ModelConfig.lite()
    assert len(config.phases) > 1
    assert config.held_out_people == 100
    assert not config.whiten_keys  # the run before made them


def test_settings_that_are_no_object_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(ValueError, match="a JSON object"):
        TrainConfig.load(tmp_path / "c.json")


def test_overrides_replace_and_refuse() -> None:
    assert SMALL.with_overrides({"phases": [{"size": 96}]}).phases == (Phase(size=96),)
    assert SMALL.with_overrides({"steps": 9, "lr": None}) == replace(SMALL, steps=9)
    with pytest.raises(ValueError, match="unknown training setting sped"):
        SMALL.with_overrides({"sped": 1})


def test_phases_begin_at_their_step() -> None:
    config = TrainConfig(phases=(Phase(), Phase(from_step=10, frames=4), Phase(from_step=20, frames=5)))
    assert [config.phase(s).frames for s in (0, 9, 10, 19, 20, 5000)] == [3, 3, 4, 4, 5, 5]

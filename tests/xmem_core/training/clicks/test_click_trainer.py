"""Training of the click model on made-up pictures; simulated clicks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.pictures import write_pictures

from jobs.training.lite import run
from pipeline.prompts.click_network import ClickNetwork
from pipeline.prompts.clicks import Click
from xmem_core.clicks import ClickConfig
from xmem_core.training.clicks.samples import ClickLibrary, draw_sample, held_out_clips, held_out_still
from xmem_core.training.clicks.settings import RECIPE, ClickPhase, ClickTrainConfig
from xmem_core.training.clicks.simulated import first_clicks, next_click
from xmem_core.training.clicks.trainer import ClickTrainer

SMALL = ClickConfig(dims=(16, 8, 8, 8), click_dims=(4, 4, 8), heads=2, attention_blocks=1, size=64)


def settings(steps: int) -> ClickTrainConfig:
    return ClickTrainConfig(
        model=SMALL,
        phases=(ClickPhase(size=64, batch=2, passes=(1, 0)),),
        steps=steps,
        warmup=1,
        lr=3e-3,
        ema=0.5,
        threads=1,
        log_every=1,
        bf16=False,
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), clips=6)


def test_the_loss_falls_on_a_batch(pictures: Path) -> None:
    trainer = ClickTrainer(settings(30))
    library = ClickLibrary(pictures)
    batch = [draw_sample(library, 64, np.random.default_rng(n)) for n in range(2)]
    losses = [trainer.step(step, batch)["loss"] for step in range(12)]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:2])


def test_a_run_that_was_stopped_ends_the_same_and_its_weights_are_used(
    pictures: Path, tmp_path: Path
) -> None:
    config = tmp_path / "clicks.json"
    settings(2).save(config)
    whole = run(str(config), str(pictures), str(tmp_path / "whole"), {})
    run(str(config), str(pictures), str(tmp_path / "cut"), {"max_hours": 1e-9})
    cut = run(str(config), str(pictures), str(tmp_path / "cut"), {})
    assert cut.read_bytes() == whole.read_bytes()
    assert ClickNetwork(whole).segment(np.zeros((40, 50, 3), np.uint8), [Click(20, 20)], None)[20, 20]


def test_the_recipe_can_be_read() -> None:
    assert ClickTrainConfig.load(RECIPE).model == ClickConfig()
    assert ClickTrainConfig.load(RECIPE.with_name("xmem-click-start.json")).steps == 1900


def test_held_out_pictures_are_not_drawn(pictures: Path) -> None:
    library = ClickLibrary(pictures)
    names = [p.name for p in sorted((pictures / "davis/JPEGImages").iterdir())]
    left = {clip[0][0].parent.name for clip in library.clips}
    assert left == set(names) - set(held_out_clips(names))
    assert len(left) == 2
    for kind, stills in library.stills.items():
        assert not any(held_out_still(kind, p.stem) for p in stills)
    share = np.mean([held_out_still("ecssd", f"{i:04d}") for i in range(1000)])
    assert 0.07 < share < 0.13


def test_samples_depend_on_the_generator_only_and_show_their_object(pictures: Path) -> None:
    library = ClickLibrary(pictures)
    for seed in range(20):
        sample = draw_sample(library, 64, np.random.default_rng(seed))
        again = draw_sample(library, 64, np.random.default_rng(seed))
        assert np.array_equal(sample.picture, again.picture)
        assert np.array_equal(sample.mask, again.mask)
        assert sample.picture.shape == (64, 64, 3)
        assert sample.mask.sum() >= 60


def test_a_simulated_user_clicks_at_the_centre_of_the_largest_error() -> None:
    truth = np.zeros((60, 80), bool)
    truth[10:41, 20:51] = True
    nothing = np.zeros_like(truth)
    x, y, positive = next_click(nothing, truth) or (0, 0, False)
    assert (x, y, positive) == (35, 25, True)
    too_much = truth.copy()
    too_much[45:58, 60:78] = True
    x, y, positive = next_click(too_much, truth) or (0, 0, True)
    assert not positive
    assert 60 <= x < 78
    assert 45 <= y < 58
    assert next_click(truth, truth) is None


def test_first_clicks_agree_with_the_truth() -> None:
    truth = np.zeros((64, 64), bool)
    truth[20:50, 14:40] = True
    for seed in range(30):
        clicks = first_clicks(truth, np.random.default_rng(seed))
        assert clicks[0][2]
        for x, y, positive in clicks:
            assert bool(truth[int(y), int(x)]) == positive

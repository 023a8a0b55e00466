"""Fit the weights of `pipeline/prompts/mask_choice.py` on objects of the training pictures.

Clicks are simulated, half of them in the centre of the largest error, half anywhere in its inner half. Which
of the masks goes on to the next click is drawn: the best, one by the weights in force, or any. Prints what
the choice gains on pictures that were left out of the fit, and the weights. Minutes of CPU time; by hand:

    OMP_NUM_THREADS=1 python tests/benchmarks/mask_choice.py DATA
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from clicks import objects
from numpy.typing import NDArray

from pipeline.prompts import mask_choice
from pipeline.prompts.click_network import ClickNetwork
from pipeline.prompts.clicks import Click, Mask
from pipeline.prompts.mask_choice import FEATURES, Candidate, Round
from xmem_core.training.clicks.samples import ClickLibrary
from xmem_core.training.clicks.simulated import next_click

# Objects of each kind, at most so many of one picture.
COUNTS = {"ecssd": 25, "people": 20, "coco": 80, "davis": 20, "video": 20}
FROM_ONE = 3
CLICKS = 4
FOLDS = 5


class State(NamedTuple):
    """What could be chosen from after a click: features and IoU of each candidate; the picture's name."""

    kind: str
    picture: str
    features: NDArray[np.float64]
    ious: NDArray[np.float64]
    today: int  # by the weights in force


def collect(data: Path, random: np.random.Generator) -> list[State]:
    """The states of all objects."""
    library = ClickLibrary(data / "train")
    pictures = {
        kind: [(p, p.with_suffix(".png")) for p in library.stills[kind]]
        for kind in ("ecssd", "people", "coco")
    }
    pictures["davis"] = [pair for clip in library.clips for pair in clip[1::5]]
    pictures["video"] = [pair for clip in library.others for pair in clip[1::5]]
    states: list[State] = []
    for kind, count in COUNTS.items():
        taken = 0
        for at in random.permutation(len(pictures[kind])):
            picture, labels = pictures[kind][at]
            found = list(objects(picture, labels))
            for number in random.permutation(len(found))[:FROM_ONE]:
                if taken < count:
                    taken += 1
                    name, (image, truth) = f"{picture.parent.name}/{picture.stem}", found[number]
                    states += _of_object(kind, name, image, truth, random)
            if taken == count:
                break
        _say(f"{kind}: {taken} objects, {len(states)} states so far, {time.process_time():.0f} s")
    return states


def _of_object(
    kind: str, name: str, image: NDArray[np.uint8], truth: Mask, random: np.random.Generator
) -> list[State]:
    states: list[State] = []

    def pick(candidates: Sequence[Candidate], left: int, top: int, rounds: Sequence[Round]) -> int:
        height, width = candidates[0].mask.shape
        within = truth[top : top + height, left : left + width]
        both = np.array([(c.mask & within).sum() for c in candidates])
        areas = np.array([c.mask.sum() for c in candidates])
        ious = both / (areas + truth.sum() - both)
        features = mask_choice.features(candidates, left, top, rounds)
        today = int(np.argmax(features @ np.array(mask_choice.WEIGHTS)))
        states.append(State(kind, name, features, ious, today))
        return int(random.choice([ious.argmax(), today, random.integers(len(ious))]))

    exact = random.random() < 0.5
    segmenter = ClickNetwork()
    shown, clicks = np.zeros_like(truth), list[Click]()
    before, mask_choice.best = mask_choice.best, pick
    try:
        for _ in range(CLICKS):
            following = next_click(shown, truth, None if exact else random)
            if following is None:
                break
            clicks.append(Click(*following))
            shown = segmenter.segment(image, clicks, None)
    finally:
        mask_choice.best = before
    return states


def fit(states: Sequence[State], columns: Sequence[int]) -> NDArray[np.float64]:
    """Weights of the columns that make the expected IoU of a soft choice largest."""
    most = max(len(s.ious) for s in states)
    x = torch.zeros(len(states), most, len(columns))
    ious, there = torch.zeros(len(states), most), torch.zeros(len(states), most, dtype=torch.bool)
    for row, state in enumerate(states):
        count = len(state.ious)
        x[row, :count] = torch.from_numpy(state.features[:, columns])
        ious[row, :count] = torch.from_numpy(state.ious)
        there[row, :count] = True
    spread = x[there].std(0) + 1e-3
    weights = torch.zeros(len(columns), requires_grad=True)
    optimizer = torch.optim.AdamW([weights], 1e-2, weight_decay=1e-2)
    wanted = torch.softmax((ious / 0.05).masked_fill(~there, -1e4), 1)
    for _ in range(300):
        scores = ((x / spread) @ weights).masked_fill(~there, -1e4)
        logs = torch.log_softmax(scores, 1)
        loss = -(logs.exp() * ious).sum(1).mean() - 0.1 * (wanted * logs).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return np.asarray((weights / spread).detach().numpy(), np.float64)


def left_out(states: Sequence[State], columns: Sequence[int]) -> NDArray[np.float64]:
    """The IoU of what is chosen, by weights fitted on other pictures."""
    names = sorted({s.picture for s in states})
    fold = {name: number % FOLDS for number, name in enumerate(np.random.default_rng(1).permutation(names))}
    chosen = np.zeros(len(states))
    for number in range(FOLDS):
        weights = fit([s for s in states if fold[s.picture] != number], columns)
        for row, state in enumerate(states):
            if fold[state.picture] == number:
                chosen[row] = state.ious[np.argmax(state.features[:, columns] @ weights)]
    return chosen


def main() -> None:
    """Print what choosing gains, and the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    states = collect(arguments.data, np.random.default_rng(arguments.seed))
    columns = range(len(FEATURES))
    first = np.array([s.ious[0] for s in states])
    for name, ious in (
        ("the best", np.array([s.ious.max() for s in states])),
        ("weights in force", np.array([s.ious[s.today] for s in states])),
        ("fitted on other pictures", left_out(states, columns)),
        *((f"without {FEATURES[i]}", left_out(states, [c for c in columns if c != i])) for i in columns),
    ):
        gains = 100 * (ious - first)
        each = ", ".join(f"{kind} {gains[[s.kind == kind for s in states]].mean():.1f}" for kind in COUNTS)
        error = gains.std() / len(gains) ** 0.5
        _say(f"{name:<26}{gains.mean():6.2f} +- {error:.2f} over the first candidate ({each})")
    weights = fit(states, columns)
    _say(f"WEIGHTS = ({', '.join(f'{w:.3g}' for w in weights)})  # {', '.join(FEATURES)}")
    _say(f"{len(states)} states, {time.process_time():.0f} s of CPU time")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

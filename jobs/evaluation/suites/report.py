"""Suite results: a table for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from jobs.evaluation.suites.measures import FOUND_WITHIN, SceneMeasure, Summary, summarise
from jobs.evaluation.suites.presence import Observations, Reliability, reliability


@dataclass(frozen=True, slots=True)
class Goal:
    """Target of a figure: `value` in percent, as minimum (`upward`) or maximum."""

    value: float
    upward: bool

    def __str__(self) -> str:
        return f"{'≥' if self.upward else '<'} {self.value:g}"

    def met(self, percent: float) -> bool:
        """Whether a figure reaches it; nan does not."""
        return percent >= self.value if self.upward else percent < self.value


CROWD_GOALS: Mapping[str, Goal] = {"j": Goal(80, True), "leakage": Goal(3, False), "swaps": Goal(5, False)}

# Name in JSON, heading, figure in percent, and the count it is a share of, if it is one.
_COLUMNS: tuple[tuple[str, str, Callable[[Summary], float], Callable[[Summary], int] | None], ...] = (
    ("j", "J", lambda s: s.j, None),
    ("leakage", "leak", lambda s: s.leakage, None),
    ("swaps", "swaps", lambda s: s.swap_share, lambda s: s.crossings),
    ("lost", "lost", lambda s: s.lost_share, lambda s: s.crossings),
    ("recovery", "found", lambda s: s.recovery, lambda s: s.returns),
    ("false_frames", "false", lambda s: s.false_share, lambda s: s.hidden),
    ("false_area", "area", lambda s: s.false_area, lambda s: s.hidden),
)


@dataclass(frozen=True)
class SuiteReport:
    """A suite's scenes, measured.

    Attributes:
        suite, seed, height: what was run.
        scenes: in the order in which they ran.
        observations: all masks with the model's own scores; None if the segmenter gave no probabilities.
        goals: figures aimed at, by the names they have in `to_json`.
    """

    suite: str
    seed: int
    height: int
    scenes: tuple[SceneMeasure, ...]
    observations: Observations | None
    goals: Mapping[str, Goal]

    @property
    def overall(self) -> Summary:
        """All objects of all scenes."""
        return summarise([o for s in self.scenes for o in s.objects])

    @property
    def kinds(self) -> dict[str, Summary]:
        """The objects of each kind of scene, in the order in which kinds first came."""
        kinds = dict.fromkeys(s.kind for s in self.scenes)
        return {k: summarise([o for s in self.scenes if s.kind == k for o in s.objects]) for k in kinds}

    @property
    def presence(self) -> dict[str, Reliability]:
        """Reliability of the mean probability inside masks, and of the calibrated score if there is one."""
        if self.observations is None:
            return {}
        seen = self.observations
        found = {"mean probability": reliability(seen.features[:, 0], seen.iou)}
        if not np.isnan(seen.scores).any():
            found["calibrated"] = reliability(seen.scores, seen.iou)
        return found

    @property
    def frames_per_second(self) -> float:
        """Frames segmented per second of segmenting."""
        return sum(s.frames for s in self.scenes) / max(sum(s.seconds for s in self.scenes), 1e-9)

    def to_json(self) -> dict[str, Any]:
        """Shares in percent, rounded to three places; a share of nothing is null."""
        return {
            "suite": self.suite,
            "seed": self.seed,
            "height": self.height,
            "goals": {k: {"value": g.value, "at_least": g.upward} for k, g in self.goals.items()},
            "overall": _figures(self.overall),
            "kinds": {k: _figures(s) for k, s in self.kinds.items()},
            "scenes": {
                s.name: _figures(summarise(s.objects)) | {"frames": s.frames, "seconds": round(s.seconds, 3)}
                for s in self.scenes
            },
            "presence": {name: _reliability(r) for name, r in self.presence.items()},
            "frames_per_second": round(self.frames_per_second, 3),
        }

    def table(self) -> Group:
        """The same for people: scenes (or kinds, where there are several), overall and goals; presence."""
        table = Table(
            title=f"{self.suite}, seed {self.seed}, {self.height} px: shares in percent (of so many)"
        )
        table.add_column("scene" if len(self.kinds) == 1 else "kind")
        for heading in ("n", *(c[1] for c in _COLUMNS)):
            table.add_column(heading, justify="right")
        single = {s.name: summarise(s.objects) for s in self.scenes}
        rows = single if len(self.kinds) == 1 else self.kinds
        for name, summary in rows.items():
            table.add_row(name, *_cells(summary))
        table.add_section()
        overall = self.overall
        table.add_row("overall", *_cells(overall), style="bold")
        table.add_row("out of", "", *("" if c[3] is None else str(c[3](overall)) for c in _COLUMNS))
        if self.goals:
            figures = _figures(overall)
            cells = [
                ""
                if c[0] not in self.goals or figures[c[0]] is None
                else _goal(self.goals[c[0]], figures[c[0]])
                for c in _COLUMNS
            ]
            table.add_row("goal", "", *cells)
        table.caption = (
            "leak: mask on somebody else; swaps, lost: mask on the other, or nowhere, after a crossing; "
            f"found: within {FOUND_WITHIN} frames of coming back; false, area: frames out of sight with a "
            f"mask, and its size. {self.frames_per_second:.1f} frames/s"
        )
        return Group(table, *(_presence_table(n, r) for n, r in self.presence.items()))


def _goal(goal: Goal, percent: float) -> str:
    return f"{goal} {'yes' if goal.met(percent) else 'no'}"


def _figures(summary: Summary) -> dict[str, Any]:
    figures: dict[str, Any] = {"objects": summary.objects}
    for name, _, share, of in _COLUMNS:
        empty = of is not None and not of(summary)
        value = share(summary)
        figures[name] = None if empty or value != value else round(100 * value, 3)
    return figures | {
        "crossings": summary.crossings,
        "returns": summary.returns,
        "frames_out_of_sight": summary.hidden,
    }


def _cells(summary: Summary) -> list[str]:
    figures = _figures(summary)
    cells = [str(summary.objects)]
    for name, _, _, _ in _COLUMNS:
        value = figures[name]
        cells.append("-" if value is None else f"{value:.1f}")
    return cells


def _reliability(result: Reliability) -> dict[str, Any]:
    def rounded(value: float) -> float | None:
        return None if value != value else round(value, 4)

    return {
        "expected_calibration_error": rounded(result.error),
        "ranking": rounded(result.ranking),
        "brier": rounded(result.brier),
        "bins": [
            {
                "low": b.low,
                "high": b.high,
                "masks": b.masks,
                "score": rounded(b.score),
                "right": rounded(b.right),
                "iou": rounded(b.iou),
            }
            for b in result.bins
        ],
    }


def _presence_table(name: str, result: Reliability) -> Table:
    table = Table(title=f"presence score: {name}", caption_justify="left")
    for heading in ("score", "masks", "mean score", "right", "mean IoU"):
        table.add_column(heading, justify="right")
    for b in result.bins:
        table.add_row(
            f"{b.low:.1f}-{b.high:.1f}", str(b.masks), f"{b.score:.3f}", f"{b.right:.3f}", f"{b.iou:.3f}"
        )
    table.caption = (
        f"right: IoU over 0.5; expected calibration error {result.error:.3f}, ranking {result.ranking:.3f}, "
        f"Brier {result.brier:.3f}"
    )
    return table

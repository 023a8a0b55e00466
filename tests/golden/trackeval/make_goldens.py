"""Writes cases.json: made-up tracks, and their scores by TrackEval.

In an environment of its own: pip install trackeval==1.3.0; python make_goldens.py
"""

import json
from pathlib import Path

import numpy as np
from trackeval.metrics import CLEAR, HOTA, Identity

CASES = 6
FRAMES = 24


def made_up(seed):
    """True boxes and tracks by frame, [id, x, y, w, h] each: misses, switches, ghosts, frames without any."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 6))
    places, names = rng.uniform(0, 100, (count, 2)), list(range(10, 10 + count))
    true, found = [], []
    for frame in range(FRAMES):
        places += rng.normal(0, 3, (count, 2))
        if rng.random() < 0.2:
            rng.shuffle(names)
        seen = [i for i in range(count) if rng.random() < 0.85] or [0]
        there = [] if rng.random() < 0.1 else [i for i in range(count) if rng.random() < 0.8]
        true.append([[i + 1, *places[i].round(1).tolist(), 20, 40] for i in seen])
        moved = places + rng.normal(0, 2.5, (count, 2))
        found.append([[names[i], *moved[i].round(1).tolist(), 20, 40] for i in there])
        if there and rng.random() < 0.3:
            found[-1].append([99, *rng.uniform(0, 100, 2).round(1).tolist(), 20, 40])
    return true, found


def overlaps(these, those):
    a = np.array([row[1:] for row in these], float).reshape(-1, 1, 4)
    b = np.array([row[1:] for row in those], float).reshape(1, -1, 4)
    low = np.maximum(a[..., :2], b[..., :2])
    high = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    shared = np.maximum(high - low, 0).prod(-1)
    return shared / (a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - shared)


def scored(true, found):
    people = sorted({row[0] for rows in true for row in rows})
    tracks = sorted({row[0] for rows in found for row in rows})
    data = {
        "num_timesteps": len(true),
        "gt_ids": [np.array([people.index(row[0]) for row in rows], int) for rows in true],
        "tracker_ids": [np.array([tracks.index(row[0]) for row in rows], int) for rows in found],
        "similarity_scores": [overlaps(a, b) for a, b in zip(true, found)],
        "num_gt_dets": sum(map(len, true)),
        "num_tracker_dets": sum(map(len, found)),
        "num_gt_ids": len(people),
        "num_tracker_ids": len(tracks),
    }
    quiet = {"PRINT_CONFIG": False}
    hota, clear = HOTA(quiet).eval_sequence(data), CLEAR(quiet).eval_sequence(data)
    identity = Identity(quiet).eval_sequence(data)
    return {
        "idf1": 100 * float(identity["IDF1"]),
        "hota": 100 * float(np.mean(hota["HOTA"])),
        "mota": 100 * float(clear["MOTA"]),
        "smotsa": 100 * float(clear["sMOTA"]),
        "recall": 100 * float(clear["CLR_Re"]),
        "precision": 100 * float(clear["CLR_Pr"]),
        "id_switches": int(clear["IDSW"]),
        "fragmentations": int(clear["Frag"]),
        "mostly_tracked": int(clear["MT"]),
    }


cases = []
for seed in range(CASES):
    true, found = made_up(seed)
    cases.append({"true": true, "found": found, "scores": scored(true, found)})
Path(__file__).with_name("cases.json").write_text(json.dumps(cases, separators=(",", ":")) + "\n")

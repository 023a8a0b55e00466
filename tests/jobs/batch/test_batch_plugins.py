"""A batch with plugins: trackers on Ray find source, box segmenter and sink by their entry points."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.plugin_package import install, python
from support.tiny import tiny_weights

from pipeline.analytics.query import query

pytestmark = pytest.mark.ray

PROMPTS = {"version": 1, "objects": [{"id": 4, "box": [0, 20, 20, 20]}]}


def test_a_batch_through_plugins(tmp_path: Path) -> None:
    """One file is not a video; the rows of the others are in Parquet and in the sink."""
    manifest, prompts = tmp_path / "videos.jsonl", tmp_path / "prompts.json"
    videos = {"a": "squares://80x60/9", "b": "squares://64x48/6", "c": "squares://none"}
    lines = [json.dumps({"uri": uri, "stream_id": name}) for name, uri in videos.items()]
    manifest.write_text("\n".join(lines))
    prompts.write_text(json.dumps(PROMPTS))
    sink, out = tmp_path / "sink", tmp_path / "out"
    program = "import sys; from jobs.cli.app import main; main(sys.argv[1:])"
    options = ["--out", str(out), "--prompts", str(prompts), "--model", tiny_weights(tmp_path)]
    plugins = ["--box-segmenter", "diamond", "--sink", "jsonfiles", "--chunk", "4", "--max-tries", "1"]
    done = python(
        install(tmp_path / "plugins"),
        *("-c", program, "batch", str(manifest), *options, *plugins),
        XMEM_JSON_FILES=str(sink),
    )
    assert done.returncode == 1, done.stderr
    assert "2 of 3 videos finished" in done.stderr
    assert "squares://none: invalid URI" in done.stderr
    stored = query(out, "select stream_id, frame_index, mask_rle from tracks order by all").to_pylist()
    assert [(row["stream_id"], row["frame_index"]) for row in stored] == [
        *(("a", i) for i in range(9)),
        *(("b", i) for i in range(6)),
    ]
    given = [
        {"stream_id": path.parent.name, "frame_index": row["frame_index"], "mask_rle": row["mask_rle"]}
        for path in sorted(sink.rglob("*.json"))
        for row in json.loads(path.read_text())["tracks"]
    ]
    assert given == stored

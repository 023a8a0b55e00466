"""The durable list of a hub's streams: content, file permissions, unusable entries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.live.hub.registry import LiveList
from pipeline.live.spec import LiveSpec
from pipeline.storage.opening import open_files


def cam(name: str, url: str | None = None) -> LiveSpec:
    return LiveSpec(name, url or f"rtsp://10.0.0.1/{name}", None, "motion")


def listed(out: Path, secrets: Path) -> LiveList:
    return LiveList(open_files(str(out)), "default", secrets)


def stored(out: Path) -> str:
    return (out / "live" / "default.json").read_text()


def test_urls_with_credentials_are_only_in_the_private_folder(tmp_path: Path) -> None:
    out, secrets = tmp_path / "out", tmp_path / "secrets"
    specs = [cam("a", "rtsp://u:s3cret@10.0.0.1/a"), cam("b")]
    listed(out, secrets).save(specs)
    assert "s3cret" not in stored(out)
    (file,) = secrets.iterdir()
    assert file.stat().st_mode & 0o077 == 0
    assert secrets.stat().st_mode & 0o077 == 0
    assert listed(out, secrets).load() == (specs, {})


def test_what_cannot_be_used_here_is_kept_for_where_it_can(tmp_path: Path) -> None:
    out, secrets = tmp_path / "out", tmp_path / "secrets"
    with_password = cam("a", "rtsp://u:s3cret@10.0.0.1/a")
    listed(out, secrets).save([with_password, cam("b")])

    elsewhere = listed(out, tmp_path / "other-machine")
    specs, lost = elsewhere.load()
    assert [spec.stream_id for spec in specs] == ["b"]
    assert list(lost) == ["a"]
    assert "not on this machine" in str(lost["a"])
    elsewhere.save([*specs, cam("c")])

    at_home, lost = listed(out, secrets).load()
    assert lost == {}
    assert {spec.stream_id: spec.url for spec in at_home}["a"] == with_password.url
    assert sorted(spec.stream_id for spec in at_home) == ["a", "b", "c"]


def test_secrets_of_entries_of_no_use_are_kept(tmp_path: Path) -> None:
    """As after a downgrade to a version that does not know a setting."""
    out, secrets = tmp_path / "out", tmp_path / "secrets"
    listed(out, secrets).save([cam("a", "rtsp://u:s3cret@10.0.0.1/a")])
    good = stored(out)
    content = json.loads(good)
    content["streams"][0]["settings"]["of_tomorrow"] = 1
    (out / "live" / "default.json").write_text(json.dumps(content))
    older = listed(out, secrets)
    assert older.load()[0] == []
    older.save([cam("b")])
    assert "of_tomorrow" in stored(out)
    (file,) = secrets.iterdir()
    assert "s3cret" in file.read_text()


@pytest.mark.parametrize("anew", [True, False])
def test_entries_of_no_use_go_when_they_are_removed_or_added_anew(tmp_path: Path, anew: bool) -> None:
    out, secrets = tmp_path / "out", tmp_path / "secrets"
    listed(out, secrets).save([cam("a", "rtsp://u:s3cret@10.0.0.1/a")])
    elsewhere = listed(out, tmp_path / "other-machine")
    elsewhere.load()
    if anew:
        elsewhere.save([cam("a")])
    else:
        elsewhere.save([], without="a")
    names = [stream["id"] for stream in json.loads(stored(out))["streams"]]
    assert names == (["a"] if anew else [])
    elsewhere.save([])
    assert json.loads(stored(out))["streams"] == []

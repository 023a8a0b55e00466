"""Stream ids: validation, and generation from a source's name."""

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.base.errors import UsageError
from pipeline.base.stream_ids import generate_stream_id, validate_stream_id


@pytest.mark.parametrize("good", ["a", "7", "2024-01-01", "cam.1_x-Y", "a" * 128, "a.."])
def test_allowed_ids(good: str) -> None:
    assert validate_stream_id(good) == good


@pytest.mark.parametrize(
    "bad", ["", ".", "..", "-a", "_a", "a/b", "a b", "a" * 129, "a\n", "ä", "a=b", "a%20"]
)
def test_refused_ids(bad: str) -> None:
    with pytest.raises(UsageError, match=r"stream id .* is not allowed: use 1 to 128"):
        validate_stream_id(bad)


@pytest.mark.parametrize(
    ("uri", "stem"),
    [
        ("/videos/street.mp4", "street"),
        ("clip.v1.2.mkv", "clip.v1.2"),
        ("frames/", "frames"),
        ("Straße am Ufer (1).mp4", "Strae-am-Ufer-1"),
        ("日本.mp4", "video"),
        ("s3://bucket/a/b%20c.mp4", "b-c"),
        ("rtsp://user:secret@10.0.0.1:554/", "10.0.0.1-554"),
        ("rtsp://10.0.0.1/live/cam1?x=1", "cam1"),
        ("x" * 300 + ".mp4", "x" * 100),
    ],
)
def test_generated_ids_begin_with_the_cleaned_stem(uri: str, stem: str) -> None:
    made = generate_stream_id(uri)
    assert re.fullmatch(re.escape(stem) + "-[a-p][0-9a-f]{9}", made)
    assert validate_stream_id(made) == made


def test_the_same_source_is_the_same_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = generate_stream_id("a.mp4")
    assert (
        here == generate_stream_id(str(tmp_path / "a.mp4")) == generate_stream_id(f"file://{tmp_path}/a.mp4")
    )
    assert here != generate_stream_id(str(tmp_path / "b" / "a.mp4"))
    assert generate_stream_id("rtsp://u:old@cam/1") == generate_stream_id("rtsp://u:new@cam/1")
    assert generate_stream_id("rtsp://cam/1?ch=1") != generate_stream_id("rtsp://cam/1?ch=2")


@given(st.text(max_size=200))
@example("~\0")
def test_any_text_gives_an_allowed_id(text: str) -> None:
    made = generate_stream_id(text)
    assert validate_stream_id(made) == made
    assert made[-10].isalpha()


def test_a_hash_sign_is_part_of_a_name_but_not_of_a_web_address() -> None:
    assert generate_stream_id("s3://bucket/take#1.mp4") != generate_stream_id("s3://bucket/take#2.mp4")
    assert generate_stream_id("s3://bucket/take#1.mp4").startswith("take-1-")
    assert generate_stream_id("file:///videos/take#1.mp4") == generate_stream_id("/videos/take#1.mp4")
    assert generate_stream_id("https://host/a.mp4#t=10") == generate_stream_id("https://host/a.mp4")

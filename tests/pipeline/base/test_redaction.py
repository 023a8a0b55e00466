"""Redaction: credentials are removed, the rest of a URI is kept."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base.errors import SourceError, StoreError
from pipeline.base.redaction import redacted, redacted_trace
from pipeline.live.camera.url_guard import UrlGuard, UrlRefusedError


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("https://user:secret@host/v.mp4?x=1", "https://host/v.mp4?x=1"),
        ("rtsp://admin:pa@ss@10.0.0.7:554/ch1", "rtsp://10.0.0.7:554/ch1"),
        ("simplecache::https://user:secret@host/v.mp4", "simplecache::https://host/v.mp4"),
        (
            "https://b.s3.amazonaws.com/v.mp4?X-Amz-Credential=AKIA%2Fx&part=2&X-Amz-Signature=ab12",
            "https://b.s3.amazonaws.com/v.mp4?X-Amz-Credential=***&part=2&X-Amz-Signature=***",
        ),
        ("https://a.blob/v.mp4?sv=2024&sig=a%2Fb%3D", "https://a.blob/v.mp4?sv=2024&sig=***"),
        ("https://h/v?access_token=t0k&id=7", "https://h/v?access_token=***&id=7"),
        ("https://h/v?signal=3&design=b&monkey=x", "https://h/v?signal=3&design=b&monkey=x"),
        ("rtsp://c/live?user=admin&pass=x1&ch=2", "rtsp://c/live?user=admin&pass=***&ch=2"),
        ("rtsp://c/user=a&password=x1&channel=2", "rtsp://c/user=a&password=***&channel=2"),
        (
            "rtsp://c/user=a_password=x_1_channel=2_stream=0.sdp?real",
            "rtsp://c/user=a_password=***_channel=2_stream=0.sdp?real",
        ),
        ("rtsp://c/ch?bypass=1&compass=n", "rtsp://c/ch?bypass=1&compass=n"),
        ("/data/a@b.mp4", "/data/a@b.mp4"),
        ("s3://bucket/a@b/c.mp4", "s3://bucket/a@b/c.mp4"),
        ("403 for url='https://u:p@h/v?sig=x', try again", "403 for url='https://h/v?sig=***', try again"),
    ],
)
def test_credentials_are_taken_out(given: str, left: str) -> None:
    assert redacted(given) == left


def test_what_cannot_be_stored_becomes_an_escape() -> None:
    assert redacted("/data/\udcff.mp4").encode() == b"/data/\\udcff.mp4"


def test_the_form_of_a_url_in_a_help_text_stays_as_it_is() -> None:
    with pytest.raises(UrlRefusedError) as caught:
        UrlGuard(()).parse("rtsp://admin:se@cret@camera/live")
    assert "rtsp://[user[:password]@]host[:port][/path][?query]:" in str(SourceError(str(caught.value)))
    assert "cret" not in str(caught.value)


@settings(max_examples=200)
@given(
    st.sampled_from(["", "[user[:password]@]", "[user[:password]@", "[user@", "[user[:password]@]host:"]),
    st.text(st.characters(exclude_characters="/?#'\"<>", exclude_categories=("Z", "C")), min_size=1),
    st.sampled_from(["", ":554", "/live", "/a@b", " and more"]),
)
def test_nothing_before_the_last_at_sign_of_an_authority_is_left(front: str, secret: str, rest: str) -> None:
    assert redacted(f"rtsp://{front}{secret}@camera{rest}") == f"rtsp://camera{rest}"


@pytest.mark.parametrize("kind", [SourceError, StoreError])
def test_errors_carry_none(kind: type[Exception]) -> None:
    assert str(kind("https://user:secret@host/v.mp4: no such file")) == "https://host/v.mp4: no such file"


def test_tracebacks_tell_where_and_no_credentials() -> None:
    try:
        try:
            raise ValueError("rtsp://user:secret@camera/1")
        except ValueError as error:
            raise RuntimeError("https://user:secret@host/v.mp4") from error
    except RuntimeError as error:
        text = redacted_trace(error)
    assert "secret" not in text
    assert "rtsp://camera/1" in text
    assert text.endswith("RuntimeError: https://host/v.mp4")
    assert "test_tracebacks_tell_where" in text

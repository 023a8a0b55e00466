"""Requests that `xmem serve` refuses before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.cli.app import main
from jobs.cli.serve import _hosts, is_loopback


def said(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--out", "nowhere", *options])
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_nobody_is_let_in_by_mistake(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("XMEM_API_TOKENS", raising=False)
    assert "no token is given" in said(capsys)
    assert "no token is given" in said(capsys, "--host", "0.0.0.0")
    assert "is not allowed" in said(capsys, "--insecure-loopback", "--host", "0.0.0.0")
    assert "is not allowed" in said(capsys, "--insecure-loopback", "--host", "camera-server")
    file = tmp_path / "tokens"
    file.write_text("too-short\n")
    assert "token number 1" in said(capsys, "--token-file", str(file))
    assert "drop one" in said(capsys, "--token-file", str(file), "--insecure-loopback")
    monkeypatch.setenv("XMEM_API_TOKENS", "a b")
    text = said(capsys)
    assert "token number 1" in text


def test_a_webhook_needs_a_secret(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XMEM_API_TOKENS", "a-token-for-tests-0123456789")
    monkeypatch.delenv("XMEM_WEBHOOK_SECRET", raising=False)
    assert "--webhook needs a secret" in said(capsys, "--webhook", "https://a/b")
    file = tmp_path / "secret"
    file.write_text("short\n")
    assert "too short" in said(capsys, "--webhook", "https://a/b", "--webhook-secret-file", str(file))
    assert "give the URL" in said(capsys, "--webhook-secret-file", str(file))
    monkeypatch.setenv("XMEM_WEBHOOK_SECRET", "long-enough-0123456789")
    assert "an http or https URL" in said(capsys, "--webhook", "rtsp://a/b")


def test_a_window_that_is_none_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XMEM_API_TOKENS", "a-token-for-tests-0123456789")
    assert "search_window=63" in said(capsys, "--search-window", "63")


@pytest.mark.parametrize(
    ("option", "kind"),
    [("--sink", "sink"), ("--allow-detector", "detector"), ("--box-segmenter", "box segmenter")],
)
def test_plugins_are_looked_up_before_ray_is_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, option: str, kind: str
) -> None:
    monkeypatch.setenv("XMEM_API_TOKENS", "a-token-for-tests-0123456789")
    assert f"no {kind} 'nosuch'; available:" in said(capsys, option, "nosuch")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    hosts = _hosts(host, ["live.example"])
    assert hosts is not None
    assert {"localhost", "127.0.0.1", "[::1]", "live.example"} <= set(hosts)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.example", "", "127.0.0.1.example"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)
    assert _hosts(host, []) is None
    assert _hosts(host, ["live.example"]) == ("live.example",)

"""`--storage-options`: accepted forms, and that no value appears in a message."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.batch.storage_options import parse_storage_options
from pipeline.base.errors import UsageError


def test_all_forms_are_merged(tmp_path: Path) -> None:
    (tmp_path / "o.json").write_text('{"key": "k", "client_kwargs": {"region_name": "r"}}')
    given = [
        f"@{tmp_path}/o.json",
        "client_kwargs.endpoint_url=http://h:1/?a=b",
        '{"secret": "s"}',
        "anon=false",
    ]
    assert parse_storage_options([*given, "token=0123"]) == {
        "key": "k",
        "client_kwargs": {"region_name": "r", "endpoint_url": "http://h:1/?a=b"},
        "secret": "s",
        "anon": False,
        "token": "0123",
    }
    assert parse_storage_options(None) is None


@pytest.mark.parametrize(
    "given", ['{"key": "hush"', "hush", "=hush", '["hush"]', "@{folder}/bad.json", "@none"]
)
def test_what_is_wrong_is_said_without_values(tmp_path: Path, given: str) -> None:
    (tmp_path / "bad.json").write_text('["hush"]')
    with pytest.raises(UsageError, match="--storage-options") as caught:
        parse_storage_options([given.replace("{folder}", str(tmp_path))])
    assert "hush" not in str(caught.value)

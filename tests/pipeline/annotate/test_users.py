"""Several users of one server."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient
from support.videos import make_video

from pipeline.annotate.annotator import Annotator
from pipeline.annotate.app import create_app
from pipeline.annotate.users import MOST_USERS, UserApps, check_users, user_folder
from pipeline.api.tokens import Sessions
from pipeline.base.errors import UsageError


def test_each_user_has_work_of_their_own(tmp_path: Path) -> None:
    video = str(make_video(tmp_path / "v.mp4", 4, width=80, height=60))
    out = str(tmp_path / "out")
    sessions = {name: Sessions() for name in ("ann", "bob")}
    annotators = {name: Annotator(video, user_folder(out, name), "v") for name in sessions}
    try:
        apps = UserApps({name: create_app(annotators[name], sessions[name]) for name in sessions})
        client = TestClient(apps, base_url="http://127.0.0.1")
        assert client.get("/ann/").text.startswith("<!doctype html>")
        for path in ("/", "/ann", "/eve/", "/eve/v1/state", "//v1/state", "/v1/state"):
            assert client.get(path, follow_redirects=False).status_code == 404, path
        assert client.get("/ann/v1/state").status_code == 401
        assert client.post("/bob/v1/session", json={"code": sessions["ann"].code}).status_code == 403
        headers = {}
        for name in sessions:
            token = client.post(f"/{name}/v1/session", json={"code": sessions[name].code}).json()["token"]
            headers[name] = {"Authorization": f"Bearer {token}"}
        assert client.get("/bob/v1/state", headers=headers["ann"]).status_code == 401
        box = {"box": [10, 10, 30, 30]}
        client.post("/ann/v1/objects", json={"category": "ann's"}, headers=headers["ann"])
        assert client.put("/ann/v1/prompts/0/1", json=box, headers=headers["ann"]).status_code == 200
        own = {name: client.get(f"/{name}/v1/state", headers=headers[name]).json() for name in sessions}
        assert [o["category"] for o in own["ann"]["objects"]] == ["ann's"]
        assert (own["bob"]["objects"], own["bob"]["edits"]) == ([], 0)
        assert client.get("/bob/v1/frames/0.jpg", headers=headers["bob"]).content[:2] == b"\xff\xd8"
    finally:
        for annotator in annotators.values():
            annotator.close()
    with Annotator(None, user_folder(out, "ann")) as alone:  # an ordinary folder
        assert sorted(alone.project.document.objects) == [1]


def test_names_of_users() -> None:
    check_users(["ann", "b.o-b_2"])
    for names, said in (
        (["../x"], "not allowed"),
        ([""], "not allowed"),
        (["a b"], "not allowed"),
        (["ann", "ann"], "twice"),
        ([f"u{i}" for i in range(MOST_USERS + 1)], "at most 32"),
    ):
        with pytest.raises(UsageError, match=said):
            check_users(names)

"""Several users of one server."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from support.annotating import served_app
from support.browser import Page, chromium, open_page
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


@pytest.mark.skipif(chromium() is None, reason="no Chromium: apt-get install chromium")
def test_two_users_in_two_browsers(tmp_path: Path) -> None:
    """Each page says whose it is; undoing in one takes nothing back in the other."""
    video = str(make_video(tmp_path / "v.mp4", 4, width=80, height=60))
    sessions = {name: Sessions() for name in ("ann", "bob")}

    def objects(page: Page, count: int) -> None:
        page.wait_for(f"document.querySelectorAll('#objects li').length === {count}")
        page.wait_for("document.getElementById('notice').textContent === 'Saved'")

    def press(page: Page, key: str, modifiers: int = 0) -> None:
        for kind in ("keyDown", "keyUp"):
            page.do("Input.dispatchKeyEvent", type=kind, key=key, modifiers=modifiers)

    with contextlib.ExitStack() as opened:
        annotators = {
            name: opened.enter_context(Annotator(video, user_folder(str(tmp_path / "out"), name), "v"))
            for name in sessions
        }
        apps = UserApps({name: create_app(annotators[name], sessions[name]) for name in sessions})
        address = opened.enter_context(served_app(apps))
        pages: dict[str, Page] = {}
        for name in sessions:
            (tmp_path / name).mkdir()
            pages[name] = opened.enter_context(open_page(tmp_path / name, 1000, 700))
            pages[name].open(f"{address}/{name}/#code={sessions[name].code}")
            pages[name].wait_for("document.getElementById('canvas').width > 300")
            assert pages[name].value("document.title") == f"v.mp4 · {name} – xmem annotate"
        for name, count in (("ann", 1), ("bob", 1), ("ann", 2), ("bob", 2)):
            press(pages[name], "n")
            objects(pages[name], count)
        press(pages["ann"], "z", modifiers=2)
        objects(pages["ann"], 1)
        assert {name: len(a.project.document.objects) for name, a in annotators.items()} == {
            "ann": 1,
            "bob": 2,
        }
        press(pages["bob"], "n")
        objects(pages["bob"], 3)
        press(pages["ann"], "y", modifiers=2)
        objects(pages["ann"], 2)
        assert {name: len(a.project.document.objects) for name, a in annotators.items()} == {
            "ann": 2,
            "bob": 3,
        }
        pages["ann"].open(f"{address}/bob/")  # without a link of bob's
        pages["ann"].wait_for("!document.getElementById('signed-out').hidden")
        assert [page.errors for page in pages.values()] == [[], []]


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

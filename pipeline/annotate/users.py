"""Several users on one server: each has a link, a path, sessions and an annotation of their own.

The annotation of a user is an ordinary output folder, OUT/users/NAME, with which any of them can go on alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.api.guard import App, Receive, Scope, Send, refuse
from pipeline.base.errors import UsageError
from pipeline.base.stream_ids import is_stream_id

MOST_USERS = 32


def user_folder(out: str, name: str) -> str:
    """The output folder of a user."""
    return f"{out.rstrip('/')}/users/{name}"


def check_users(names: Sequence[str]) -> None:
    """Raise UsageError if a user's name is not allowed, or given twice."""
    for name in names:
        if not is_stream_id(name):
            raise UsageError(f"user {name[:80]!r} is not allowed: letters, digits and . _ -, at most 128")
    if len(set(names)) < len(names):
        raise UsageError("a user is named twice: give each once")
    if len(names) > MOST_USERS:
        raise UsageError(f"{len(names)} users: at most {MOST_USERS} on one server")


class UserApps:
    """ASGI application that passes /NAME/... on to the application of that user, as /...

    Args:
        apps: by name, each behind a guard of its own: a session of one user opens nothing of another one's.
    """

    def __init__(self, apps: Mapping[str, App]) -> None:
        self._apps = dict(apps)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await next(iter(self._apps.values()))(scope, receive, send)
            return
        name, slash, rest = scope["path"].removeprefix("/").partition("/")
        app = self._apps.get(name)
        if app is None or not slash:
            text = "open the link of a user: the terminal shows them"
            await refuse(scope, receive, send, 404, "no_user", text, "-")
            return
        await app({**scope, "path": f"/{rest}", "raw_path": f"/{rest}".encode()}, receive, send)

"""Ray's authentication token: when it is sent, and to which cluster.

Ray reads the token from RAY_AUTH_TOKEN, from the file RAY_AUTH_TOKEN_PATH, or from ~/.ray/auth_token, and
sends it where RAY_AUTH_MODE is `token`. Without that variable it sends none to an address that was given: the
file may hold the token of this machine's own Ray, which is nobody else's business. We do the same; but who
sets one of the first two variables means it to be sent. No Ray is imported here.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

MODE = "RAY_AUTH_MODE"
TOKEN, _PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_FILE = "~/.ray/auth_token"

HOW = f"set {TOKEN} or {_PATH} to the cluster's token (`ray get-auth-token` there shows it)"
"""What to do about a missing or a wrong one."""


def enable() -> None:
    """Let Ray send the token that the environment names; only of use before Ray is imported."""
    if MODE not in os.environ and (os.environ.get(TOKEN) or os.environ.get(_PATH)):
        os.environ[MODE] = "token"


def in_use() -> bool:
    """Whether Ray sends a token from this process."""
    return os.environ.get(MODE, "").lower() == "token"


def make_private() -> None:
    """Take group's and others' access from ~/.ray/auth_token: Ray itself creates it readable by everybody."""
    path = Path(_FILE).expanduser()
    with suppress(OSError):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode) and mode & 0o077:
            path.chmod(0o600)


def header(*, this_machine: bool) -> dict[str, str] | None:
    """The HTTP header with the token for a dashboard, if it is to have one.

    Args:
        this_machine: nobody named the address.
    """
    mode = os.environ.get(MODE)
    if mode is not None and mode.lower() != "token":
        return None
    token, path = os.environ.get(TOKEN, "").strip(), os.environ.get(_PATH)
    if not token and (path or mode is not None or this_machine):
        try:
            token = Path(path or _FILE).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
    return {"Authorization": f"Bearer {token}"} if token else None

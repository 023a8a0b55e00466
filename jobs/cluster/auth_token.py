"""Ray's authentication token: when it is sent, and to which cluster.

Ray reads the token from RAY_AUTH_TOKEN, from the file RAY_AUTH_TOKEN_PATH, or from ~/.ray/auth_token, and
sends it if RAY_AUTH_MODE is `token`. Without that variable no token is sent to an explicit address, because
the file may hold the token of this machine's own Ray, which others must not see. The same rule applies
here, except that setting one of the first two variables also enables sending. This module does not import
Ray.
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
"""Advice for a missing or wrong token."""


def enable() -> None:
    """Make Ray send the token that the environment names. Must be called before Ray is imported."""
    if MODE not in os.environ and (os.environ.get(TOKEN) or os.environ.get(_PATH)):
        os.environ[MODE] = "token"


def in_use() -> bool:
    """Whether Ray sends a token from this process."""
    return os.environ.get(MODE, "").lower() == "token"


def make_private() -> None:
    """Make ~/.ray/auth_token private (0600): Ray creates it readable by everyone."""
    path = Path(_FILE).expanduser()
    with suppress(OSError):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode) and mode & 0o077:
            path.chmod(0o600)


def header(*, this_machine: bool) -> dict[str, str] | None:
    """The HTTP header with the token for a dashboard; None if no token is to be sent.

    Args:
        this_machine: whether the address is the default, not an explicit one.
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

"""Bearer tokens of the API, and short-lived tickets for URLs that browsers open without headers.

Tokens are stored as salted digests and compared in constant time. A ticket is signed, expires after about a
minute, and gives read access to one stream's pictures and records: it may appear in a URL, which ends up in
histories and logs, where a token must not.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.base.errors import UsageError

log = logging.getLogger(__name__)

TOKENS_VARIABLE = "XMEM_API_TOKENS"
"""Environment variable with tokens, separated by commas or line ends."""

LEAST_TOKEN = 16
MOST_TOKEN = 512
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")
MOST_SESSIONS = 32
_HEADER = re.compile(r"(?i:bearer) +([^\s]+) *")
_TICKET = re.compile(r"([1-9]\d{0,11})\.([A-Za-z0-9_-]{43})", re.ASCII)


class TokenSet:
    """The accepted tokens; several, so that one can be replaced while another is still in use.

    Args:
        tokens: `LEAST_TOKEN` or more of the characters that RFC 6750 allows.

    Raises:
        UsageError: a token is too short or has other characters, or there is none. Messages do not repeat it.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        self._salt = secrets.token_bytes(16)
        digests = set()
        for number, token in enumerate(tokens, start=1):
            if not LEAST_TOKEN <= len(token) <= MOST_TOKEN or not _TOKEN.fullmatch(token):
                raise UsageError(
                    f"token number {number} is not allowed: {LEAST_TOKEN} to {MOST_TOKEN} of the characters "
                    "A-Z a-z 0-9 . _ ~ + / = -; `openssl rand -hex 32` makes one"
                )
            digests.add(self._digest(token))
        if not digests:
            raise UsageError("no token is given: write one per line; `openssl rand -hex 32` makes one")
        self._digests = tuple(sorted(digests))

    @classmethod
    def from_text(cls, text: str) -> TokenSet:
        """Parse tokens, one per line (or separated by commas).

        Empty lines and lines starting with # are skipped.
        """
        lines = [line.strip() for line in text.replace(",", "\n").splitlines()]
        return cls(line for line in lines if line and not line.startswith("#"))

    @classmethod
    def from_file(cls, path: str) -> TokenSet:
        """Read tokens from a file, as `from_text`; warns if the file is readable by everybody."""
        file = Path(path).expanduser()
        try:
            text = file.read_text(encoding="utf-8")
            open_to_all = file.stat().st_mode & 0o004
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "the file is not text"
            raise UsageError(f"token file {path}: {reason}; name a file with one token per line") from error
        if open_to_all:
            log.warning("token file %s is readable by every user of this machine: chmod 600 it", path)
        return cls.from_text(text)

    def allows(self, token: str) -> bool:
        """Whether a token is accepted. All tokens are compared in any case."""
        if len(token) > MOST_TOKEN:
            return False
        digest = self._digest(token)
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found

    def allows_header(self, header: str | None) -> bool:
        """Whether an Authorization header has the form `Bearer TOKEN` with an accepted token."""
        match = _HEADER.fullmatch(header or "")
        return match is not None and self.allows(match[1])

    def __len__(self) -> int:
        return len(self._digests)

    def __repr__(self) -> str:
        return f"TokenSet({len(self)} tokens)"

    def _digest(self, token: str) -> bytes:
        return hmac.digest(self._salt, token.encode("utf-8", "surrogatepass"), hashlib.sha256)


@dataclass(frozen=True, slots=True)
class TicketOffice:
    """Issues and checks tickets; all replicas of a service need the same key.

    Args:
        seconds: lifetime of a ticket. Connections opened with it stay open.
        key: signing key; random by default, so that a restart of the service invalidates all tickets.
    """

    seconds: int = 60
    key: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def issue(self, stream_id: str, *, now: float | None = None) -> str:
        """Issue a ticket for one stream."""
        until = int((time.time() if now is None else now) + self.seconds)
        return f"{until}.{self._signature(until, stream_id)}"

    def allows(self, ticket: str, stream_id: str, *, now: float | None = None) -> bool:
        """Whether a ticket was issued by this service, for this stream, and has not expired."""
        match = _TICKET.fullmatch(ticket)
        if match is None:
            return False
        until = int(match[1])
        signed = hmac.compare_digest(match[2], self._signature(until, stream_id))
        moment = time.time() if now is None else now
        return signed and moment <= until <= moment + self.seconds + 1

    def _signature(self, until: int, stream_id: str) -> str:
        digest = hmac.digest(self.key, f"xmem ticket\n{until}\n{stream_id}".encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


class Sessions:
    """Tokens of browser sessions, each given once for a code in a link.

    A link with a token would let in whoever finds it in a history or a list of processes. A link with a code
    lets in one browser, once: `exchange` replaces the code. Thread-safe.

    Args:
        on_code: called with each new code, at first and after each exchange.
    """

    def __init__(self, on_code: Callable[[str], None] = lambda code: None) -> None:
        self._salt = secrets.token_bytes(16)
        self._digests: list[bytes] = []
        self._lock = threading.Lock()
        self._on_code = on_code
        self.code = secrets.token_urlsafe(24)

    def announce(self) -> None:
        """Pass on the code that is valid now."""
        self._on_code(self.code)

    def exchange(self, code: str) -> str | None:
        """The token of a new session for the valid code, which is replaced; None for any other text."""
        with self._lock:
            if not hmac.compare_digest(code.encode("utf-8", "surrogatepass"), self.code.encode()):
                return None
            self.code = secrets.token_urlsafe(24)
            token = secrets.token_urlsafe(32)
            self._digests = [*self._digests[1 - MOST_SESSIONS :], self._digest(token)]
        self.announce()
        return token

    def allows_header(self, header: str | None) -> bool:
        """Whether an Authorization header has the form `Bearer TOKEN` with the token of a session."""
        match = _HEADER.fullmatch(header or "")
        if match is None or len(match[1]) > MOST_TOKEN:
            return False
        digest = self._digest(match[1])
        found = False
        for known in list(self._digests):
            found |= hmac.compare_digest(known, digest)
        return found

    def _digest(self, token: str) -> bytes:
        return hmac.digest(self._salt, token.encode("utf-8", "surrogatepass"), hashlib.sha256)

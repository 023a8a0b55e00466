"""`Failure`: an error that can be sent between processes, and whether retrying can help."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.base.errors import AnotherWriterError, NotAVideoError, OutputError, UsageError, XmemError
from pipeline.base.redaction import redacted
from pipeline.storage.retries import http_status

_PERMANENT = (UsageError, NotAVideoError, AnotherWriterError)
# Client libraries have their own classes for it, and some failures arrive here as text only.
_NO_ACCESS = re.compile(
    r"(?i)permission denied|access ?denied|forbidden|unauthorized|locate credentials|invalid ?access ?key"
    r"|signature ?does ?not ?match|expired ?token"
)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an operation failed, in a form that can be sent between processes.

    Args:
        kind: name of the error's class.
        message: one line without credentials.
        permanent: retrying cannot help.
        access: the machine where it happened lacks credentials or rights.
        output: the output folder as a whole cannot be used, so that every other video would fail too.
    """

    kind: str
    message: str
    permanent: bool
    access: bool = False
    output: bool = False

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Make a Failure. Wrong requests, files that are not videos, and other writers are permanent."""
        lines = redacted(str(error)).strip().splitlines()
        message = lines[0] if lines else type(error).__name__
        if not isinstance(error, XmemError):
            message = f"{type(error).__name__}: {message}"
        permanent = isinstance(error, _PERMANENT)
        return cls(
            type(error).__name__, message, permanent, _lacks_access(error), isinstance(error, OutputError)
        )


def _lacks_access(error: BaseException) -> bool:
    """Whether an error, or one of its causes, is about credentials or permissions."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, PermissionError) or "Credentials" in type(link).__name__:
            return True
        if http_status(link)[0] in (401, 403) or _NO_ACCESS.search(str(link)):
            return True
        link = link.__cause__
    return False

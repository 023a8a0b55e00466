"""Retry policy for network and storage failures: which errors, how often, with which delays.

Everything that reads or writes remote files goes through `retry`, once. The client libraries' own retries are
switched off (see `pipeline.storage.filesystems`), because nested retries multiply.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.base.backoff import Backoff
from pipeline.base.errors import XmemError
from pipeline.base.redaction import redacted

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Attempts:
    """Number and timing of attempts; delays come from `pipeline.base.backoff.Backoff`.

    Args:
        number: largest number of attempts, including the first.
        first_seconds, longest_seconds: shortest and longest delay.
        total_seconds: no attempt begins later than this after the first.
    """

    number: int = 9
    first_seconds: float = 0.1
    longest_seconds: float = 10.0
    total_seconds: float = 180.0


ATTEMPTS = Attempts()
"""Default of `retry`: about 15 seconds of delays."""

_RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524}
_RETRIED_CODES = {
    # S3's 400 responses to a request that was cut off or changed on the way.
    "RequestTimeout",
    "IncompleteBody",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "OperationAborted",
    "ConditionalRequestConflict",
    "SlowDown",
}
_FINAL_TYPES = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_FINAL_ERRNOS = {
    errno.EINVAL,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EFBIG,
    errno.ENAMETOOLONG,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EPERM,
    errno.ELOOP,
}
_BOTO_RETRIED = {
    "HTTPClientError",
    "ConnectionError",
    "FlexibleChecksumError",
    "ResponseParserError",
    "IncompleteReadError",
    "ResponseStreamingError",
    "CredentialRetrievalError",
    "MetadataRetrievalError",
}
_FAULTS_OF_OURS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)


class ShortAnswerError(OSError):
    """A complete response with fewer or more bytes than expected."""


def retry(what: str, operation: Callable[[], T], attempts: Attempts | None = None) -> T:
    """Run an operation, again while the error it raises may be temporary, and return its result.

    Args:
        what: what is being done, for the log; credentials are removed.
        operation: must be safe to repeat.

    Raises:
        The operation's last error, or its first one that is not temporary.
    """
    attempts = attempts or ATTEMPTS
    backoff = Backoff(attempts.first_seconds, attempts.longest_seconds)
    began = time.monotonic()
    for attempt in range(1, attempts.number):
        try:
            return operation()
        except Exception as error:
            pause = backoff.next_seconds()
            if not may_pass(error) or time.monotonic() - began + pause > attempts.total_seconds:
                raise
            logger.info(
                "%s failed, attempt %d of %d: %s",
                redacted(what),
                attempt,
                attempts.number,
                redacted(" ".join(str(error).split()) or type(error).__name__),
            )
        time.sleep(pause)
    return operation()


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later: the network or the server failed, not the request."""
    if isinstance(error, XmemError) or type(error).__name__ == "FileExpired":
        return False
    if isinstance(error, ShortAnswerError):
        return True
    status, code = http_status(error)
    if status or code:
        return status in _RETRIED_STATUS or code in _RETRIED_CODES
    module = type(error).__module__.partition(".")[0]
    if module in ("botocore", "aiobotocore"):
        return any(cls.__name__ in _BOTO_RETRIED for cls in type(error).__mro__)
    if isinstance(error, OSError):
        return not isinstance(error, _FINAL_TYPES) and error.errno not in _FINAL_ERRNOS
    if module == "builtins":
        return isinstance(error, EOFError)
    return not isinstance(error, _FAULTS_OF_OURS)


def http_status(error: BaseException) -> tuple[int, str]:
    """The HTTP status and the store's error code behind an error; 0 and "" if there are none."""
    for cause in (error, error.__cause__):
        response: Any = getattr(cause, "response", None)
        if isinstance(response, Mapping):
            status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) or 0)
            code = str(response.get("Error", {}).get("Code", ""))
            # An error in a response of status 200 (a copy, the end of a multipart upload) is the server's.
            return (500 if 0 < status < 400 and code else status), code
        found = getattr(cause, "status", None) or getattr(cause, "status_code", None)
        if isinstance(found, int):
            return found, ""
    return 0, ""

"""The pipeline's exceptions, each with the exit code of the command line.

Every message is one line that names the offending value, what would be allowed and what to do about it.
Raising one of these never undoes or damages anything that was committed before.
"""

from __future__ import annotations

from pipeline.base.redaction import redacted


class XmemError(Exception):
    """A failure the user can act on; the command line prints its message and exits with `exit_code`.

    Messages name the URI that was given; they end up in logs, so its credentials are taken out here.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class UsageError(XmemError):
    """The request itself is wrong: a bad option, prompt, id or query. Nothing was started."""

    exit_code = 2


class PromptError(UsageError):
    """A prompt cannot be read or does not fit the video."""


class SourceError(XmemError):
    """The video cannot be opened, or holds no decodable frame."""


class NoSuchSourceError(SourceError):
    """There is no video at the path or URI that was given."""

    exit_code = 2


class NotAVideoError(SourceError):
    """What was read as a whole is certainly no video: opening it again cannot help."""


class PictureTooLargeError(NotAVideoError):
    """A picture has more pixels than may be decoded (`max_pixels`)."""


class StoreError(XmemError):
    """The output folder cannot be read or written."""


class OutputError(StoreError):
    """The output folder as a whole cannot be used: it is full, read-only, not there, or access is denied."""


class SettingsConflictError(UsageError):
    """The output folder holds this stream under other settings; the message says which differ."""


class AnotherWriterError(StoreError):
    """Somebody else committed different rows under the name this writer was about to commit; it stops."""


def one_line(error: BaseException) -> str:
    """An exception's text without line breaks, with its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def bare_reason(error: BaseException) -> str:
    """`one_line`, of what a system call raised only why: for messages that name the file themselves.

    The full text has the error's number before that and the path, as the system knows it, after it. Where a
    message does not say what was touched (a plugin's failure, say), the path is the better half: `one_line`.
    """
    reason = error.strerror if isinstance(error, OSError) else None
    return one_line(error) if reason is None else " ".join(reason.split()) or type(error).__name__

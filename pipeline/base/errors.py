"""The pipeline's exceptions, each with the exit code of the command line.

Every message is one line that names the offending value, what is allowed and what to do about it. None of
these errors ever undoes or damages what was committed before.
"""

from __future__ import annotations

from pipeline.base.redaction import redacted


class XmemError(Exception):
    """A failure that the user can act on; the command line prints its message and exits with `exit_code`.

    Messages name the given URI and end up in logs, so credentials are removed from them here.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class UsageError(XmemError):
    """The request itself is wrong: an invalid option, prompt, id or query. Nothing was started."""

    exit_code = 2


class PromptError(UsageError):
    """A prompt cannot be read or does not fit the video."""


class SourceError(XmemError):
    """The video cannot be opened, or has no decodable frame."""


class NoSuchSourceError(SourceError):
    """There is no video at the path or URI that was given."""

    exit_code = 2


class NotAVideoError(SourceError):
    """The whole input was read and is not a video: opening it again cannot help."""


class PictureTooLargeError(NotAVideoError):
    """A picture has more pixels than allowed (`max_pixels`)."""


class StoreError(XmemError):
    """The output folder cannot be read or written."""


class OutputError(StoreError):
    """The output folder as a whole cannot be used: it is full, read-only, missing, or access is denied."""


class SettingsConflictError(UsageError):
    """The output folder holds this stream with other settings; the message says which differ."""


class AnotherWriterError(StoreError):
    """Another writer committed different rows under the name that this writer was about to commit."""


def one_line(error: BaseException) -> str:
    """An exception's text without line breaks; its type if the text is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def bare_reason(error: BaseException) -> str:
    """As `one_line`, but of a failed system call only the reason, for messages that name the file themselves.

    The full text also has the error number and the path. Where a message does not name what was accessed (a
    plugin's failure, say), the path is worth having: use `one_line`.
    """
    reason = error.strerror if isinstance(error, OSError) else None
    return one_line(error) if reason is None else " ".join(reason.split()) or type(error).__name__

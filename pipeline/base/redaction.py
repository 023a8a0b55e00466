"""Redaction of credentials in URIs and texts before they reach records, messages or logs."""

from __future__ import annotations

import re
import traceback

# Up to the last "@" before the path: an unescaped one may be part of the password. Only the placeholder of
# our own help, word for word and with no other "@" behind it, is no user information.
_USER = re.compile(
    r"""(?x) (?<=://) (?! \[user\[:password\]@\] [^/?\#\s'"<>@]* (?: [/?\#\s'"<>] | $ ) ) [^/?\#\s'"<>]* @ """
)
_PARAMETER = re.compile(
    r"""(?ix) ( [?&;] (?:
        x-(?:amz|goog)-[\w-]+ | awsaccesskeyid | googleaccessid | key-pair-id | policy | expires
        | sig | sas | auth | authorization | pw | pwd | pass | passwd | passphrase | loginpas | api-?key
        | (?:[\w-]*[_-])? (?:signature | token | secret | password | credentials? | api_key | access_key)
    ) = ) [^&;\#\s'"<>]+ """
)
# A family of recorders has everything in the path: user=admin_password=secret_channel=1_stream=0.sdp
_IN_PATH = re.compile(r"(?i)(?<=[/_]password=)[^/?#\s'\"<>&]+?(?=_(?:channel|stream)=|[/?#\s'\"<>&]|$)")


def redacted(text: str) -> str:
    """The text with every URI in it free of user names, passwords, and signatures in its query.

    Half characters, which a path from the command line may hold, become escapes: the result can be stored.
    """
    text = _IN_PATH.sub("***", _PARAMETER.sub(r"\1***", _USER.sub("", text)))
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def redacted_trace(error: BaseException) -> str:
    """The error with its traceback and its causes, for the log: a text of several lines."""
    return redacted("".join(traceback.format_exception(error)).strip())


def shareable(error: BaseException) -> BaseException | None:
    """The error, to be named as the cause of another; None if it, or what led to it, says credentials.

    A traceback prints the texts of all causes, and client libraries put whole URLs into theirs.
    """
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        text = str(link)
        if redacted(text) != text.encode("utf-8", "backslashreplace").decode("utf-8"):
            return None
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return error

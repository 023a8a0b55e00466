"""Redaction of credentials in URIs and texts before they reach records, messages or logs."""

from __future__ import annotations

import re
import traceback

# Up to the last "@" before the path: an unescaped one may be part of the password. Only the placeholder of
# our own help text, verbatim and not followed by another "@", is not user information.
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
# One family of recorders has credentials in the path: user=admin_password=secret_channel=1_stream=0.sdp
_IN_PATH = re.compile(r"(?i)(?<=[/_]password=)[^/?#\s'\"<>&]+?(?=_(?:channel|stream)=|[/?#\s'\"<>&]|$)")


def redacted(text: str) -> str:
    """Remove user names, passwords and signatures in the query from every URI in a text.

    Lone surrogates, which a path from the command line may contain, become escapes, so the result can be
    stored.
    """
    text = _IN_PATH.sub("***", _PARAMETER.sub(r"\1***", _USER.sub("", text)))
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def redacted_trace(error: BaseException) -> str:
    """The error with its traceback and its causes, as a text of several lines for the log."""
    return redacted("".join(traceback.format_exception(error)).strip())


def shareable(error: BaseException) -> BaseException | None:
    """Return the error for use as the cause of another; None if it or one of its causes contains credentials.

    A traceback prints the texts of all causes, and client libraries include whole URLs in theirs.
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

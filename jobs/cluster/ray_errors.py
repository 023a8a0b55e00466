"""Condenses Ray's failure reports to one line. Does not import Ray."""

from __future__ import annotations

_MOST = 300
_TRACEBACK = "Traceback (most recent call last):"


def brief(text: str) -> str:
    """Condense a text to one line of at most 300 characters; of a traceback keep the final error only."""
    head, trace, tail = text.partition(_TRACEBACK)
    if trace:
        # A traceback's frames are indented; its final error is not.
        ends = [line for line in tail.splitlines() if line.strip() and not line[0].isspace()]
        ends = [
            line for line in ends if _TRACEBACK not in line and not line.startswith(("During ", "The above "))
        ]
        text = f"{head} {ends[-1] if ends else ''}"
    text = " ".join(text.split())
    return text if len(text) <= _MOST else f"{text[: _MOST - 4]} ..."


def death(error: BaseException, machine: str, *, machine_gone: bool) -> str:
    """Why a worker was lost, from the error of a call to it.

    Args:
        machine: name of its machine, for the message.
        machine_gone: whether the whole machine was lost.
    """
    if machine_gone:
        return f"its machine ({machine}) was lost"
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "running low on memory" in text:
        return f"Ray ended it, since {machine} ran out of memory: use fewer actors or a smaller --size"
    if type(error).__name__ == "ActorUnavailableError":
        return f"the worker on {machine} does not answer: its process died, or the machine was lost"
    return f"the worker's process died on {machine}"

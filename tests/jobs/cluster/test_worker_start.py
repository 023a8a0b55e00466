"""The program that starts workers of a local Ray does what Ray's own does, or leaves it to that."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from ray._private.runtime_env.context import RuntimeEnvContext
from ray._private.workers import default_worker
from ray.core.generated import common_pb2

from jobs.cluster import worker_start

MESSAGES: Any = common_pb2
WORKER = ["-s", default_worker.__file__, "--node-ip-address=127.0.0.1", "--session-name=a b", "--x=$HOME 'q'"]


class BecameError(Exception):
    """The process would have become another program."""


def given(context: dict[str, Any] | str, language: str = "PYTHON") -> list[str]:
    """Arguments as a raylet gives them: Ray's options between the worker's."""
    text = context if isinstance(context, str) else json.dumps(context)
    return [*WORKER[:3], f"--language={language}", f"--serialized-runtime-env-context={text}", *WORKER[3:]]


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Command lines of programs that this process would have become; its environment is restored."""
    found: list[list[str]] = []

    def become(program: str, args: list[str]) -> None:
        found.append(args)
        raise BecameError

    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(os, "execv", become)
    monkeypatch.setattr(os, "execvp", become)
    return found


@pytest.mark.parametrize(
    "context",
    [
        {},
        {"env_vars": {}, "py_executable": None, "command_prefix": [], "java_jars": []},
        {"env_vars": {"OMP_NUM_THREADS": "2", "WORDS": "a 'b' \"c\""}, "py_executable": sys.executable},
    ],
)
def test_it_becomes_what_rays_program_would_become(
    became: list[list[str]], monkeypatch: pytest.MonkeyPatch, context: dict[str, Any]
) -> None:
    with pytest.raises(BecameError):
        worker_start.main(given(context))
    ours = dict(os.environ)
    monkeypatch.setattr(
        os, "environ", {k: v for k, v in ours.items() if k not in context.get("env_vars", {})}
    )
    known = {name: value for name, value in context.items() if value is not None}
    context_of_ray = RuntimeEnvContext.deserialize(json.dumps(known))
    with pytest.raises(BecameError):
        context_of_ray.exec_worker(WORKER, MESSAGES.Language.Value("PYTHON"))
    worker, (_, _, line) = became
    assert ["exec", *worker] == shlex.split(line)
    assert worker == [sys.executable, *WORKER]
    assert ours == dict(os.environ)


@pytest.mark.parametrize(
    ("context", "language"),
    [
        ({}, "JAVA"),
        ({"command_prefix": ["podman", "run"]}, "PYTHON"),
        ({"override_worker_entrypoint": "/elsewhere/default_worker.py"}, "PYTHON"),
        ({"something": "new"}, "PYTHON"),
        ({"py_executable": "uv run python"}, "PYTHON"),
        ({"env_vars": {"PATH": "/mine:${PATH}"}}, "PYTHON"),
        ("no JSON", "PYTHON"),
        ("[]", "PYTHON"),
    ],
)
def test_the_rest_is_left_to_rays_program(
    became: list[list[str]], context: dict[str, Any] | str, language: str
) -> None:
    before, arguments = dict(os.environ), given(context, language)
    with pytest.raises(BecameError):
        worker_start.main(arguments)
    setup = Path(default_worker.__file__).with_name("setup_worker.py")
    assert setup.is_file()
    assert became == [[sys.executable, str(setup), *arguments]]
    assert dict(os.environ) == before

"""Program that starts the workers of a local Ray, in place of Ray's `setup_worker.py`.

Ray's program imports Ray, applies a worker's environment variables, and becomes the worker, which imports Ray
again. This one does the same with the standard library only, which takes 0.4 s of CPU time less per
worker. Whatever it does not know, such as containers and other languages, it leaves to Ray's program.
"""

import json
import os
import sys

_KNOWN = {"env_vars", "py_executable"}


def worker_command(arguments: list[str]) -> tuple[list[str], dict[str, str]] | None:
    """Return a worker's command line, and the environment variables that its runtime environment sets.

    Args:
        arguments: those of Ray's program: its own options, the worker's program and the worker's options.

    Returns:
        None if Ray's program has to start the worker.
    """
    options, rest = {}, []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in ("--serialized-runtime-env-context", "--language"):
            options[name] = value
        else:
            rest.append(argument)
    try:
        context = json.loads(options.get("--serialized-runtime-env-context") or "{}")
        variables = {str(name): str(value) for name, value in (context.get("env_vars") or {}).items()}
        python = context.get("py_executable") or sys.executable
        unknown = any(value for name, value in context.items() if name not in _KNOWN)
    except (ValueError, AttributeError):
        return None
    if options.get("--language") != "PYTHON" or unknown or not rest or not os.path.isfile(python):
        return None  # `py_executable` may be a command with arguments
    if any("$" in value for value in variables.values()):
        return None  # Ray replaces ${NAME}
    return [python, *rest], variables


def ray_command(arguments: list[str]) -> list[str]:
    """Return the command line of Ray's program, which lies in the folder of the worker's program."""
    worker = next(a for a in arguments if os.path.basename(a) == "default_worker.py")
    return [sys.executable, os.path.join(os.path.dirname(worker), "setup_worker.py"), *arguments]


def main(arguments: list[str]) -> None:
    """Become the worker, or Ray's program."""
    found = worker_command(arguments)
    command, variables = (ray_command(arguments), {}) if found is None else found
    os.environ.update(variables)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])

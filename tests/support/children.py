"""Functions called in processes of their own: a crash or a hang is a result, not the end.

``python -m support.children`` imports what is slow once, and forks. pytest itself has threads, and
must not fork.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.command import environment

from benchmarks.environment import REPOSITORY

SECONDS = 120  # of a call, then it counts as hanging
GIBIBYTES = 4  # of memory above what the process begins with


@dataclass(frozen=True)
class Answer:
    """How a call ended.

    Attributes:
        signal: what ended its process, by name; None: nothing did.
        error: class and text of what it raised, and the classes above.
        value: what it returned.
    """

    signal: str | None = None
    error: str | None = None
    kinds: tuple[str, ...] = ()
    value: Any = None


class Children:
    """Calls functions by name, "module:function"; arguments and values are JSON."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def __call__(self, function: str, *arguments: Any) -> Answer:
        (answer,) = self.each(function, [arguments])
        return answer

    def each(self, function: str, calls: Iterable[Iterable[Any]]) -> list[Answer]:
        """Return the answers in order, of one process, or if it ends early of one for each call."""
        assert self._server.stdin is not None and self._server.stdout is not None
        print(
            json.dumps([function, [[*call] for call in calls]]), file=self._server.stdin, flush=True
        )
        answers = json.loads(self._server.stdout.readline())
        return [Answer(**{**answer, "kinds": tuple(answer.get("kinds", ()))}) for answer in answers]


@contextmanager
def children() -> Iterator[Children]:
    """The server of the calls."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "support.children"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=REPOSITORY,
    ) as server:
        yield Children(server)
        assert server.stdin is not None
        server.stdin.close()


def _limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + GIBIBYTES * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(function: str, arguments: list[Any]) -> dict[str, Any]:
    module, _, name = function.partition(":")
    signal.alarm(SECONDS)
    try:
        return {"value": getattr(importlib.import_module(module), name)(*arguments)}
    except BaseException as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return {"error": f"{kinds[0]}: {error}", "kinds": kinds}


def _forked(function: str, calls: list[Any]) -> list[dict[str, Any]]:
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.close(reading)
        os.dup2(2, 1)  # what libraries print is no answer
        _limit()
        answers = [_answer(function, call) for call in calls]
        with os.fdopen(writing, "w") as pipe:
            json.dump(answers, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        return list(json.loads(text))
    if len(calls) > 1:
        return [_forked(function, [call])[0] for call in calls]
    return [{"signal": signal.Signals(-status).name if status < 0 else f"exit {status}"}]


def main() -> None:
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        function, calls = json.loads(line)
        importlib.import_module(function.partition(":")[0])  # once, for all that follow
        print(json.dumps(_forked(function, calls)), flush=True)


if __name__ == "__main__":
    main()

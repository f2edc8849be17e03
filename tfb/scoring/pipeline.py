"""The engine of one process: reading and tokenizing run ahead of the model in a thread."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

from tfb.scoring.job import Job
from tfb.scoring.scorer import Prepared, Scored
from tfb.scoring.windows import Window

AHEAD = 2  # windows that are read and tokenized before they are needed


class LocalEngine:
    """One model in this process. An engine is made of a job, says what configuration it computes
    with, and turns windows into scored windows."""

    def __init__(self, job: Job) -> None:
        self._bayes, self._tokenizer = job.load()
        self._job = job

    def configuration(self) -> dict[str, Any]:
        """See :meth:`Job.configuration`."""
        return self._job.configuration(self._bayes, self._tokenizer)

    def scored(self, windows: Iterable[Window]) -> Generator[Scored, None, None]:
        """Score windows in turn; an error of the thread that reads ahead is raised here."""
        scorer = self._job.scorer(self._bayes, self._tokenizer)
        stream = iter(windows)

        def prepare() -> Prepared | None:
            window = next(stream, None)
            return None if window is None else scorer.prepare(window)

        reader = ThreadPoolExecutor(1, thread_name_prefix="tfb-reader")
        try:
            ahead = deque(reader.submit(prepare) for _ in range(AHEAD))
            while (prepared := ahead.popleft().result()) is not None:
                ahead.append(reader.submit(prepare))
                yield scorer.compute(prepared)
        finally:
            reader.shutdown(wait=True, cancel_futures=True)


class Stop:
    """Within this context SIGINT and SIGTERM only set ``signal``; a second one acts as usual."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

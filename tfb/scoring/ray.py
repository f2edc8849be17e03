"""The engine of several GPUs or machines: plain actors of Ray, one model each.

The driver, the process of ``tfb score``, is the only one that reads and writes: it hands the rows
of a shard to an actor that has room, and writes what comes back. So parts and resume are those of
the local engine. A row's bits depend on its shard, the model, the libraries, the kind of device
and, on a CPU, the number of torch threads, which workers take from the driver.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import signal
import threading
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tfb.adapters.artifact import base_of
from tfb.data.rows import Row
from tfb.plain import differences
from tfb.scoring.job import Job, Work
from tfb.scoring.scorer import Result, rows_of

RETRIES = 3  # of a shard whose actor died
RAISED = re.compile(r"[\w.]+(Error|Exception): ")  # the end of a traceback
IN_FLIGHT = 2  # shards of an actor: one that is scored, one that waits


class EngineError(ValueError):
    """Workers failed, or compute something else; the message says what to do."""


def import_ray() -> Any:
    """Import Ray; where it is missing, name the extra."""
    # No word of a run leaves the machine. Ray reads this once.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            'engine=ray needs Ray, which is not installed; pip install "tfb[ray]"'
        ) from error
    return ray


class RayEngine:
    """A model in each of ``job.workers`` actors; see :class:`tfb.scoring.run.LocalEngine`.

    Without ``job.ray_address`` the cluster is that of ``RAY_ADDRESS``, or a Ray of its own on this
    machine. A worker takes one GPU if there is any, else a CPU for each torch thread.
    """

    def __init__(self, job: Job) -> None:
        self._ray = ray = import_ray()
        if not ray.is_initialized():
            _connect(ray, job.ray_address)
        base = base_of(job.folder, job.base)
        job = replace(job, base=_absolute(base), artifact=_absolute(job.artifact))
        threads = torch.get_num_threads()
        total = ray.cluster_resources()
        gpu = total.get("GPU", 0) >= 1 and not (job.device or "cuda").startswith("cpu")
        needs = {"num_cpus": 1, "num_gpus": 1} if gpu else {"num_cpus": threads}
        fit = int(total["GPU"]) if gpu else int(total.get("CPU", 0)) // threads
        workers = job.workers or max(1, fit)
        # A cluster may grow to what is asked for, this machine does not.
        if workers > fit and job.ray_address is None:
            each = "one GPU" if gpu else f"{threads} CPUs, one a torch thread"
            raise ValueError(
                f"workers={workers}: each takes {each}, so {fit} fit; take fewer workers"
                + ("" if gpu else " or a smaller OMP_NUM_THREADS")
            )
        actor = ray.remote(Worker).options(max_restarts=-1, max_task_retries=RETRIES, **needs)
        self._actors = [actor.remote(job, threads) for _ in range(workers)]
        # That of the first worker that is ready; the others are compared with it.
        self.configuration = self._first([a.configuration.remote() for a in self._actors])[1]

    def results(self, work: Iterable[Work]) -> Generator[tuple[Work, list[Result]]]:
        """Score shards; they come as they are finished."""
        shards = iter(work)
        next_ = next(shards, None)
        # A worker that is not there yet, as where a cluster is still growing, gets no shard.
        flying: dict[Any, tuple[Any, Work | None]] = {
            actor.configuration.remote(): (actor, None) for actor in self._actors
        }
        try:
            while next_ is not None or any(found for _, found in flying.values()):
                task, answer = self._first(list(flying))
                actor, found = flying.pop(task)
                for _ in range(IN_FLIGHT if found is None else 1):
                    if next_ is not None:
                        task = actor.score.remote(rows_of(next_.items), self.configuration)
                        flying[task] = actor, next_
                        next_ = next(shards, None)
                if isinstance(answer, str):
                    raise EngineError(answer)
                if found is not None:
                    yield found, answer
        finally:
            for actor in self._actors:
                self._ray.kill(actor)

    def _first(self, tasks: list[Any]) -> tuple[Any, Any]:
        """Wait for one of the tasks; return it and its answer."""
        (task,), _ = self._ray.wait(tasks, num_returns=1)
        try:
            return task, self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            raise EngineError(
                f"a Ray worker failed for good ({_reason(error)}); what was finished is kept: see "
                "to it and continue with resume=True"
            ) from error


class Worker:
    """One model; scores the rows of one shard a call."""

    def __init__(self, job: Job, threads: int) -> None:
        torch.set_num_threads(threads)
        bayes, tokenizer = job.load()
        # In this order, as in one process: encoding may change a tokenizer, and its hash.
        self._configuration = job.configuration(bayes, tokenizer)
        self._scorer = job.scorer(bayes, tokenizer)

    def configuration(self) -> dict[str, Any]:
        """Return what its results depend on."""
        return self._configuration

    def score(self, rows: Sequence[Row], expected: dict[str, Any]) -> list[Result] | str:
        """Return results, or why this worker's are not those of the run."""
        if others := differences(expected, self._configuration):
            return (
                f"a worker on {platform.node()} has another configuration ({'; '.join(others)}); "
                "give all machines the same files and libraries"
            )
        return self._scorer(rows)


def _reason(error: Exception) -> str:
    """Return one line of an error of Ray, which holds whole tracebacks."""
    lines = str(error).splitlines() or [""]
    return next((line for line in reversed(lines) if RAISED.match(line)), lines[-1])


def _absolute(name: str) -> str:
    """Return a folder's full name, since workers may run elsewhere; a hub's name stays."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def _connect(ray: Any, address: str | None) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    finally:
        if threading.current_thread() is threading.main_thread():  # Ray sets its own
            signal.signal(signal.SIGTERM, handler)

"""The engine of several GPUs or machines. Ray Data reads, places and repeats.

One read task cuts the input into windows, on the machine that runs ``tfb score``; each is one
block, so that Ray Data's back-pressure bounds how many are ahead. Blocks go to a pool of actors of
one model each, and results come back in the order in which they are finished to this process, the
only one that writes. So parts, manifest and resume are those of the local engine. Windows and
results travel as Ray sends everything between a run's own processes, pickled; no file is.

**Bit-identity.** A row's bits depend on its window, the model, the libraries (in the manifest), the
kind of device and, on a CPU, the number of torch threads: workers take that of this process
(``OMP_NUM_THREADS``). GPUs of different models round differently. A worker whose configuration is
not that of the run, such as another copy of the model on another machine, refuses.

**Failures.** The read task is a function of the files: lost blocks are read again. A worker that
died is replaced by Ray and its window repeated, without end: attempts are counted here, and after
``RETRIES`` more the run ends with an error. What was finished is kept.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tfb.scoring.job import Job, differences
from tfb.scoring.scorer import Scored
from tfb.scoring.windows import Window

RETRIES = 3


class EngineError(ValueError):
    """Workers failed, or compute something else; the message says what to do."""


def import_ray() -> Any:
    """Ray with Ray Data.

    Raises:
        ImportError: they are missing; names the extra.
    """
    # No word of a run leaves the machine. Ray reads this once.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with _quietly():
            import ray
            import ray.data
    except ImportError as error:
        raise ImportError(
            '--engine ray needs Ray Data, which is not installed; pip install "tfb[ray]"'
        ) from error
    return ray


class RayEngine:
    """A model in each of ``job.workers`` actors; see :class:`tfb.scoring.pipeline.LocalEngine`.

    Joins the cluster at ``job.ray_address`` (None: ``RAY_ADDRESS``, or a Ray of its own on this
    machine, which ends with the process). A worker takes one GPU where the cluster has any and
    ``job.device`` is not a CPU, else a CPU for each torch thread. Model and artifact must be found
    under the same names on every machine, the input only here.

    Raises:
        ImportError: no Ray. ConnectionError: no cluster there. ValueError: more workers than fit
            on this machine.
    """

    def __init__(self, job: Job) -> None:
        self._ray = ray = import_ray()
        if not ray.is_initialized():
            _connect(ray, job.ray_address)
        self._job = replace(job, model=_absolute(job.model), artifact=_absolute(job.artifact))
        self._threads = torch.get_num_threads()
        total = ray.cluster_resources()
        gpu = total.get("GPU", 0) >= 1 and not (job.device or "cuda").startswith("cpu")
        self._needs: dict[str, Any] = (
            {"num_cpus": 1, "num_gpus": 1} if gpu else {"num_cpus": self._threads}
        )
        fit = int(total["GPU"]) if gpu else int(total.get("CPU", 0)) // self._threads
        self._workers = job.workers or max(1, fit)
        # A cluster may grow to what is asked for, this machine does not.
        if self._workers > fit and job.ray_address is None:
            each = "one GPU" if gpu else f"{self._threads} CPUs, one a torch thread"
            raise ValueError(
                f"--workers {self._workers}: each takes {each}, so {fit} fit; lower --workers"
                + ("" if gpu else " or OMP_NUM_THREADS")
            )

    def configuration(self) -> dict[str, Any]:
        """See :meth:`Job.configuration`; a worker's, since this machine may have no GPU."""
        remote = self._ray.remote(_configuration).options(**self._needs)
        with self._failures():
            self._expected: dict[str, Any] = self._ray.get(remote.remote(self._job, self._threads))
        return self._expected

    def scored(self, windows: Iterable[Window]) -> Generator[Scored, None, None]:
        """Score windows in any order; the reader's error is raised after the windows before it.

        Args:
            windows: can be sent to the process that reads.

        Raises:
            EngineError: a worker has another configuration, or failed for good.
        """
        broken: Exception | None = None
        with self._failures():
            batches = iter(self._dataset(windows).iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ))  # fmt: skip
            for table in batches:
                for found in map(pickle.loads, table["result"].to_pylist()):
                    if isinstance(found, EngineError):
                        raise found
                    if isinstance(found, Exception):
                        broken = found
                    else:
                        yield found
        if broken is not None:
            raise broken

    def _dataset(self, windows: Iterable[Window]) -> Any:
        data = self._ray.data
        with _quietly():
            context = data.DataContext.get_current().copy()
        attempts = self._ray.remote(_Attempts).options(num_cpus=0).remote(1 + RETRIES)
        context.target_max_block_size = 1  # bytes: each window is a block
        context.enable_progress_bars = False
        with data.DataContext.current(context):
            read = data.read_datasource(
                _source(windows),
                override_num_blocks=1,
                num_cpus=0,  # it waits most of the time
                label_selector={"ray.io/node-id": self._ray.get_runtime_context().get_node_id()},
            )
            return read.map_batches(
                _Worker,
                fn_constructor_args=(self._job, self._threads, self._expected, attempts),
                batch_size=1,
                batch_format="pyarrow",
                compute=data.ActorPoolStrategy(size=self._workers),
                **self._needs,
            )

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            said = (str(cause).splitlines() or [""])[0]  # Ray's own are whole tracebacks
            raise EngineError(
                f"a Ray worker failed for good ({type(cause).__name__}: {said}); what was finished "
                "is kept: see to it and continue with --resume"
            ) from error


class _Worker:
    """One model; scores one window a call."""

    def __init__(self, job: Job, threads: int, expected: dict[str, Any], attempts: Any) -> None:
        torch.set_num_threads(threads)
        bayes, tokenizer = job.load()
        self._scorer = job.scorer(bayes, tokenizer)
        self._other = differences(expected, job.configuration(bayes, tokenizer))
        self._attempts = attempts

    def __call__(self, batch: Any) -> Any:
        (window,) = map(pickle.loads, batch["window"].to_pylist())
        failed = isinstance(window, Exception)
        return _column("result", window if failed else self._result(window))

    def _result(self, window: Window) -> Scored | EngineError:
        import ray

        if self._other:
            return EngineError(
                f"a worker on {os.uname().nodename} has another configuration "
                f"({'; '.join(self._other)}); give all machines the same files and libraries"
            )
        if not ray.get(self._attempts.another.remote(window.number)):
            first = next((item.id for item in window.items if item.row), None)
            return EngineError(
                f"the {len(window.items)} rows from {first!r} on have ended each worker that took "
                "them (out of memory?); what was finished is kept: see to it and continue with "
                "--resume"
            )
        return self._score(window)

    def _score(self, window: Window) -> Scored:
        return self._scorer.compute(self._scorer.prepare(window))


class _Attempts:
    """Counts how often each window was begun."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._begun: Counter[int] = Counter()

    def another(self, number: int) -> bool:
        """Whether a window may be begun once more."""
        self._begun[number] += 1
        return self._begun[number] <= self._most


def _configuration(job: Job, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    return job.configuration(*job.load())


def _source(windows: Iterable[Window]) -> Any:
    """Windows as a source of Ray Data; in place of the one that cannot be read, the error."""
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    folder = Path.cwd()

    def read() -> Iterator[Any]:
        os.chdir(folder)  # names of files in messages and keys stay as they were given
        try:
            for window in windows:
                yield _column("window", window)
        except (ValueError, OSError) as error:
            yield _column("window", error)

    class Windows(Datasource):
        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, *_: Any, **__: Any) -> list[Any]:
            unknown = BlockMetadata(
                num_rows=None, size_bytes=None, input_files=None, exec_stats=None
            )
            return [ReadTask(read, unknown)]

    return Windows()


def _column(name: str, value: Any) -> Any:
    """A block of one row."""
    import pyarrow as pa

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(4 * limit)  # pickle takes two levels where JSON, which was read, took one
    try:
        data = pickle.dumps(value)
    finally:
        sys.setrecursionlimit(limit)
    return pa.table({name: pa.array([data], pa.binary())})


def _absolute(name: str) -> str:
    """A folder's full name, since workers may run elsewhere; a hub's name stays."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def _connect(ray: Any, address: str | None) -> None:
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with _quietly():
            ray.init(
                address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
            )
    finally:
        if main:  # Ray sets its own
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _quietly() -> Iterator[None]:
    """Ray Data announces every run, and warns of its own deprecated settings."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield

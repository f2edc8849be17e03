"""Resident memory of ``tfb score`` over a long run.

    python -m benchmarks.scoring.memory --record

200,000 rows are scored by the real small Llama in a process of its own, whose resident memory is
read every second from /proc. It is a count of bytes, not a timing: a busy machine only makes it
longer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

os.environ["HF_HUB_OFFLINE"] = "1"

import tfb
from benchmarks.environment import environment, results_folder, shared_folder
from benchmarks.fixtures import STORIES, stories_model
from benchmarks.timing import Bench, Row, heading, record, target

ROWS, DRAWS, TAIL, SIGMA = 200_000, 10, 1, 0.05
FIRST_MINUTE = 60.0
GROWTH = 1.05  # of what is held after the first minute, at most


def inputs(shared: Path, folder: Path, rows: int) -> Path:
    """Write rows of all lengths: the texts of clinc-domain, in turn, ids made distinct."""
    texts = [
        json.loads(line)
        for name in ("validation", "test")
        for line in (shared / f"data/clinc-domain/{name}.jsonl").read_text().splitlines()
    ]
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            file.write(json.dumps({**texts[i % len(texts)], "id": f"row-{i}"}) + "\n")
    return path


def artifact(shared: Path, folder: Path) -> Path:
    """Save the shared adapter at a sigma that tail sampling bears; nothing is searched here."""
    bayes = tfb.bayesianize(stories_model(shared))
    bayes.configure(sigma=SIGMA, mode="tail", tail=TAIL)
    tfb.save(bayes, folder / "artifact")
    return folder / "artifact"


def resident(pid: int) -> int:
    """Return the bytes of resident memory of a process; 0 once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def watch(process: subprocess.Popen[bytes]) -> Iterator[tuple[float, int]]:
    """Yield seconds since the start and bytes, once a second until the process ends."""
    start = time.monotonic()
    while process.poll() is None:
        if held := resident(process.pid):
            yield time.monotonic() - start, held
        time.sleep(1)


def measure(shared: Path, bench: Bench, rows: int, threads: int) -> Row:
    environment()  # kept: the commit is that of the start
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        what = (artifact(shared, folder), inputs(shared, folder, rows))
        how = ("--base", shared / STORIES, "--output", folder / "scored", "--draws", DRAWS)
        command = [sys.executable, "-m", "tfb", "score", *what, *how]
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        seen = list(watch(process))
        if process.returncode:
            raise SystemExit(f"tfb score ended with status {process.returncode}")
        manifest = json.loads((folder / "scored/manifest.json").read_text())
    if manifest["counts"]["rows"] != rows or manifest["counts"]["errors"]:
        raise SystemExit(f"expected {rows} rows without errors, found {manifest['counts']}")
    after = [held for when, held in seen if when > FIRST_MINUTE]
    if len(after) < 60:
        raise SystemExit(f"the run took {seen[-1][0]:.0f} s: too short to judge; take more rows")
    # What the first minute ended with: the median of the ten samples that follow it.
    settled = median(after[:10])
    growth = max(after[10:]) / settled
    held = {
        "after_first_minute": settled,
        "median": median(after),
        "most": max(after),
        "last": after[-1],
    }
    point = {
        "rows": rows,
        "draws": DRAWS,
        "mode": "tail",
        "tail": TAIL,
        "threads": threads,
        "model": "stories260K",
        "adapter": "stories260K-clinc-domain",
    }
    name = "resident memory after the first minute, growth"
    row = heading(bench, "score", "resident memory", point) | {
        "bytes": held,
        "growth": growth,
        "seconds": seen[-1][0],
        "targets": [target(name, growth, GROWTH, at_least=False)],
    }
    return record(bench, row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    try:
        shared = shared_folder()
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    bench = Bench(results=results_folder() if options.record else None)
    row = measure(shared, bench, options.rows, options.threads)
    print(json.dumps({key: row[key] for key in ("bytes", "growth", "seconds", "targets")}))


if __name__ == "__main__":
    main()

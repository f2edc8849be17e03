"""Resident memory of ``tfb score`` over a long run: ``python -m benchmarks.memory --record``.

200,000 rows made from the clinc-domain texts are scored by the real small Llama with ten draws in
tail mode, in a process of its own, whose resident memory is read every second from /proc. The
target: what it holds after the first minute grows by less than 5 %. It is a count of bytes, not a
timing: a busy machine only makes it longer.
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
from benchmarks.environment import environment, shared_folder
from benchmarks.timing import Bench, Row, record, target

FOLDER = Path(__file__).resolve().parent
ROWS, DRAWS, TAIL, SIGMA = 200_000, 10, 1, 0.05
FIRST_MINUTE = 60.0
GROWTH = 1.05


def inputs(shared: Path, folder: Path, rows: int) -> Path:
    """Rows of all lengths: the texts of clinc-domain, in turn, ids made distinct."""
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
    """The shared adapter at a sigma that tail sampling bears; nothing is searched here."""
    base, adapter = shared / "models/stories260K", shared / "adapters/stories260K-clinc-domain"
    bayes = tfb.bayesianize(tfb.load_adapter(tfb.load_base(base, adapter), adapter))
    bayes.configure(mode="tail", tail=TAIL)
    bayes.configure(sigma=SIGMA)
    tfb.save(bayes, folder / "artifact")
    return folder / "artifact"


def resident(pid: int) -> int:
    """Bytes of resident memory of a process; 0 once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def watch(process: subprocess.Popen[bytes]) -> Iterator[tuple[float, int]]:
    """(seconds since the start, bytes), once a second until the process ends."""
    start = time.monotonic()
    while process.poll() is None:
        if held := resident(process.pid):
            yield time.monotonic() - start, held
        time.sleep(1)


def measure(shared: Path, bench: Bench, rows: int, threads: int) -> Row:
    environment()  # kept: the commit is that of the start
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "tfb", "score", "--model", shared / "models/stories260K",
                   "--artifact", artifact(shared, folder), "--input", inputs(shared, folder, rows),
                   "--output", folder / "scored", "--draws", DRAWS]  # fmt: skip
        process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
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
    return record(bench, {
        "suite": "score", "measure": "resident memory", "device": "cpu", "toy": False,
        "point": {"rows": rows, "draws": DRAWS, "mode": "tail", "tail": TAIL, "threads": threads,
                  "model": "stories260K", "adapter": "stories260K-clinc-domain"},
        "bytes": {"after_first_minute": settled, "median": median(after), "most": max(after),
                  "last": after[-1]},
        "growth": growth, "seconds": seen[-1][0],
        "targets": [target("resident memory after the first minute, growth", growth, GROWTH,
                           at_least=False)],
    })  # fmt: skip


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
    bench = Bench.untimed(FOLDER / "results" if options.record else None)
    row = measure(shared, bench, options.rows, options.threads)
    print(json.dumps({key: row[key] for key in ("bytes", "growth", "seconds", "targets")}))


if __name__ == "__main__":
    main()

"""The table of the suite "score": jobs against scripts, workers, memory, a million prompts."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.markdown import Row, blocks, missed, spread, table, taken_on

NOT_MEASURED = (
    "*Not measured yet: `python -m pytest benchmarks/scoring/test_score.py --record` (two quiet "
    "cores), `benchmarks/gpu.sh --stage score` (a GPU).*"
)
JOBS = (
    "A job reads, tokenizes, predicts and writes Parquet parts. The plain script takes padded "
    "batches in the order of the file and runs 10 full passes with materialised noise; the "
    "sorted one sorts by length first; both have their best batch size. The engine is "
    "`predict` on the job's batches. {rounds} or more interleaved rounds; models are loaded "
    "beforehand."
)
WAYS = {
    "full": "full, S = 10",
    "tail": "tail k = 1, S = 10",
    "last": "last layer, S = 10",
    "naive": "plain script, 10 passes",
}


def score_table(rows: Sequence[Row]) -> str:
    """Return jobs, Ray's workers, memory and a million prompts, as far as there are rows."""
    if not rows:
        return NOT_MEASURED

    def of(measure: str) -> list[Row]:
        return [r for r in rows if r["measure"] == measure]

    return blocks(
        _throughput(of("throughput")),
        *map(_workers, of("ray workers")),
        *map(_memory, of("resident memory")),
        _million(of("million")),
        missed(rows, _name),
        taken_on(rows),
    )


def _name(row: Row) -> str:
    p = row["point"]
    return f"{p['model']}, {p.get('data', 'synthetic')}, {p['rows']} rows ({row['device']})"


def _throughput(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    body = []
    for row in rows:
        units = row["in_units_of"]["ratios"]
        tail = units["tail"]["median"]
        body.append(
            [
                f"{_name(row)}, {row['point']['tokens'] / row['point']['rows']:.0f} tokens a row",
                spread(row["ratios"]["plain"]),
                spread(row["ratios"]["sorted"]),
                f"{units['plain']['median'] / tail:.1f}",
                f"{units['sorted']['median'] / tail:.1f}",
                spread(units["ours"]),
                f"{tail / units['tail_engine']['median']:.2f}",
            ]
        )
    headings = (
        "rows/s, S = 10",
        "full job over plain script",
        "over sorted script",
        "tail job over plain script",
        "over sorted script",
        "time of full job / engine",
        "tail job / engine",
    )
    rounds = min(r["contenders"]["ours"]["rounds"] for r in rows)
    return blocks(table(headings, body), JOBS.format(rounds=rounds))


def _workers(row: Row) -> str:
    return (
        f"Two single-threaded Ray workers score {spread(row['ratios']['one_worker'])} times the "
        f"rows of one in the same time ({_name(row)}; {row['timed']})."
    )


def _memory(row: Row) -> str:
    held = row["bytes"]
    return (
        f"Memory: {row['point']['rows']:,} rows ({row['point']['model']}, {row['point']['mode']} "
        f"k = {row['point']['tail']}, {row['point']['draws']} draws) held "
        f"{held['after_first_minute'] / 2**20:.0f} MiB after the first minute, at most "
        f"{held['most'] / 2**20:.0f} MiB ({100 * (row['growth'] - 1):+.1f} %) in the "
        f"{row['seconds'] / 60:.0f} minutes of the run, {held['last'] / 2**20:.0f} MiB at its end."
    )


def _million(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    body = []
    for way, label in WAYS.items():
        for run in (r["run"] for r in rows if r["point"]["way"] == way):
            energy = run["kwh_a_million"]
            body.append(
                [
                    label,
                    f"{run['prompts_per_second']:.1f}",
                    f"{run['hours_a_million']:.1f}",
                    "not measured" if energy is None else f"{energy:.1f}",
                    str(run["prompts"]),
                ]
            )
    point = rows[0]["point"]
    headings = ("a million prompts", "rows/s", "hours", "kWh of the GPU", "prompts measured")
    note = (
        f"{point['model']}, random weights ({point['dtype']}), prompts of "
        f"{point['tokens'] / point['rows']:.0f} tokens on average; seconds and energy of the "
        "prompts that were measured are scaled by tokens."
    )
    return blocks(table(headings, body), note)

"""Files of rows whose truth is known because they are written here, and files that are damaged.

A row is written in one of a format's kinds: good as it stands in memory, bad in a known way, or
odd: one that a reader may take or refuse, but not lose.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

GOOD, BAD, ODD = "good", "bad", "odd"


@dataclass(frozen=True)
class File:
    """The bytes of a file, and of each row its kind, its line, and what it is in memory."""

    suffix: str
    data: bytes
    truth: list[tuple[str, int, dict[str, Any]]] = field(repr=False)


# --- what is in rows ------------------------------------------------------------------------------

SHADES = st.lists(st.sampled_from("abcdefghijklmnopq"), min_size=1, max_size=12).map(" ".join)
TEXTS = st.sampled_from(
    ['say "no", or', '"', '""', "a,b|c", "\n\n", "\t'", "\u2028", "<b>&"]
) | st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=20)
PROMPTS = SHADES.map("{}\n=".format) | st.tuples(SHADES, TEXTS, SHADES).map(" ".join)
KNOWN = [*"0123456789", " 3", "q", "1 2", "1 2 3", "a b"]


def names(known: Sequence[str]) -> Any:
    return st.lists(st.sampled_from(known), min_size=2, max_size=6, unique_by=str.strip)


NAMES = names(KNOWN) | names(KNOWN) | names(KNOWN) | names([*KNOWN, 'say "no"', "ü", "a,b", "a|b"])
IDS = st.text(
    st.characters(codec="utf-8", exclude_categories=["C"], exclude_characters=',"'),
    min_size=1,
    max_size=9,
)
POOL = st.fixed_dictionaries(
    {
        "id": IDS.filter(str.strip) | st.integers(0, 10**12).map(str),
        "prompt": PROMPTS,
        "choices": NAMES,
    }
)
# Any JSON, and any bytes: what no writer of rows would write.
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3),
    max_leaves=6,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "id": st.integers(0, 4) | ANY,
        "prompt": st.sampled_from(["a b c\n=", "a" * 3000, "", " ", "\x00\x1b[", "\ud800"]) | ANY,
        "choices": st.lists(st.sampled_from(["0", "1", " 3", "x", ""]), max_size=4) | ANY,
        "label": st.integers(-1, 4) | ANY,
        "text": ANY,
        "tag": ANY,
    },
)
LINES = FIELDS.map(lambda f: json.dumps(f).encode()) | st.binary(max_size=20).map(
    lambda b: b"x" + b.replace(b"\n", b"").replace(b"\r", b"")
)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


# --- JSONL ----------------------------------------------------------------------------------------

Row = dict[str, Any]
JSONL: dict[str, tuple[str, Callable[[Row], bytes]]] = {
    "plain": (GOOD, lambda r: json.dumps(r, ensure_ascii=False).encode()),
    "escaped": (GOOD, lambda r: json.dumps(r).encode()),
    "spaced": (
        GOOD,
        lambda r: b" \t" + json.dumps(r, separators=(" ,\t", " : ")).encode() + b" \r",
    ),
    "reversed": (GOOD, lambda r: json.dumps(dict(reversed(r.items()))).encode()),
    "more fields": (GOOD, lambda r: json.dumps({"tag": {"a": [1.5, None]}, **r}).encode()),
    "a key twice": (ODD, lambda r: b'{"id": "first", ' + json.dumps(r).encode()[1:]),
    "cut": (BAD, lambda r: json.dumps(r).encode()[:-9]),
    "two rows": (BAD, lambda r: json.dumps(r).encode() * 2),
    "a list": (BAD, lambda r: json.dumps([r]).encode()),
    "no prompt": (BAD, lambda r: json.dumps({"choices": r["choices"]}).encode()),
    "one choice": (BAD, lambda r: json.dumps({**r, "choices": ["0"]}).encode()),
    "equal choices": (BAD, lambda r: json.dumps({**r, "choices": ["0", "1", "0"]}).encode()),
    "a wrong label": (BAD, lambda r: json.dumps({**r, "label": 99}).encode()),
    "half a pair": (BAD, lambda r: json.dumps({**r, "prompt": "a \ud800"}).encode()),
    "no UTF-8": (BAD, lambda r: b'{"prompt": "\xff", "choices": ["0", "1"]}'),
    "a NUL": (BAD, lambda r: b"\x00" + json.dumps(r).encode()),
    "deep": (BAD, lambda r: b'{"prompt": ' + nested(100_000).encode() + b"}"),
    "too long": (BAD, lambda r: json.dumps({**r, "prompt": "a b c d e " * 400}).encode()),
    "many digits": (BAD, lambda r: b'{"id": 1' + b"0" * 5000 + b', "prompt": "a"}'),
    "deep field": (
        ODD,
        lambda r: json.dumps(r).encode()[:-1] + f', "tag": {nested(700)}}}'.encode(),
    ),
}


def jsonl(rows: Sequence[Row], kinds: Sequence[str], extra: Sequence[bytes] = ()) -> File:
    """One row a line; ``extra`` are lines of any bytes, and between the rows are blank ones."""
    truth, lines = [], []
    for n, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
        what, make = JSONL[kind]
        lines += [b" " * (n % 3)] * (n % 5 == 0)
        lines.append(make(row))
        truth.append((what, len(lines), row))
    truth += [(ODD, len(lines) + n, {}) for n in range(1, len(extra) + 1)]
    return File(".jsonl", b"\n".join([*lines, *extra]), truth)


def json_list(rows: Sequence[Row], every: int) -> File:
    """One list, with a number in place of some rows."""
    truth = [(GOOD if n % every else BAD, n + 1, row) for n, row in enumerate(rows)]
    values = [row if n % every else n for n, row in enumerate(rows)]
    return File(".json", json.dumps(values, indent=1).encode(), truth)


# --- CSV ------------------------------------------------------------------------------------------


def csv_line(row: Row, quoting: Any = csv.QUOTE_MINIMAL, end: str = "\n") -> bytes:
    made = io.StringIO(newline="")
    choices = json.dumps(row["choices"], ensure_ascii=False)
    writer = csv.writer(made, quoting=quoting, lineterminator=end)
    writer.writerow([row["id"], row["prompt"], choices])
    return made.getvalue().encode()


CSV: dict[str, tuple[str, Callable[[Row], bytes]]] = {
    "plain": (GOOD, csv_line),
    "quoted": (GOOD, lambda r: csv_line(r, csv.QUOTE_ALL)),
    "of Windows": (GOOD, lambda r: csv_line(r, end="\r\n")),
    "a value less": (BAD, lambda r: b"x,a b =\n"),
    "a value more": (BAD, lambda r: b"x,a b =,0|1,\n"),
    "nothing in it": (BAD, lambda r: b",,\n"),
    "one choice": (BAD, lambda r: b"x,a b =,0\n"),
    "no UTF-8": (BAD, lambda r: b"x,\xff\xfe,0|1\n"),
    "half a quote": (BAD, lambda r: b'x,"a b" c =,0|1\n'),
    "a quote inside": (ODD, lambda r: b'x,a " b =,0|1\n'),
    "a NUL": (ODD, lambda r: b"x,a \x00 b =,0|1\n"),
}
OPEN = b'x,"a b =,0|1\n'


def csv_file(rows: Sequence[Row], kinds: Sequence[str], opened: int | None = None) -> File:
    """A header and rows; before row ``opened`` one whose quote is never closed."""
    truth, data = list[tuple[str, int, Row]](), b"id,prompt,choices\n"
    for n, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
        if n == opened:
            truth.append((BAD, data.count(b"\n") + 1, {}))
            data += OPEN
        what, make = CSV[kind]
        truth.append((what, data.count(b"\n") + 1, row))
        data += make(row)
    return File(".csv", data, truth)


# --- Parquet and Arrow ----------------------------------------------------------------------------

TYPED: dict[str, tuple[str, Callable[[Row], Row]]] = {
    "plain": (GOOD, lambda r: r),
    "no id": (ODD, lambda r: {**r, "id": None}),
    "no prompt": (BAD, lambda r: {**r, "prompt": None}),
    "empty": (BAD, lambda r: {**r, "prompt": ""}),
    "no choices": (BAD, lambda r: {**r, "choices": None}),
    "null among choices": (BAD, lambda r: {**r, "choices": ["0", None]}),
    "no UTF-8": (BAD, lambda r: {**r, "prompt": b"a \xff b ="}),
    "too long": (BAD, lambda r: {**r, "prompt": "a b c d e " * 400}),
}


def unchecked(values: Sequence[Any]) -> pa.Array:
    """Strings whose bytes nobody checked."""
    data = [v.encode() if isinstance(v, str) else v for v in values]
    return pa.Array.from_buffers(
        pa.string(), len(data), pa.array(data, pa.binary()).buffers(), pa.array(data).null_count
    )


def typed(rows: Sequence[Row], kinds: Sequence[str], suffix: str, block: int) -> File:
    """A table in row groups or batches of ``block`` rows."""
    truth = [(TYPED[k][0], n, r) for n, (r, k) in enumerate(zip(rows, kinds, strict=True), 1)]
    made = [TYPED[kind][1](row) for row, kind in zip(rows, kinds, strict=True)]
    columns = {
        "id": pa.array([row["id"] for row in made], pa.string()),
        "prompt": unchecked([row["prompt"] for row in made]),
        "choices": pa.array([row["choices"] for row in made], pa.list_(pa.string())),
    }
    table, sink = pa.table(columns), pa.BufferOutputStream()
    if suffix == ".parquet":
        pq.write_table(table, sink, row_group_size=block)
    else:
        kind = pa.ipc.new_file if suffix == ".feather" else pa.ipc.new_stream
        with kind(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=block)
    return File(suffix, sink.getvalue().to_pybytes(), truth)


# --- files ----------------------------------------------------------------------------------------

PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".bz2": bz2.compress,
}


@st.composite
def row_files(draw: Any, rows: int) -> list[File]:
    """A file of each format with ``rows`` rows, or a few more, that repeat ten good ones."""
    pool = draw(st.lists(POOL, min_size=10, max_size=10))

    def chosen(kinds: Any) -> tuple[list[Row], list[str]]:
        good = [name for name, (what, _) in kinds.items() if what == GOOD]
        names = [*kinds, *good * (2 * len(kinds) // len(good))]
        pairs = st.tuples(st.sampled_from(pool), st.sampled_from(names))
        found = draw(st.lists(pairs, min_size=rows, max_size=rows))
        return [row for row, _ in found], [kind for _, kind in found]

    packing = draw(st.sampled_from([*PACKED]))
    texts = [
        jsonl(*chosen(JSONL), draw(st.lists(LINES, max_size=5))),
        csv_file(*chosen(CSV), draw(st.none() | st.integers(0, rows - 1))),
        json_list(chosen(CSV)[0], draw(st.integers(2, rows))),
    ]
    blocks = st.integers(1, rows)
    return [
        *(File(f.suffix + packing, PACKED[packing](f.data), f.truth) for f in texts),
        *(typed(*chosen(TYPED), s, draw(blocks)) for s in (".parquet", ".feather", ".arrow")),
    ]


SIMPLE: list[Row] = [
    {"id": f"r{n}", "prompt": f"{'abcdefghijklmnopq'[n % 17]} b c =", "choices": ["0", "1", "2"]}
    for n in range(500)
]
PLAIN = ["plain"] * len(SIMPLE)
# What once swallowed rows, or ended a run.
CORPUS: list[list[File]] = [
    [csv_file(SIMPLE, PLAIN, 496)],
    [csv_file(SIMPLE, PLAIN, 2)],
    [csv_file(SIMPLE[:50], [["plain", "quoted", "half a quote"][n % 3] for n in range(50)], 25)],
    [typed(SIMPLE[:3], ["plain", "no UTF-8", "plain"], s, 2) for s in (".parquet", ".feather")],
    [jsonl(SIMPLE[: len(JSONL)], [*JSONL])],
    [jsonl([{**row, "id": "same"} for row in SIMPLE[:4]], ["plain", "one choice", "cut", "plain"])],
]


# --- damage ---------------------------------------------------------------------------------------

# Where: a share of the length, or bytes from an end. Then how many go, and what comes instead.
DAMAGE = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True) | st.integers(-64, 63),
        st.sampled_from([0, 1, 1, 1, 1, 2, 4, 8, 64, 1 << 30]),
        st.sampled_from([b"", b"\0", b"\xff", b"\x80", b"\xff" * 7 + b"\x7f", b"[" * 2000])
        | st.binary(min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=3,
)


def damaged(data: bytes, damage: Sequence[tuple[float, int, bytes]]) -> bytes:
    """Do each damage in turn."""
    for place, gone, new in damage:
        at = int(place * len(data)) if isinstance(place, float) else place % (len(data) or 1)
        data = data[:at] + new + data[at + gone :]
    return data

"""Records to rows with keys, and rows to windows, the unit of a scoring run.

**Key.** 64 bits of BLAKE2b over the run's configuration, the id and all that the row holds; of a
row that cannot be used, its place in the input stands for the id. Keys are what a resumed run knows
its finished rows by. Only 8 bytes a row are kept of keys and ids. Two of n rows share a hash with
probability n² / 2⁶⁵: for a million rows 3e-8.

**Window.** The rows that are still to be done, in the order of the input, cut after ``size`` rows
or ``LONGEST_TEXT`` characters: where a window ends depends on nothing but the rows in it. One
window becomes one part file, and its batches depend on that window alone. A run that was killed
lacks whole windows; what is left over is cut at the same places and gets the numbers that are
missing, so its parts are those of an uninterrupted run, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain, count, islice
from typing import Any

from tfb.data.readers import Meter, Record, Source, read
from tfb.data.rows import Row, RowError, RowFormat
from tfb.scoring.hashset import HashSet

BLOCK = 256  # rows that are looked up together
LONGEST_TEXT = 1 << 25  # characters of a window's prompts
LONGEST_ERROR = 2000  # characters


@dataclass(frozen=True)
class Item:
    """A row of the input: one to score, or one with an error."""

    key: int
    id: str | None
    """None where no id could be read."""
    row: Row | None
    """None with an error."""
    error: str | None
    kept: dict[str, Any] = field(default_factory=dict)
    """Values of the columns that pass through, by their own names."""


@dataclass(frozen=True)
class Window:
    """Rows that become one part file."""

    number: int
    items: list[Item]
    share: float
    """Of the input that was read when the window was full."""


@dataclass(frozen=True)
class Reading:
    """How the input of a run is read.

    Attributes:
        sources: the files, in order. form: how their fields become rows.
        salt: hash of the run's configuration, at most 64 bytes; goes into every key.
        keep: columns that pass through. limit: read that many records; None: all.
    """

    sources: Sequence[Source]
    form: RowFormat
    salt: bytes = b""
    keep: Sequence[str] = ()
    limit: int | None = None

    def records(self, meter: Meter | None = None) -> Iterator[Record]:
        """The records of all files."""
        wanted = [*self.form.names.values(), *self.keep]
        stream = chain.from_iterable(read(source, wanted) for source in self.sources)
        return islice(stream, self.limit)

    def blocks(self, meter: Meter | None = None) -> Iterator[list[Item]]:
        """All rows, in blocks. A row with an id that was there before is one with an error."""
        stream, seen = enumerate(self.records(meter)), HashSet()
        while block := list(islice(stream, BLOCK)):
            items = [self._item(number, record) for number, record in block]
            used = [i for i, item in enumerate(items) if item.row is not None]
            hashes = [self._hash(["id", items[i].id]) for i in used]
            here: set[int] = set()
            for i, h, known in zip(used, hashes, seen.contains(hashes), strict=True):
                if known or h in here:
                    fault = f"the id {items[i].id!r} was already used; give every row its own"
                    items[i] = self._faulty(*block[i], fault, items[i].kept)
                here.add(h)
            seen.add(here)
            yield items

    def id_hash(self, name: str) -> int:
        """The hash that stands for an id."""
        return self._hash(["id", name])

    def _item(self, number: int, record: Record) -> Item:
        if record.fields is None:
            return self._faulty(number, record, record.fault or "cannot be read", {})
        kept: dict[str, Any] = {}
        try:
            kept = self._kept(record)
            row = self.form.row(record.fields, record.place, number)
        except RowError as error:
            return self._faulty(number, record, str(error), kept)
        content = [row.id, row.messages or row.prompt, row.choices, row.text, row.label, kept]
        return Item(self._hash(content), row.id, row, None, kept)

    def _faulty(self, number: int, record: Record, fault: str, kept: dict[str, Any]) -> Item:
        name = None
        if record.fields is not None:
            try:
                name = self.form.row_id(record.fields, record.place, number)
            except RowError:
                name = None
        content = ["fault", record.place, fault if record.fields is None else record.fields]
        try:
            key = self._hash(content)
        except RecursionError:  # brackets that can be read, but not written
            key = self._hash(["fault", record.place, fault])
        text = fault if fault.startswith(record.place) else f"{record.place}: {fault}"
        return Item(key, name, None, error_text(text), kept)

    def _kept(self, record: Record) -> dict[str, Any]:
        if not self.keep:
            return {}
        kept = {name: (record.fields or {}).get(name) for name in self.keep}
        try:
            json.dumps(kept, ensure_ascii=False, default=str).encode()
        except (ValueError, RecursionError) as error:
            names = ", ".join(map(repr, self.keep))
            raise RowError(
                f"{record.place}: a column that is to be kept ({names}) cannot be written "
                f"({type(error).__name__}); write it as proper Unicode"
            ) from error
        return kept

    def _hash(self, content: list[Any]) -> int:
        text = json.dumps(content, default=str, separators=(",", ":"))
        return int.from_bytes(blake2b(text.encode(), digest_size=8, key=self.salt).digest(), "big")


def windows(
    reading: Reading, size: int, done: HashSet, numbers: Iterable[int] | None = None
) -> Iterator[Window]:
    """The rows whose key is not in ``done``, as windows; see the top of the file.

    Args:
        size: most rows of a window. numbers: those that windows get, in turn; None: 0, 1, ...
    """
    meter = Meter(reading.sources)
    free = iter(count() if numbers is None else numbers)
    pending: list[Item] = []
    text = seen = 0
    for block in reading.blocks(meter):
        seen += len(block)
        share = max(meter.share, seen / reading.limit if reading.limit else 0.0)
        for item, there in zip(block, done.contains([i.key for i in block]), strict=True):
            if there:
                continue
            pending.append(item)
            text += 0 if item.row is None else item.row.characters
            if len(pending) >= size or text >= LONGEST_TEXT:
                yield Window(next(free), pending, share)
                pending, text = [], 0
    if pending:
        yield Window(next(free), pending, 1.0)


@dataclass(frozen=True)
class Windows:
    """The windows of a run; each time they are iterated over, in any process, the same ones.

    Attributes: see :func:`windows`.
    """

    reading: Reading
    size: int
    done: HashSet
    numbers: Iterable[int]

    def __iter__(self) -> Iterator[Window]:
        return windows(self.reading, self.size, self.done, self.numbers)


def check_unchanged(reading: Reading, done: HashSet, done_ids: HashSet) -> None:
    """Every finished row is still in the input, as it was.

    Raises:
        RowError: a finished row has changed, or is gone.
    """
    matched = 0
    for block in reading.blocks():
        there = done.contains([item.key for item in block])
        matched += sum(there)
        new = [item for item, known in zip(block, there, strict=True) if not known and item.row]
        known_ids = done_ids.contains([reading.id_hash(str(item.id)) for item in new])
        for item, known in zip(new, known_ids, strict=True):
            if known and item.row is not None:
                raise RowError(
                    f"{item.row.source}: the row {item.id!r} has changed since it was scored; "
                    "score it in a new folder (a row that was an error: --retry-errors)"
                )
    if matched < len(done):
        raise RowError(
            f"{len(done) - matched} finished rows are not in the input any more; give the whole "
            "input under the same names, or choose a new folder"
        )


def error_text(text: str) -> str:
    """A message that any file can hold: of bounded length, no half surrogates."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= LONGEST_ERROR else text[:LONGEST_ERROR] + " ..."

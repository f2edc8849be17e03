"""Input files of a scoring run: what a path, a folder or a pattern stands for.

| what | names |
|---|---|
| JSONL | .jsonl .ndjson .json, one object a line |
| CSV, TSV | .csv .tsv, with a header; every value is text |
| Parquet | .parquet .pq |
| Arrow | .arrow .feather (stream or file format), and folders of datasets' ``save_to_disk`` |

.gz, .zst, .bz2 and .lz4 behind the name of a text file say how it is compressed. A folder stands
for the files in it, a pattern (``data/*.parquet``) for what it matches, both sorted.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tfb.data.rows import RowError

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: Path
    kind: str
    """One of the values of ``KINDS``."""
    codec: str | None = None

    def __str__(self) -> str:
        return str(self.path)


def find_sources(inputs: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """The files behind paths, folders and patterns, in order.

    Raises:
        RowError: nothing there, a name whose format is unknown, or a file that is named twice.
    """
    if not inputs:
        raise RowError("no input files were given; name at least one")
    found: list[Source] = []
    for name in [os.fspath(p) for p in inputs]:
        path = Path(name)
        if path.is_dir():
            found += _in_folder(path)
        elif path.exists():
            found.append(_source(path))
        elif glob.has_magic(name):
            matches = sorted(glob.glob(name, recursive=True))
            if not matches:
                raise RowError(f"{name}: matches no file; check the pattern")
            for match in map(Path, matches):
                found += _in_folder(match) if match.is_dir() else [_source(match)]
        else:
            raise RowError(f"{name}: there is no such file; check the path")
    seen: set[Path] = set()
    for source in found:
        real = source.path.resolve()
        if real in seen:
            raise RowError(f"{source}: is named twice; name every input once")
        seen.add(real)
    return found


def _source(path: Path) -> Source:
    codec = CODECS.get(path.suffix.lower())
    kind = KINDS.get((path.with_suffix("") if codec else path).suffix.lower())
    if kind is None or (codec and kind not in ("jsonl", "csv")):
        raise RowError(
            f"{path}: the format is told by the name, and this one is not known; expected "
            f"{' '.join(KINDS)}, the text formats also with {' '.join(CODECS)}"
        )
    return Source(path, kind, codec)


def _in_folder(folder: Path) -> list[Source]:
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir()))
        raise RowError(f"{folder}: holds several splits; name the folder of one ({splits})")
    state = folder / "state.json"
    if state.is_file():
        return [Source(folder / name, "arrow") for name in _datasets_files(state)]
    known = []
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        inner = path.with_suffix("") if path.suffix.lower() in CODECS else path
        if inner.suffix.lower() in KINDS and not path.name.startswith((".", "_")):
            known.append(_source(path))
    if not known:
        raise RowError(f"{folder}: a folder without input files; name the files")
    return known


def _datasets_files(state: Path) -> list[str]:
    """Names of the Arrow files that ``Dataset.save_to_disk`` left beside its state.json."""
    try:
        saved = json.loads(state.read_text(encoding="utf-8"))
        files = [str(entry["filename"]) for entry in saved["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise RowError(f"{state}: is not the state of a saved dataset; save it again") from error
    if saved.get("_indices_data_files") or saved.get("_indices_files"):
        raise RowError(f"{state}: rows are chosen by an index; flatten_indices() and save again")
    return files

"""Rows out of users' files: JSONL, gzipped JSONL and Parquet, each with the place it came from.

What a file is, is decided by its first bytes and not by its name: ``data.json``, ``data`` or a
Parquet file called ``.jsonl`` are read for what they are.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from align_loop.errors import UserError

_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"
_UNSUPPORTED = {
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstandard", "decompress it or use gzip"),
    b"\xfd7zXZ": ("compressed with xz", "decompress it or use gzip"),
    b"BZh": ("compressed with bzip2", "decompress it or use gzip"),
    b"ARROW1": ("an Arrow file", "save it as Parquet"),
    b"version https://git-lfs": ("a Git LFS pointer and not the data", "run 'git lfs pull'"),
}
_WANTED = "every line must be one JSON object (no list, no object over several lines)"


@dataclass(frozen=True)
class Origin:
    """Where a row came from; ``str`` of it opens every error about that row.

    ``source`` is shown in errors (the path as the user gave it); ``name`` is what the record keeps (no
    directories: a moved folder must not change a table's bytes); ``unit`` is "line" or "row", ``number`` 1-based.
    """

    source: str
    name: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.source}: {self.unit} {self.number}"

    def meta(self) -> str:
        """The origin as the JSON text that goes into a table's ``meta`` column."""
        return json.dumps({"file": self.name, self.unit: self.number}, ensure_ascii=False)


def one_line(text: object) -> str:
    """``text`` with every run of white space as one space, so that an error stays on one line."""
    return " ".join(str(text).split())


def read_file(path: Path | str) -> Iterator[tuple[Origin, dict[str, Any]]]:
    """Yield (origin, row) for every row of a JSONL, gzipped JSONL or Parquet file, in file order.

    Blank lines of JSONL are passed over but counted, so line numbers are an editor's. Raises ``UserError``
    for a missing, unreadable, empty or damaged file, and for a line that is not a JSON object in UTF-8.
    """
    path = Path(path)
    head = _first_bytes(path)
    for magic, (what, remedy) in _UNSUPPORTED.items():
        if head.startswith(magic):
            raise UserError(one_line(f"{path}: this is {what}; {remedy}: JSONL, JSONL.gz and Parquet can be read"))
    rows = _parquet_rows(path) if head.startswith(_PARQUET) else _json_rows(path, head.startswith(_GZIP))
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise UserError(
            one_line(f"{path}: the file has no rows; write one JSON object per line, or leave the file out")
        )


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise UserError(one_line(f"{path}: this is a directory; name a JSONL, JSONL.gz or Parquet file in it"))
    try:
        with open(path, "rb") as handle:
            return handle.read(32)
    except FileNotFoundError:
        raise UserError(one_line(f"{path}: no such file; check the path (it is relative to {Path.cwd()})")) from None
    except OSError as error:
        raise UserError(one_line(f"{path}: cannot be read ({error.strerror}); check its permissions")) from None


def _json_rows(path: Path, gzipped: bool) -> Iterator[tuple[Origin, dict[str, Any]]]:
    with gzip.open(path, "rb") if gzipped else open(path, "rb") as handle:
        for number, line in _numbered_lines(path, handle):
            if line.strip():
                origin = Origin(str(path), path.name, "line", number)
                yield origin, _parse_line(origin, line)


def _numbered_lines(path: Path, handle: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    number = 0
    while True:
        try:
            line = handle.readline()
        except (EOFError, OSError, zlib.error) as error:
            problem = f"the file is damaged or cut off after line {number} ({error})"
            raise UserError(one_line(f"{path}: {problem}; make or download it again")) from None
        if not line:
            return
        number += 1
        yield number, line


def _parse_line(origin: Origin, line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig" if origin.number == 1 else "utf-8")  # some editors write a byte-order mark
        value = json.loads(text)
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 (byte {error.start + 1} of the line)"
        raise UserError(one_line(f"{origin}: {problem}; save the file as UTF-8")) from None
    except (ValueError, RecursionError) as error:
        # The decoder's own text counts lines within this one line, which would mislead.
        why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(one_line(f"{origin}: not valid JSON ({why}); {_WANTED}")) from None
    if not isinstance(value, dict):
        raise UserError(one_line(f"{origin}: a JSON {type(value).__name__} where an object is wanted; {_WANTED}"))
    return value


def _parquet_rows(path: Path) -> Iterator[tuple[Origin, dict[str, Any]]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Origin(str(path), path.name, "row", number), row
    except (pa.ArrowException, OSError, ValueError) as error:
        problem = f"the Parquet file is damaged or cut off after row {number} ({error})"
        raise UserError(one_line(f"{path}: {problem}; make or download it again")) from None

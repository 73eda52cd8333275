"""Files are read for what they contain, and what is wrong with one is said in one line with its place."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align_loop.errors import UserError
from align_loop.prompts.files import Origin, read_file

ROWS = [{"prompt": f"q{n} \u2028 ü", "n": n} for n in range(5)]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def error_of(path) -> str:
    with pytest.raises(UserError) as caught:
        list(read_file(path))
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path)) and ";" in message
    return message


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows", "rows.gz", "rows.parquet"])
@pytest.mark.parametrize("kind", ["plain", "gzip", "parquet"])
def test_content_decides_what_a_file_is(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.write_bytes(gzip.compress(TEXT.encode()) if kind == "gzip" else TEXT.encode())
    read = list(read_file(path))
    assert [row for _, row in read] == ROWS
    unit = "row" if kind == "parquet" else "line"
    assert [origin for origin, _ in read] == [Origin(str(path), name, unit, n) for n in range(1, 6)]


def test_parquet_rows_are_numbered_through_batches(tmp_path):
    path = tmp_path / "big.parquet"
    pq.write_table(pa.table({"n": list(range(3000))}), path, row_group_size=700)
    assert [origin.number for origin, _ in read_file(path)] == list(range(1, 3001))
    assert [row["n"] for _, row in read_file(path)] == list(range(3000))


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}\r\n\r\n   \n{"a": 2}')
    assert [(origin.number, row["a"]) for origin, row in read_file(path)] == [(1, 1), (4, 2)]


def test_meta_keeps_the_name_of_the_file_and_not_its_folder(tmp_path):
    path = tmp_path / "ä.jsonl"
    path.write_text('{"a": 1}\n')
    origin = next(iter(read_file(path)))[0]
    assert json.loads(origin.meta()) == {"file": "ä.jsonl", "line": 1}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": 1} {"a": 2}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": "caf\xe9"}', "not UTF-8 (byte 11 of the line)"),
        (b'["a"]', "a JSON list"),
        (b"null", "a JSON NoneType"),
        (b'"text"', "a JSON str"),
    ],
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_broken_line_is_reported_with_file_and_line(tmp_path, line, said, compress):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(compress(b'{"a": 1}\n' * 36 + line + b'\n{"a": 1}\n'))
    message = error_of(path)
    assert message.startswith(f"{path}: line 37: ") and said in message


def test_a_cut_off_gzip_file_says_how_far_it_went(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    packed = gzip.compress(TEXT.encode())
    path.write_bytes(packed[:-12])
    assert "damaged or cut off after line" in error_of(path)
    path.write_bytes(packed[:10] + b"\xff" * 40)
    assert "damaged or cut off after line 0" in error_of(path)


def test_a_damaged_parquet_file_is_a_user_error(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS * 200), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "damaged or cut off" in error_of(path)
    middle = len(whole) // 4
    path.write_bytes(whole[:4] + b"\xff" * middle + whole[4 + middle :])
    assert "damaged or cut off" in error_of(path)


def test_files_that_are_not_there_or_not_data(tmp_path):
    assert "no such file" in error_of(tmp_path / "none.jsonl")
    assert "directory" in error_of(tmp_path)
    path = tmp_path / "file"
    for content, said in [
        (b"", "no rows"),
        (b"\n \n\n", "no rows"),
        (gzip.compress(b""), "no rows"),
        (b"PK\x03\x04rest", "zip"),
        (b"\x28\xb5\x2f\xfdrest", "zstandard"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ('{"a": 1}\n'.encode("utf-16"), "not UTF-8"),
    ]:
        path.write_bytes(content)
        assert said in error_of(path)
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), path)
    assert "no rows" in error_of(path)

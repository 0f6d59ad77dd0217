import gzip
import io
import json
import os
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import moto
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradcam_worker.artifacts.dataset import failed_lines
from gradcam_worker.backfill.inputs.open import open_input
from gradcam_worker.backfill.inputs.options import InputOptions
from gradcam_worker.backfill.inputs.rows import MAX_URI, Ids, RowParser
from gradcam_worker.backfill.inputs.tables import MAX_LINE_BYTES, JsonReader
from gradcam_worker.backfill.plan import Plan
from gradcam_worker.backfill.sharding import cut_shards
from gradcam_worker.errors import InvalidInput
from gradcam_worker.images.fetch import UriFetcher
from gradcam_worker.operations import servers
from gradcam_worker.schemas.job import ImageRef
from gradcam_worker.schemas.shard import Row
from gradcam_worker.schemas.work import parse
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import NO_DEADLINE, S3

A, B, C = "s3://photos/a.jpg", "https://example.com/b.jpg?size=1", "file:///photos/c%20d.jpg"
SHA = "ab" * 32
INVENTORY = InputOptions(form="inventory")
PLAN = Plan.model_validate({"input": "x", "output": "s3://r/x", "network": "vgg16", "target": {"top_n": 1}})

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file, and return its path."""

    def file(name: str, content: bytes | str) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return file


def read(where: str, settings: Settings | None = None, **how: Any) -> list[Row]:
    with open_input(where, settings or Settings(), InputOptions(**how)) as found:
        return list(found.rows())


def uris(where: str, settings: Settings | None = None, **how: Any) -> list[str]:
    found = read(where, settings, **how)
    assert not [row.problem for row in found if row.problem]
    return [row.uri for row in found]


def why(row: Row) -> str:
    assert row.problem
    assert row.problem.code == "invalid_row"
    assert row.problem.stage == "plan"
    assert not row.problem.retryable
    return row.problem.detail


def refused(where: str, settings: Settings | None = None, **how: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        read(where, settings, **how)
    return str(caught.value)


class TestJsonLines:
    def test_a_line_is_a_uri_or_an_object_with_one(self, write: Write) -> None:
        lines = [
            f'"{A}"',
            json.dumps({"image": A, "id": "one", "sha256": SHA}),
            json.dumps({"image": {"uri": B, "sha256": SHA.upper()}, "id": 7}),
            json.dumps({"uri": C, "custom_id": "c-7"}),
            json.dumps({"url": "data:image/png;base64,AA=="}),
            json.dumps({"image": None, "path": "S3://photos/\u00fc?#.jpg", "id": ""}),
        ]
        assert read(write("a.jsonl", "\n".join(lines))) == [
            Row(uri=A),
            Row(uri=A, id="one", sha256=SHA),
            Row(uri=B, id="7", sha256=SHA),
            Row(uri=C, id="c-7"),
            Row(uri="data:image/png;base64,AA=="),
            Row(uri="S3://photos/\u00fc?#.jpg"),
        ]

    def test_the_field_can_be_named(self, write: Write) -> None:
        path = write("a.ndjson", json.dumps({"image": A, "thumbnail": B}))
        assert uris(path, column="thumbnail") == [B]

    @pytest.mark.parametrize(
        ("line", "reason", "received"),
        [
            ('{"image": "s3://b/k"', "Line 2: it cannot be read as JSON", '{"image": "s3://b/k"'),
            (
                '{"a": 1, "b": 2}',
                "it names no image: 'image' or 'uri' or 'url' or 'path'; it has 'a', 'b'",
                '"b"',
            ),
            ('{"image": 5}', "its image is a number", "5"),
            ('{"image": ["s3://b/k"]}', "its image is a list", '["s3://b/k"]'),
            ('{"image": {"key": "k"}}', "it names no image", "null"),
            ("[1]", "neither an object nor a URI", "[1]"),
            ("null", "neither an object nor a URI", "null"),
            ("NaN", "NaN", "NaN"),
            ("[" * 100_000, "nested deeper", "[[["),
            ('{"image": "s3://b/k", "image": "s3://b/l"}', "names a field twice", "s3://b/l"),
            ('{"image": ""}', "it names no image", ""),
            (
                '{"image": "photos/a.jpg"}',
                "'photos/a.jpg' is no URI: a path is written as file:///",
                "photos/a.jpg",
            ),
            ('{"image": "/photos/a:b.jpg"}', "is no URI", "/photos/a:b.jpg"),
            (
                '{"image": "ftp://me:pw@host/a"}',
                "its scheme 'ftp' is none of s3, https, http, file, data",
                "ftp:",
            ),
            ('{"image": "s3://bucket"}', "must look like s3://bucket/key", "s3://bucket"),
            ('{"image": "s3:///key"}', "must look like s3://bucket/key", "s3:///key"),
            ('{"image": "https:///a"}', "must look like https://host/path", "https:///a"),
            ('{"image": "data:"}', "must look like data:", "data:"),
            ('{"image": "s3://b/k\\u0000"}', "control character '\\x00'", "s3://b/k\\x00"),
            ('{"image": "s3://b/k\\n"}', "control character '\\n'", "s3://b/k\\n"),
            ('{"image": "s3://b/\\ud800"}', "half of a surrogate pair", "s3://b/\\ud800"),
            ('{"image": "s3://b/k", "sha256": "ab"}', "its sha256 is 'ab': it must be 64", "s3://b/k"),
            ('{"image": "s3://b/k", "sha256": 5}', "its sha256 is a number", "s3://b/k"),
            ('{"image": "s3://b/k", "id": [1]}', "its id is a list", "s3://b/k"),
            ('{"image": "s3://b/k", "id": true}', "its id is true or false", "s3://b/k"),
            ('{"image": "s3://b/k", "id": "a\\nb"}', "its id is 'a\\nb'", "s3://b/k"),
            (json.dumps({"image": A, "id": "x" * 257}), "at most 256", A),
            (json.dumps({"image": "s3://b/" + "k" * MAX_URI}), f"at most {MAX_URI:,}", "s3://b/kkk"),
            (
                json.dumps({"image": "s3://b/" + "k" * 1025}),
                "its S3 key has 1,025 bytes; at most 1,024",
                "s3://b/k",
            ),
            (json.dumps({"image": "https://b/" + "k" * 9000}), "its URI has 9,010 bytes", "https://b/k"),
            (
                json.dumps({"image": {"uri": A, "sha256": SHA}, "sha256": "cd" * 32}),
                "names two checksums",
                A,
            ),
        ],
        ids=[
            *(
                "half",
                "no-image",
                "number",
                "list",
                "no-uri",
                "array",
                "null",
                "nan",
                "deep",
                "twice",
                "empty",
            ),
            *("path", "absolute", "scheme", "no-key", "no-bucket", "no-host", "no-data", "nul", "newline"),
            *("half-character", "sha256", "sha256-type", "id-type", "id-bool", "id-newline", "id-long"),
            *("long", "long-key", "long-url", "two-checksums"),
        ],
    )
    def test_a_bad_line_is_a_bad_row_with_what_was_received_and_the_others_go_on(
        self, write: Write, line: str, reason: str, received: str
    ) -> None:
        first, bad, last = read(write("a.jsonl", f'"{A}"\n{line}\n"{B}"\n'))
        assert (first, last) == (Row(uri=A), Row(uri=B))
        assert reason in why(bad)
        assert why(bad).startswith("Line 2: ")
        assert received in bad.uri
        assert len(bad.uri) <= 1000

    def test_no_password_of_a_bad_uri_is_told(self, write: Write) -> None:
        (bad,) = read(write("a.jsonl", '"ftp://me:secret@host/a?key=secret"'))
        assert "secret" not in why(bad)

    def test_a_line_without_end_is_a_bad_row_and_is_never_held_whole(self, write: Write) -> None:
        class Watched(io.BytesIO):
            most = 0

            def readline(self, size: int | None = -1, /) -> bytes:
                line = super().readline(size)
                Watched.most = max(Watched.most, len(line))
                return line

        long = b'{"image": "' + b"x" * (3 * MAX_LINE_BYTES)
        text = b'"%b"\n%b\n"%b"\n%b' % (A.encode(), long, B.encode(), long)
        first, bad, other, last = JsonReader(InputOptions()).rows(Watched(text), RowParser(), {})
        assert (first.uri, other.uri) == (A, B)
        assert why(bad) == f"Line 2: it is longer than {MAX_LINE_BYTES:,} bytes."
        assert why(last).startswith("Line 4: ")
        assert bad.uri.startswith('{"image": "xxx')
        assert Watched.most == MAX_LINE_BYTES + 1

    def test_the_failed_rows_of_a_backfill_are_an_input(self, write: Write) -> None:
        before = read(write("a.jsonl", f'"no uri"\n{{"image": "{A}", "id": "7", "sha256": "{SHA}"}}\n'))
        problem = before[0].problem
        assert problem
        (shard,) = cut_shards(before, PLAN)
        again = read(write("failed.jsonl", failed_lines(shard, [problem, problem])))
        assert again[1] == before[1]
        assert again[0].uri == '"no uri"'.strip('"')
        assert "no URI" in why(again[0])


class TestEncodings:
    def test_a_byte_order_mark_is_no_part_of_the_first_row_or_column(self, write: Write) -> None:
        mark = b"\xef\xbb\xbf"
        assert uris(write("a.jsonl", mark + f'"{A}"\n'.encode())) == [A]
        assert uris(write("a.csv", mark + f"image\n{A}\n".encode())) == [A]
        assert uris(write("a.txt", mark + f"\n{A}\n".encode())) == [A]

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
    @pytest.mark.parametrize("form", ["jsonl", "csv", "text", "inventory"])
    def test_utf_16_is_named(self, write: Write, encoding: str, form: str) -> None:
        path = write("a.jsonl", f'"{A}"\n'.encode(encoding))
        assert f"{path} is UTF-16" in refused(path, form=form)

    def test_what_is_no_text_at_all_is_named(self, write: Write) -> None:
        table = io.BytesIO()
        pq.write_table(pa.table({"image": [A]}), table)
        assert "is Parquet, not text" in refused(write("a.csv", table.getvalue()))
        assert "is a zip file, not text" in refused(write("a.jsonl", b"PK\x03\x04..."))

    def test_lines_that_are_not_utf_8_are_bad_rows_with_their_numbers(self, write: Write) -> None:
        strange = "s3://photos/\u00fc.jpg".encode("latin-1")
        found = read(write("a.jsonl", b'"%b"\n"%b"\n\n"%b"\n' % (A.encode(), strange, B.encode())))
        assert [row.uri for row in found] == [A, '"s3://photos/\\xfc.jpg"', B]
        assert why(found[1]) == "Line 2: it is not UTF-8."
        found = read(write("a.txt", b"%b\n%b\n%b" % (A.encode(), strange, B.encode())))
        assert [row.uri for row in found] == [A, "s3://photos/\\xfc.jpg", B]
        assert why(found[1]) == "Line 2: it is not UTF-8."
        found = read(
            write("a.csv", b"image,title\n%b,1\n%b,2\n%b,\xfc\n" % (A.encode(), strange, B.encode()))
        )
        assert [row.uri for row in found] == [A, "s3://photos/\\udcfc.jpg", B]
        assert [row.carried for row in found] == [("1",), ("2",), None]
        assert why(found[1]) == "Line 3: its URI is not UTF-8."

    @pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl"])
    def test_gzip_is_read_whatever_its_name(self, write: Write, name: str) -> None:
        assert uris(write(name, gzip.compress(f'"{A}"\n"{B}"\n'.encode()))) == [A, B]

    @pytest.mark.parametrize("damage", ["cut", "changed"])
    def test_gzip_that_is_damaged_further_on_ends_the_rows_there(self, write: Write, damage: str) -> None:
        lines = "".join(f'"s3://photos/{os.urandom(20).hex()}"\n' for _ in range(20_000)).encode()
        packed = bytearray(gzip.compress(lines))
        if damage == "cut":
            del packed[len(packed) // 2 :]
        else:
            packed[len(packed) // 2 : len(packed) // 2 + 64] = bytes(64)
        seen = []
        path = write("a.jsonl.gz", bytes(packed))
        with open_input(path, Settings()) as found, pytest.raises(InvalidInput) as caught:  # noqa: PT012
            for row in found.rows():
                seen.append(row)  # noqa: PERF402  # until it is raised
        assert len(seen) > 1000  # what is damaged may still look like lines, up to the checksum
        assert str(caught.value).startswith(
            f"{path} is damaged, or cannot be read further, after {len(seen):,} rows"
        )


class TestTables:
    def test_columns_are_found_by_their_names_in_any_case(self, write: Write) -> None:
        text = f'Title, SHA256 ,ID,URL\n"a, ""b""\nc",{SHA},7,{A}\n\n,,,"{B}"\r\n'
        assert read(write("a.csv", text)) == [
            Row(uri=A, id="7", sha256=SHA, carried=('a, "b"\nc',)),
            Row(uri=B),
        ]
        assert read(write("a.tsv", f"id\tPath\n1,2\t{A}\n")) == [Row(uri=A, id="1,2")]
        assert uris(write("a.csv.gz", gzip.compress(f"url,image\n{B},{A}\n".encode()))) == [A]

    def test_a_column_can_be_named(self, write: Write) -> None:
        path = write("a.csv", f"image,Thumbnail\n{A},{B}\n")
        assert uris(path, column="thumbnail") == [B]
        message = refused(path, column="preview")
        assert "has the columns 'image', 'Thumbnail', none of which is 'preview'" in message

    def test_a_missing_column_is_told_with_those_that_are_there_and_the_ways_out(self, write: Write) -> None:
        path = write("a.csv", f"bucket-1,{'k' * 100}.jpg\nb,k\n")
        message = refused(path)
        assert message.startswith(f"{path} has the columns 'bucket-1', 'kkk")
        assert "--column" in message
        assert "--format inventory" in message
        many = refused(write("a.csv", ",".join(f"c{place}" for place in range(500)) + "\n"))
        assert "'c19' and 480 more" in many

    def test_a_column_that_is_there_twice_is_told(self, write: Write, tmp_path: Path) -> None:
        message = "has more than one column 'image'"
        assert message in refused(write("a.csv", f"image,Image\n{A},{B}\n"))
        table = pa.Table.from_arrays([pa.array([A]), pa.array([B])], names=["image", "image"])
        pq.write_table(table, tmp_path / "a.parquet")
        assert message in refused(str(tmp_path / "a.parquet"))

    @pytest.mark.parametrize(
        ("line", "reason", "received"),
        [
            ("1", "it has 1 fields, and the header 3", "1"),
            (f"1,{A}", "it has 2 fields, and the header 3", A),
            (f"1,{A},{SHA},5", "it has 4 fields, and the header 3", f"1,{A},{SHA},5"),
            ("1,s3://b/x,y.jpg,", "a URI with ',' in it must stand in quotes", "s3://b/x,y.jpg"),
            ("1,,", "it names no image", ""),
            (",,", "it names no image", ""),
            (f"1,{A},zz", "its sha256 is 'zz'", A),
            (f'1,"{A}"x,', "it cannot be read as CSV", f'1,"{A}"x,'),
            ('1,"s3://b/k\nl",', "control character '\\n'", "s3://b/k\\nl"),
            (f"1,{A}\0,", "control character '\\x00'", "\\x00"),
            ("x" * (MAX_LINE_BYTES + 1), "longer than", "xxx"),
        ],
        ids=[
            "one",
            "fewer",
            "more",
            "comma",
            "no-image",
            "empty",
            "sha256",
            "quote",
            "newline",
            "nul",
            "long",
        ],
    )
    def test_a_bad_line_is_a_bad_row_and_the_others_go_on(
        self, write: Write, line: str, reason: str, received: str
    ) -> None:
        first, bad, last = read(write("a.csv", f"id,image,sha256\n,{A},\n{line}\n,{B},\n"))
        assert (first, last) == (Row(uri=A), Row(uri=B))
        assert why(bad).startswith("Line 3: ")
        assert reason in why(bad)
        assert received in bad.uri

    def test_a_quote_that_is_not_closed_ends_the_rows_rather_than_swallow_them(self, write: Write) -> None:
        rest = "".join(f"s3://photos/{place},\n" for place in range(10))
        path = write("a.csv", f'image,title\n{A},1\n{B},"open\n{rest}')
        assert "cannot be told into rows from line 3 on" in refused(path)
        endless = "".join(f"s3://photos/{'k' * 1000},\n" for place in range(3 * MAX_LINE_BYTES // 1000))
        assert "from line 3 on" in refused(write("b.csv", f'image,title\n{A},1\n{B},"open\n{endless}'))

    def test_a_header_that_cannot_be_read_is_told(self, write: Write) -> None:
        assert "has a header that cannot be read" in refused(write("a.csv", '"image"x,id\na,b\n'))


class TestInventories:
    def test_keys_are_decoded_as_s3_encodes_them(self, write: Write) -> None:
        text = '"photos","a+b%2Bc%20%3F%23/%C3%BC.jpg","123","2026-01-01"\nphotos,plain.jpg\n\n'
        assert uris(write("a.csv", text), form="inventory") == [
            "s3://photos/a b+c ?#/\u00fc.jpg",
            "s3://photos/plain.jpg",
        ]

    def test_what_is_no_bucket_and_key_is_a_bad_row(self, write: Write) -> None:
        text = f"photos\n,key\nphotos,\n{A},x\nphotos,%FF\nphotos,%00\nphotos,a\n"
        *bad, good = read(write("a", text), form="inventory")
        assert good == Row(uri="s3://photos/a")
        assert [row.uri for row in bad[:4]] == ["photos", ",key", "photos,", f"{A},x"]
        assert {why(row).partition(": ")[2] for row in bad[:4]} == {
            "it must begin with a bucket, a comma and a key."
        }
        assert why(bad[4]) == "Line 5: its URI is not UTF-8."
        assert "control character" in why(bad[5])


class TestParquet:
    @staticmethod
    def table(tmp_path: Path, columns: dict[str, Any], **how: Any) -> str:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table(columns), path, **how)
        return str(path)

    def test_columns_are_found_as_in_csv(self, tmp_path: Path) -> None:
        large = pa.array([A, B, None], pa.large_string())
        path = self.table(
            tmp_path, {"x": [1.5, 2.5, 3.5], "URI": large, "ID": [7, None, 9], "sha256": [None, SHA, None]}
        )
        first, second, bad = read(path)
        assert first == Row(uri=A, id="7", carried=(1.5,))
        assert second == Row(uri=B, sha256=SHA, carried=(2.5,))
        assert why(bad) == "Row 2: it names no image."
        assert bad.id == "9"

    def test_values_kept_in_a_dictionary_are_read(self, tmp_path: Path) -> None:
        path = self.table(tmp_path, {"uri": pa.array([A, B, A]).dictionary_encode()})
        assert uris(path) == [A, B, A]

    def test_many_batches_keep_their_order(self, tmp_path: Path) -> None:
        given = [f"s3://photos/{place}" for place in range(20_000)]
        assert uris(self.table(tmp_path, {"image": given}, row_group_size=7000)) == given

    def test_strings_that_are_not_utf_8_are_bad_rows(self, tmp_path: Path) -> None:
        raw = pa.array([A.encode(), b"s3://photos/\xfc", None], pa.binary()).view(pa.string())
        first, bad, empty = read(self.table(tmp_path, {"image": raw}))
        assert first == Row(uri=A)
        assert why(bad) == "Row 1: its URI is not UTF-8."
        assert why(empty) == "Row 2: it names no image."

    def test_a_missing_column_and_one_of_another_type_are_told(self, tmp_path: Path) -> None:
        path = self.table(tmp_path, {"key": [A], "n": [5]})
        assert refused(path).startswith(f"{path} has the columns 'key', 'n', none of which is 'image'")
        assert "--format inventory" not in refused(path)
        assert uris(path, column="key") == [A]
        assert f"{path} has a column 'n' of int64: it must hold URIs" in refused(path, column="n")

    @pytest.mark.parametrize("damage", ["cut", "empty", "text"])
    def test_what_is_no_parquet_is_told_before_anything_is_read(self, tmp_path: Path, damage: str) -> None:
        path = Path(self.table(tmp_path, {"image": [A] * 100}))
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[:-20], "empty": b"", "text": b"image\n"}[damage])
        with (
            pytest.raises(InvalidInput, match="cannot be read as Parquet"),
            open_input(str(path), Settings()),
        ):
            pass

    def test_damage_further_on_ends_the_rows_there(self, tmp_path: Path) -> None:
        given = [f"s3://photos/{os.urandom(8).hex()}" for _ in range(30_000)]
        path = Path(self.table(tmp_path, {"image": given}, row_group_size=10_000, compression="zstd"))
        place = pq.ParquetFile(path).metadata.row_group(2).column(0).dictionary_page_offset
        whole = bytearray(path.read_bytes())
        whole[place : place + 50_000] = bytes(50_000)
        path.write_bytes(whole)
        found = []
        with open_input(str(path), Settings()) as opened, pytest.raises(InvalidInput) as caught:  # noqa: PT012
            for row in opened.rows():
                found.append(row.uri)  # noqa: PERF401  # until it is raised
        assert found
        assert found == given[: len(found)]
        assert f"after {len(found):,} rows" in str(caught.value)


class TestFolders:
    def test_every_file_but_hidden_ones_is_a_row_in_the_order_of_names(self, tmp_path: Path) -> None:
        for name in ("b.jpg", "a/2 \u00fc%.jpg", "a/1?#.txt", "c/d/e", ".hidden", ".git/x", "a/.y"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"123")
        (tmp_path / "empty").mkdir()
        found = read(str(tmp_path))
        names = ["a/1%3F%23.txt", "a/2%20%C3%BC%25.jpg", "b.jpg", "c/d/e"]
        assert [row.uri for row in found] == [f"file://{tmp_path}/{name}" for name in names]
        assert found[2].version == f"3-{(tmp_path / 'b.jpg').stat().st_mtime_ns}"
        assert [row.problem for row in found] == [None] * 4

    def test_names_that_are_no_text_lead_to_their_files(self, tmp_path: Path) -> None:
        for name in (b"\xff.jpg", b"new\nline"):
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"seen")
        settings = Settings(image_schemes=("file",), image_roots=(str(tmp_path),))
        images = UriFetcher(settings, S3(settings))
        found = uris(str(tmp_path))
        assert len(found) == 2
        assert [images.fetch(ImageRef(uri=uri), NO_DEADLINE).data for uri in found] == [b"seen"] * 2

    def test_a_relative_folder_gives_whole_paths(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a").write_bytes(b"")
        monkeypatch.chdir(tmp_path)
        assert uris(".") == [f"file://{tmp_path}/a"]

    def test_links_to_files_are_followed_and_what_is_no_file_is_a_bad_row(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"1")
        (tmp_path / "b").symlink_to("a")
        (tmp_path / "c").symlink_to("nowhere")
        (tmp_path / "d").symlink_to(".")
        (tmp_path / "f").symlink_to("f")
        os.mkfifo(tmp_path / "e")
        found = read(str(tmp_path))
        assert [row.uri[-1] for row in found] == ["a", "b", "c", "d", "e", "f"]
        assert [bool(row.problem) for row in found] == [False, False, True, True, True, True]
        assert "Too many levels of symbolic links" in why(found[5])
        assert why(found[2]) == "Row 2: it cannot be read: No such file or directory."
        assert "link to a folder is not followed" in why(found[3])

    def test_a_file_that_changes_has_another_version(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"1")
        before = read(str(tmp_path))
        (tmp_path / "a").write_bytes(b"22")
        assert read(str(tmp_path))[0].version != before[0].version


@pytest.fixture(scope="module")
def bucket(s3_server: servers.S3Server) -> Iterator[Settings]:
    settings = Settings.model_validate(
        {
            "s3_endpoint_url": s3_server.url,
            "s3_access_key_id": s3_server.access_key_id,
            "s3_secret_access_key": s3_server.secret_access_key,
        }
    )
    s3 = S3(settings)
    table = io.BytesIO()
    pq.write_table(pa.table({"image": [A, B]}), table)
    objects = {
        "plan/in/b.jpg": b"b",
        "plan/in/a ?#%20+\u00fc.jpg": b"a",
        "plan/lists/a.jsonl": f'"{A}"\n'.encode(),
        "plan/lists/a.csv.gz": gzip.compress(f"uri\n{B}\n".encode()),
        "plan/lists/a.parquet": table.getvalue(),
    }
    for key, data in objects.items():
        s3.put("photos", key, data, "image/jpeg")
    yield settings
    for key in objects:
        s3.remove("photos", key)


class TestS3:
    def test_every_object_below_a_prefix_is_a_row_and_can_be_fetched(self, bucket: Settings) -> None:
        found = read("s3://photos/plan/in/", bucket)
        assert [row.uri for row in found] == [
            "s3://photos/plan/in/a ?#%20+\u00fc.jpg",
            "s3://photos/plan/in/b.jpg",
        ]
        assert len({row.version for row in found} - {None}) == 2
        images = UriFetcher(bucket, S3(bucket))
        assert [images.fetch(ImageRef(uri=row.uri), NO_DEADLINE).data for row in found] == [b"a", b"b"]

    def test_what_only_stands_for_a_folder_is_no_row_and_a_key_may_hold_anything(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        keys = {"in/": b"", "in/a\nb": b"1", "in/c/": b"1", "in/d?": b"", "other": b"1"}
        with moto.mock_aws():
            settings = Settings.model_validate(
                {"s3_access_key_id": "testing", "s3_secret_access_key": "testing"}
            )
            client = S3(settings).client
            client.create_bucket(Bucket="odd")
            for key, data in keys.items():
                client.put_object(Bucket="odd", Key=key, Body=data)
            assert uris("s3://odd/in/", settings) == ["s3://odd/in/a\nb", "s3://odd/in/c/", "s3://odd/in/d?"]

    def test_lists_are_read_from_there(self, bucket: Settings) -> None:
        assert uris("s3://photos/plan/lists/a.jsonl", bucket) == [A]
        assert uris("s3://photos/plan/lists/a.csv.gz", bucket) == [B]
        assert uris("s3://photos/plan/lists/a.parquet", bucket) == [A, B]

    def test_a_prefix_that_ends_like_a_list_can_be_listed_all_the_same(self, bucket: Settings) -> None:
        where = "s3://photos/plan/lists/a.jsonl"
        assert uris(where, bucket, form="folder") == [where]

    @pytest.mark.parametrize(
        ("where", "message"),
        [
            ("s3://photos/plan/nothing/", "s3://photos/plan/nothing/ is empty"),
            ("s3://photos/plan/none.jsonl", "There is no such object: s3://photos/plan/none.jsonl"),
            ("s3://no-such-bucket/", "s3://no-such-bucket/ cannot be listed: HTTP 404"),
            ("s3://No_Bucket!/x", "s3://No_Bucket!/x cannot be listed: "),
            ("s3://", "names no bucket: write s3://bucket/prefix"),
        ],
        ids=["empty", "no-list", "no-bucket", "bad-bucket", "nothing"],
    )
    def test_what_is_not_there_is_told(self, bucket: Settings, where: str, message: str) -> None:
        assert message in refused(where, bucket)

    @pytest.mark.parametrize(
        ("listing", "message"),
        [
            ("<IsTruncated>true</IsTruncated>", "sends no NextContinuationToken to ask for them"),
            ("<Contents><Key>a/b.jpg</Key></Contents>", "it has no Size of 'a/b.jpg'"),
        ],
    )
    def test_a_listing_that_is_no_whole_one_is_told(
        self, listing: str, message: str, http_server: Any, answer: Any
    ) -> None:
        page = answer(200, f"<ListBucketResult>{listing}</ListBucketResult>".encode())
        for prefix in ("a%2F", "a"):
            http_server.url(f"/photos?list-type=2&prefix={prefix}&encoding-type=url", page)
        keys = {"s3_access_key_id": "testing", "s3_secret_access_key": "testing"}
        settings = Settings.model_validate({"s3_endpoint_url": f"http://{http_server.host}", **keys})
        said = refused("s3://photos/a/", settings)
        assert message in said
        assert "KeyError" not in said


class TestListsThatLookLikePrefixes:
    """What lies on S3 under a name that says nothing is an object, or the beginning of many names."""

    @pytest.fixture
    def odd(self, bucket: Settings) -> Iterator[Settings]:
        s3, names = (
            S3(bucket),
            ("a.json", "b.zip", "c.avro", "none", "d.jpg", "part/1", "e"),
        )
        for name in names:
            s3.put("photos", f"odd/{name}", f'"{A}"\n'.encode(), "text/plain")
        yield bucket
        for name in names:
            s3.remove("photos", f"odd/{name}")

    def test_an_object_whose_name_does_not_say_what_it_is_is_refused_with_what_to_say(
        self, odd: Settings
    ) -> None:
        for name, hint in {
            "a.json": "JSON is read a line at a time",
            "b.zip": "it looks like an archive: unpack it",
            "c.avro": "Avro is not read: write it as Parquet, or as JSON Lines",
            "none": "say with --format what it is",
        }.items():
            said = refused(f"s3://photos/odd/{name}", odd)
            assert f"s3://photos/odd/{name} is an object, and its name does not say" in said
            assert hint in said
        assert uris("s3://photos/odd/none", odd, form="jsonl") == [A]
        assert uris("s3://photos/odd/none", odd, form="folder") == ["s3://photos/odd/none"]

    def test_an_image_and_the_beginning_of_names_are_prefixes(self, odd: Settings) -> None:
        assert uris("s3://photos/odd/d.jpg", odd) == ["s3://photos/odd/d.jpg"]
        assert uris("s3://photos/odd/pa", odd) == ["s3://photos/odd/part/1"]

    def test_it_is_refused_before_anything_is_read_or_written(self, odd: Settings) -> None:
        for where in ("s3://photos/odd/none", "s3://photos/odd/nothing-begins-so", "s3://no-such-bucket/"):
            with pytest.raises(InvalidInput), open_input(where, odd):
                pass


class TestListsOnS3:
    """What names further files on S3, or is many files there."""

    @pytest.fixture
    def named(self, bucket: Settings) -> Iterator[Settings]:
        manifest = {
            "fileFormat": "CSV",
            "fileSchema": "Bucket, Key, Size",
            "destinationBucket": "arn:aws:s3:::photos",
            "files": [{"key": f"named/inv/data/{number}.csv.gz"} for number in range(2)],
        }
        coco = {
            "images": [{"id": 1, "file_name": "a.jpg"}],
            "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}],
        }
        objects = {
            "named/inv/now/manifest.json": json.dumps(manifest).encode(),
            "named/inv/data/0.csv.gz": gzip.compress(b"photos,a.jpg,1\n"),
            "named/inv/data/1.csv.gz": gzip.compress(b"photos,b.jpg,2\n"),
            "named/table/_SUCCESS": b"",
            "named/table/day=1/part-0.csv": f"image\n{A}\n".encode(),
            "named/table/day=2/part-0.csv": f"image\n{B}\n".encode(),
            "named/instances.json": json.dumps(coco).encode(),
        }
        for key, data in objects.items():
            S3(bucket).put("photos", key, data, "text/plain")
        yield bucket
        for key in objects:
            S3(bucket).remove("photos", key)

    def test_an_inventory_and_a_table_in_many_files(self, named: Settings) -> None:
        found = read("s3://photos/named/inv/now/manifest.json", named)
        assert [(row.uri, row.carried) for row in found] == [
            ("s3://photos/a.jpg", ("1",)),
            ("s3://photos/b.jpg", ("2",)),
        ]
        found = read("s3://photos/named/table/", named, boxes="s3://photos/named/instances.json")
        assert [(row.uri, row.carried, bool(row.annotations)) for row in found] == [
            (A, ("1",), True),
            (B, ("2",), False),
        ]

    def test_files_that_may_not_be_read_are_refused_however_they_are_named(self, named: Settings) -> None:
        def may_read(uri: str) -> bool:
            return uri.startswith("s3://photos/named/inv/now/")

        for where, options in (
            ("s3://photos/named/inv/now/manifest.json", InputOptions()),
            ("s3://photos/plan/lists/a.jsonl", InputOptions(boxes="s3://photos/named/instances.json")),
            ("s3://photos/plan/lists/a.jsonl", InputOptions(label_map="s3://photos/named/instances.json")),
        ):
            with (
                pytest.raises(InvalidInput, match="may not be read by this tenant"),
                open_input(where, named, options, may_read=may_read),
            ):
                pass

    def test_a_tenants_coco_file_is_of_limited_size(self, named: Settings, tmp_path: Path) -> None:
        large = tmp_path / "instances.json"
        large.write_text('{"images": [], "annotations": []}' + " " * 2**26)
        options = InputOptions(boxes=str(large))
        where = "s3://photos/plan/lists/a.jsonl"
        with open_input(where, named, options) as opened:
            assert opened.annotated
        with (
            pytest.raises(InvalidInput, match="name the boxes in a column"),
            open_input(where, named, options, may_read=lambda _: True),
        ):
            pass


OWN = (
    "backfill.json",
    "dataset.json",
    "network.json",
    "failed.jsonl",
    "failed-2.jsonl",
    "data/00000000-0123456789abcdef.parquet",
    "failed/00000000-0123456789abcdef.jsonl",
    "overlays/01234567-89ab-5def-8123-456789abcdef/overlay-1-282-tabby.jpg",
)
LATER = ("gallery.html", "audit/index.html", "audit/image-links.parquet", "data/compact-1.parquet")
OTHERS = ("a.jpg", "audit/mine.jpg", "failed.jpg", "overlays/c.jpg", "z.json")


class TestOutputsBelow:
    @pytest.fixture
    def written(self, bucket: Settings) -> Iterator[Settings]:
        s3 = S3(bucket)
        names = (*OWN, *LATER, *OTHERS)
        keys = [f"mixed/{folder}{name}" for name in names for folder in ("", "out/", "another/")]
        for key in keys:
            s3.put("photos", key, b"1", "text/plain")
        yield bucket
        for key in keys:
            s3.remove("photos", key)

    @pytest.mark.parametrize(
        ("where", "output"),
        [
            ("mixed/", "mixed/out"),
            ("mixed", "mixed/out"),
            ("mix", "mixed/out"),
            ("mixed/", "mixed"),
            ("mixed/out/", "mixed/out"),
            ("mixed/out/", "mixed"),
            ("mixed/", "elsewhere"),
        ],
    )
    def test_nothing_that_a_backfill_has_left_is_a_row_nor_anything_below_its_own_output(
        self, written: Settings, where: str, output: str
    ) -> None:
        with open_input(f"s3://photos/{where}", written, output=f"s3://photos/{output}") as opened:
            found = {row.uri.removeprefix("s3://photos/mixed/") for row in opened.rows()}
        folders = ("out/",) if where == "mixed/out/" else ("", "out/", "another/")
        below = "out/" if where.rstrip("/") != output == "mixed/out" else None
        assert found == {f"{folder}{name}" for name in OTHERS for folder in folders if folder != below}
        skipped = (len(OWN) + len(LATER)) * len(folders) + (len(OTHERS) if below else 0)
        assert opened.notes() == [
            f"Skipped {skipped} files of the input that a backfill wrote, or below the output."
        ]

    def test_what_anybody_puts_into_the_output_is_no_row_either(self, tmp_path: Path) -> None:
        for name in ("a.jpg", "out/notes/mine.jpg", "out.jpg", "out/backfill.json"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"1")
        with open_input(str(tmp_path), Settings(), output=f"file://{tmp_path}/out/") as opened:
            assert [row.uri.rpartition("/")[2] for row in opened.rows()] == ["a.jpg", "out.jpg"]

    def test_an_inventory_of_its_bucket_does_not_bring_them(self, write: Write) -> None:
        names = ("a.jpg", "out/backfill.json", "out/data/x", "outer/b.jpg")
        where = write("a.csv", "".join(f"photos,{name}\n" for name in names) + "other,out/c.jpg\n")
        with open_input(where, Settings(), INVENTORY, output="s3://photos/out") as opened:
            found = [row.uri for row in opened.rows()]
        assert found == ["s3://photos/a.jpg", "s3://photos/outer/b.jpg", "s3://other/out/c.jpg"]

    def test_without_a_plan_nobody_knows_that_it_is_an_output_but_whoever_writes_there(
        self, bucket: Settings
    ) -> None:
        s3, key = S3(bucket), f"bare/out/{OWN[-1]}"
        s3.put("photos", key, b"1", "text/plain")
        s3.put("photos", "bare/z.jpg", b"1", "text/plain")
        with open_input("s3://photos/bare/", bucket, output="s3://photos/bare/out") as opened:
            assert [row.uri for row in opened.rows()] == ["s3://photos/bare/z.jpg"]
        assert len(uris("s3://photos/bare/", bucket)) == 2
        for one in (key, "bare/z.jpg"):
            s3.remove("photos", one)


class TestOpening:
    @pytest.fixture
    def stdin(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
        """Give bytes to standard input, through a real pipe."""
        opened = []

        def give(data: bytes) -> None:
            out, into = os.pipe()
            os.write(into, data)
            os.close(into)
            opened.append(os.fdopen(out))
            monkeypatch.setattr(sys, "stdin", opened[-1])

        yield give
        for one in opened:
            one.close()

    def test_standard_input_is_json_lines_unless_it_is_said_to_be_something_else(
        self, stdin: Callable[[bytes], None]
    ) -> None:
        stdin(f'"{A}"\n'.encode())
        assert uris("-") == [A]
        stdin(gzip.compress(f"image\n{A}\n".encode()))
        assert uris("-", form="csv") == [A]
        table = io.BytesIO()
        pq.write_table(pa.table({"image": [A]}), table)
        stdin(table.getvalue())
        assert uris("-", form="parquet") == [A]
        stdin(b"")
        assert refused("-") == "Standard input is empty: there is no image in it."
        assert refused("-", form="folder") == "Standard input is no folder."

    def test_blank_lines_are_no_rows_and_a_file_of_them_is_empty(self, write: Write) -> None:
        assert uris(write("a.txt", f"\n  \n{A}  \r\n\n{B}")) == [A, B]
        for name in ("a.txt", "a.jsonl", "a.csv"):
            path = write(name, "\n \n\r\n")
            assert refused(path) == f"{path} is empty: there is no image in it."
        assert "is empty" in refused(write("b.csv", "image,id\n"))
        assert "is empty" in refused(write("b.jsonl", ""))

    def test_an_empty_folder_and_an_empty_table_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / ".hidden").write_bytes(b"")
        assert refused(str(tmp_path)).startswith(f"{tmp_path} is empty: there is no image in it. Skipped 1")
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"image": pa.array([], pa.string())}), path)
        assert refused(str(path)) == f"{path} is empty: there is no image in it."

    def test_the_rows_of_a_file_can_be_had_twice(self, write: Write, tmp_path: Path) -> None:
        pq.write_table(pa.table({"image": [A]}), tmp_path / "b.parquet")
        for path in (write("a.jsonl", f'{{"image": "{A}", "id": "1"}}'), str(tmp_path / "b.parquet")):
            with open_input(path, Settings()) as found:
                assert list(found.rows()) == list(found.rows())

    def test_how_much_of_it_has_been_read_is_told_where_that_is_known(
        self, write: Write, tmp_path: Path, stdin: Callable[[bytes], None]
    ) -> None:
        given = [f"s3://photos/{place:06d}" for place in range(20_000)]
        pq.write_table(pa.table({"image": given}), tmp_path / "b.parquet")
        text = "\n".join(given)
        for path in (
            write("a.txt", text),
            write("a.txt.gz", gzip.compress(text.encode())),
            str(tmp_path / "b.parquet"),
        ):
            with open_input(path, Settings()) as found:
                assert (found.share(), found.total()) == (0, None)
                rows = found.rows()
                for _ in range(10_000):
                    next(rows)
                assert 0.4 < (found.share() or 0) < 0.95
                assert found.total() == round(10_000 / (found.share() or 0))
                for _ in rows:
                    pass
                assert (found.share(), found.total()) == (1, 20_000)
        stdin(given[0].encode())
        for where in ("-", str(tmp_path)):
            with open_input(
                where, Settings(), InputOptions(form="auto" if where != "-" else "text")
            ) as found:
                assert next(found.rows())
                assert found.share() is None
                assert found.total() is None

    @pytest.mark.parametrize(
        ("where", "how", "message"),
        [
            ("{}/none.jsonl", {}, "{}/none.jsonl cannot be read: No such file or directory."),
            ("{}/a.json", {}, "{}/a.json does not end in .jsonl, .ndjson, .csv,"),
            ("{}/a.json", {"form": "xml"}, "There is no form 'xml': it is one of auto, jsonl,"),
            ("{}/a.json", {"form": "folder"}, "{}/a.json is no folder."),
            ("{}", {"form": "csv"}, "{} is empty: none of its files ends in .csv."),
            ("{}", {"form": "inventory"}, "{} is a folder: it cannot be read as inventory."),
            ("https://me:secret@host/a.csv?key=secret", {}, "https://host/a.csv cannot be read: name a path"),
            ("{}/a\0.csv", {}, "cannot be read: embedded null byte"),
        ],
        ids=["none", "ending", "form", "no-folder", "folder", "inventory", "https", "nul"],
    )
    def test_what_cannot_be_opened_is_told(self, tmp_path: Path, where: str, how: Any, message: str) -> None:
        (tmp_path / "a.json").write_text("{}")
        assert message.format(tmp_path) in refused(where.format(tmp_path), **how)

    def test_a_form_goes_before_the_ending(self, write: Write) -> None:
        assert uris(write("a.json", f'"{A}"'), form="jsonl") == [A]
        assert uris(write("a.csv", A), form="text") == [A]


class TestIds:
    def test_the_second_row_with_an_id_is_a_bad_one_that_names_the_first(self, write: Write) -> None:
        lines = [json.dumps({"image": A, "id": own}) for own in ("x", 7, "x", "7", "y", "x")]
        found = read(write("a.jsonl", "\n".join(lines)))
        assert [row.problem.code if row.problem else None for row in found] == [
            *(None, None),
            *("duplicate_id", "duplicate_id"),
            *(None, "duplicate_id"),
        ]
        details = [row.problem.detail for row in found if row.problem]
        assert details == [
            "Line 3: its id 'x' is the id of row 0, too.",
            "Line 4: its id '7' is the id of row 1, too.",
            "Line 6: its id 'x' is the id of row 0, too.",
        ]
        assert found[2].id == "x"

    def test_a_bad_row_has_its_id_all_the_same(self, write: Write) -> None:
        first, second = read(write("a.jsonl", f'{{"image": "", "id": "x"}}\n{{"image": "{A}", "id": "x"}}'))
        assert first.id == "x"
        assert second.problem
        assert second.problem.code == "duplicate_id"

    def test_every_id_is_remembered_in_a_few_bytes(self) -> None:
        ids = Ids()
        names = [f"image-{place}" for place in range(100_000)]
        assert [ids.add(name, place) for place, name in enumerate(names)] == [None] * len(names)
        assert [ids.add(name, 0) for name in names] == list(range(len(names)))
        held = sum(map(sys.getsizeof, (*ids._hashes, *ids._rows)))
        empty = sys.getsizeof(array("q")) * (len(ids._hashes) + len(ids._rows))
        assert (held - empty) / len(names) < 20


PIECES = [
    *(b'"', b",", b"\n", b"\r", b"\t", b"s3://b/k", b'{"image":', b"}", b"image,id\n", b"image\n", b"\xff"),
    *(b"\0", b"\xef\xbb\xbf", b"[", b"1e999", b'"id":', b'"\\ud800"', b"\xed\xa0\x80", b"%00", b"NaN", b"{"),
    *(b"9" * 50, b"\x1f\x8b", b"http://[::1", b"file://", b"\xf0\x9f\x90\xb1"),
]


class TestWhateverComes:
    @given(
        pieces=st.lists(st.sampled_from(PIECES), max_size=24),
        form=st.sampled_from(["jsonl", "csv", "tsv", "text", "inventory"]),
    )
    @hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
    def test_it_is_rows_that_a_worker_reads_or_one_refusal(
        self, tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], form: str
    ) -> None:
        path = tmp_path_factory.getbasetemp() / "whatever"
        path.write_bytes(b"".join(pieces))
        try:
            found = read(str(path), form=form)
        except InvalidInput as error:
            assert str(path) in str(error)  # noqa: PT017  # either is right
        else:
            for made in cut_shards(found, PLAN):
                assert parse(json.loads(made.to_json())) == made


class TestMany:
    def test_ten_thousand_bad_rows_hide_none_of_the_good_ones(self, write: Write) -> None:
        lines = [f'"s3://photos/{place}"' if place % 3 else "{" for place in range(15_000)]
        found = read(write("a.jsonl", "\n".join(lines)))
        assert len(found) == 15_000
        assert [place for place, row in enumerate(found) if row.problem] == list(range(0, 15_000, 3))
        assert why(found[-3]) == "Line 14998: it cannot be read as JSON (JSONDecodeError)"

    def test_nothing_is_read_further_than_it_is_asked_for(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(f'"s3://photos/{place}"\n' for place in range(20_000)))
        with open_input(str(path), Settings()) as found:
            made = cut_shards(found.rows(), PLAN)
            next(made)
            with path.open("a") as file:
                file.write(f'"{A}"\n')
            *_, last = made
        assert last.first + len(last.rows) == 20_001


COLUMNS = {"age": "Patient_Age", "sex": "sex"}


class TestNetworkInputs:
    def test_columns_of_a_table_are_what_the_network_takes_beside_the_image(self, write: Write) -> None:
        where = write("a.csv", f"image,patient_age,sex\n{A},61,f\n{A},,m\n{A},,\n")
        assert [row.inputs for row in read(where, inputs=COLUMNS)] == [
            {"age": "61", "sex": "f"},
            {"sex": "m"},
            None,
        ]

    def test_fields_of_json_keep_their_types_and_an_object_may_name_its_inputs(self, write: Write) -> None:
        lines = [
            {"image": A, "patient_age": 61, "Patient_Age": 62, "sex": None},
            {"image": A, "inputs": {"age": 5, "site": [1, 2.5]}},
            {"image": A, "inputs": {"age": 5}, "Patient_Age": 6, "sex": True},
        ]
        where = write("a.jsonl", "\n".join(map(json.dumps, lines)))
        assert [row.inputs for row in read(where, inputs=COLUMNS)] == [
            {"age": 62},
            {"age": 5, "site": (1, 2.5)},
            {"age": 6, "sex": "true"},
        ]

    def test_columns_of_parquet_keep_their_types_and_a_missing_number_is_none(self, tmp_path: Path) -> None:
        table = {"image": [A, A], "patient_age": [61.0, float("nan")], "sex": ["f", None], "other": [1, 2]}
        pq.write_table(pa.table(table), tmp_path / "a.parquet")
        rows = read(str(tmp_path / "a.parquet"), inputs=COLUMNS)
        assert [row.inputs for row in rows] == [{"age": 61.0, "sex": "f"}, None]

    @pytest.mark.parametrize(
        ("inputs", "problem"),
        [
            ([1], "its inputs must be an object"),
            ({"age": {}}, "its input 'age': it is {}: it must be a number, a text or a list of numbers"),
            ({"age": [1, "a"]}, "its input 'age': it is a list with 'a': it must hold numbers"),
            ({"age": "a" * 2000}, "its input 'age': it is a text of 2,000 characters"),
            ({"a" * 300: 1}, "must have a name of at most 256 characters"),
            ({str(number): 1 for number in range(99)}, "it has 99 inputs for the network; at most 64"),
        ],
    )
    def test_what_cannot_be_sent_is_a_problem_of_its_row(
        self, inputs: Any, problem: str, write: Write
    ) -> None:
        where = write("a.jsonl", json.dumps({"image": A, "inputs": inputs}))
        assert problem in why(read(where)[0])

    def test_a_row_with_a_problem_keeps_its_inputs_for_another_backfill(self, write: Write) -> None:
        lines = [{"image": A, "id": "x", "inputs": {"age": age}} for age in (61, 62)]
        found = read(write("a.jsonl", "\n".join(map(json.dumps, lines))))
        assert [bool(row.problem) for row in found] == [False, True]
        assert [row.inputs for row in found] == [{"age": 61}, {"age": 62}]

    def test_a_column_that_is_not_there_is_named(self, write: Write) -> None:
        where = write("a.csv", f"image,age\n{A},61\n")
        assert refused(where, inputs={"age": "years"}).endswith(
            "has no columns 'years' for the input 'age'; it has 'image', 'age'."
        )
        assert "is read as text, which has no columns for age" in refused(
            write("a.txt", A), inputs={"age": "years"}
        )

    def test_failed_rows_are_read_again_with_their_inputs(self, write: Write) -> None:
        row = Row(uri=A, inputs={"age": 61, "site": (1, 2)})
        problem = read(write("bad.jsonl", "{}"))[0].problem
        (shard,) = cut_shards([row], PLAN)
        again = read(write("failed.jsonl", failed_lines(shard, [problem])))
        assert [one.inputs for one in again] == [row.inputs]

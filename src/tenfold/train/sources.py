"""Where training text comes from: files in the formats people have, and the embedded WikiText-2.

Inputs become spans: a whole file, a range of bytes of one that is read by lines, or a row group. A span's
documents depend on nothing else, so spans are read in any order by any process.
"""

from __future__ import annotations

import glob
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

WIKITEXT = "wikitext-2"
SPLITS = ("train", "validation", "test")
# What is taken from a folder. A file that is named outright is text where its name says nothing else.
SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz", ".txt.xz", ".jsonl.xz")
SPAN_BYTES = 4 << 20  # of a file that can be read in parts
ARTICLES = 100  # of WikiText-2 in a span


class Span(NamedTuple):
    """A part of an input: bytes, row groups or articles from `begin` to before `end`."""

    path: str
    begin: int
    end: int
    size: int  # in bytes, for progress


class Form(NamedTuple):
    """How documents stand in files."""

    field: str  # of JSON objects and Parquet columns
    separator: str | None  # the line between two documents of a text file


class Document(NamedTuple):
    """A text, and the split it was made for; None where that is free."""

    text: str
    split: str | None


def wikitext_documents(split: str) -> list[str]:
    """The articles of embedded WikiText-2, raw: 600 in `train`, 60 each in `validation` and `test`."""
    return list(_articles(split))


def find_inputs(inputs: Sequence[str]) -> list[str]:
    """Files that the inputs stand for, in order: names, globs, folders (all of theirs), and `wikitext-2`.

    Raises ValueError where an input matches nothing."""
    found = [path for each in inputs for path in _matches(each)]
    if not found:
        raise ValueError("no input given; name text files, folders, globs or wikitext-2")
    return list(dict.fromkeys(found))


def plan_spans(paths: Sequence[str], form: Form) -> list[Span]:
    """All spans of the files, in order. Raises OSError, or ValueError where a Parquet file is none."""
    return [span for path in paths for span in _spans(path, form)]


def read_documents(span: Span, form: Form) -> Iterator[Document]:
    """The documents of a span. Raises ValueError telling the file and the place of what cannot be read."""
    if span.path.startswith(WIKITEXT):
        split = span.path.removeprefix(f"{WIKITEXT}:")
        for text in _articles(split)[span.begin : span.end]:
            yield Document(text, split)
        return
    for text in _read(span, form):
        yield Document(text, None)


# ---- what there is to read ---------------------------------------------------------------------------------


def _matches(name: str) -> list[str]:
    if name == WIKITEXT:
        return [f"{WIKITEXT}:{split}" for split in SPLITS]
    path = Path(name).expanduser()
    if path.is_dir():
        found = [each for each in path.rglob("*") if each.name.lower().endswith(SUFFIXES) and each.is_file()]
        found = [each for each in found if not any(part[0] == "." for part in each.relative_to(path).parts)]
        if not found:
            raise ValueError(f"no input in folder {name}: expected files named {', '.join(SUFFIXES)}")
    elif path.is_file():
        found = [path]
    else:
        found = [Path(each) for each in glob.glob(str(path), recursive=True) if Path(each).is_file()]
        if not found:
            raise ValueError(f"no input matches {name!r}; give a file, a folder, a glob or {WIKITEXT}")
    return sorted(str(each.absolute()) for each in found)


def _spans(path: str, form: Form) -> Iterator[Span]:
    if path.startswith(f"{WIKITEXT}:"):
        articles = _articles(path.removeprefix(f"{WIKITEXT}:"))
        for begin in range(0, len(articles), ARTICLES):
            part = articles[begin : begin + ARTICLES]
            yield Span(path, begin, begin + len(part), sum(map(len, part)))
        return
    size = Path(path).stat().st_size
    if _is_parquet(path):
        with _parquet(path) as file:
            groups = file.num_row_groups
        yield from (Span(path, group, group + 1, size // groups) for group in range(groups))
    elif _packed(path) or not (_is_jsonl(path) or form.separator is not None):
        yield Span(path, 0, size, size)
    else:
        for begin in range(0, size, SPAN_BYTES):
            end = min(begin + SPAN_BYTES, size)
            yield Span(path, begin, end, end - begin)


def _is_parquet(path: str) -> bool:
    return path.lower().endswith(".parquet")


def _is_jsonl(path: str) -> bool:
    return path.lower().endswith((".jsonl", ".jsonl.gz", ".jsonl.xz"))


def _packed(path: str) -> bool:
    return path.lower().endswith((".gz", ".xz"))


# ---- reading -----------------------------------------------------------------------------------------------


def _read(span: Span, form: Form) -> Iterator[str]:
    if _is_parquet(span.path):
        yield from _rows(span, form.field)
        return
    opener = {"gz": gzip.open, "xz": lzma.open}.get(span.path[-2:].lower(), open)
    try:
        with opener(span.path, "rb") as opened:
            file = cast(BinaryIO, opened)
            if _is_jsonl(span.path):
                yield from _json_lines(file, span, form.field)
            elif form.separator is not None:
                yield from _separated(file, span, form.separator)
            else:
                yield decode_text(file.read(), span.path, 0)
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{span.path}: damaged archive ({error}); copy or download it again") from error


def _lines(file: BinaryIO, span: Span) -> Iterator[tuple[int, bytes]]:
    """Lines from the first that begins in the span on to the end of the file, with their offsets."""
    offset = 0
    if span.begin:
        offset = file.seek(span.begin - 1)
        offset += len(file.readline())
    for line in file:
        yield offset, line
        offset += len(line)


def _json_lines(file: BinaryIO, span: Span, field: str) -> Iterator[str]:
    for offset, line in _lines(file, span):
        if offset >= span.end and not _packed(span.path):
            return
        if line.strip():
            yield _json_text(decode_text(line, span.path, offset), field, f"{span.path}, byte {offset}")


def _json_text(line: str, field: str, place: str) -> str:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: not a JSON object in one line ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(row).__name__}")
    if field not in row:
        known = ", ".join(row) or "none"
        raise ValueError(f"{place}: no field {field!r} among {known}; set `field` to the one with text")
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f"{place}: field {field!r} holds {type(text).__name__}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place}: field {field!r} holds half a surrogate pair; correct that line") from None
    return text


def _separated(file: BinaryIO, span: Span, separator: str) -> Iterator[str]:
    """Documents between lines that are the separator; a span owns those that follow its own separators."""
    lines: list[bytes] | None = [] if span.begin == 0 else None
    begin = 0  # of the document
    for offset, line in _lines(file, span):
        if line.strip() == separator.strip().encode():
            if lines:
                yield decode_text(b"".join(lines), span.path, begin)
            if offset >= span.end and not _packed(span.path):
                return
            lines, begin = [], offset + len(line)
        elif lines is not None:
            lines.append(line)
    if lines:
        yield decode_text(b"".join(lines), span.path, begin)


def decode_text(data: bytes, path: str, offset: int) -> str:
    """UTF-8 without its byte order mark. Raises ValueError telling the file and the byte that is wrong."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}); convert it first"
        ) from None
    return text if offset else text.removeprefix("\ufeff")


def _rows(span: Span, field: str) -> Iterator[str]:
    with _parquet(span.path) as file:
        names = file.schema_arrow.names
        if field not in names:
            columns = ", ".join(names)
            raise ValueError(f"{span.path}: no column {field!r} among {columns}; set `field` to the one with text")
        for batch in file.iter_batches(1024, row_groups=range(span.begin, span.end), columns=[field]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    kind = type(text).__name__
                    raise ValueError(f"{span.path}: column {field!r} holds {kind}, expected text")
                yield text or ""


def _parquet(path: str) -> ParquetFile:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install 'tenfold[data]'") from None
    try:
        return ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: no Parquet file ({' '.join(str(error).split())})") from error


# ---- WikiText-2 --------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _articles(split: str) -> tuple[str, ...]:
    """A line ` = Title = ` between two empty ones begins an article. Formulas look alike, within text."""
    name = {"train": "train", "validation": "valid", "test": "test"}[split]
    packed = files("tenfold").joinpath(f"data/{name}.raw.xz").read_bytes()
    lines = lzma.decompress(packed).decode().splitlines(keepends=True)
    titles = [i for i in range(1, len(lines) - 1) if _is_title(lines[i])]
    starts = [i for i in titles if not (lines[i - 1] + lines[i + 1]).strip()]
    return tuple("".join(lines[a:b]) for a, b in zip(starts, [*starts[1:], len(lines)], strict=True))


def _is_title(line: str) -> bool:
    return line.startswith(" = ") and line.endswith(" = \n") and not line.startswith(" = =")

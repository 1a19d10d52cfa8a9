"""Text to rows of tokens on disk: deterministic, held-out documents apart, opened in milliseconds the second time. No torch.

A row is the row-start token and `context` - 1 tokens of text. A document gives as many whole rows as it fills; what is left
of it is packed with what is left of others, with the row-start token between them (to the model that is what it is trained
to see between documents). So a packed row may attend across documents. Row-start tokens are excluded as destinations wherever
they stand, and stay sources (`saes.base.row_starts`).

Files are read once, whole, whatever their size, but only what is kept is held: of all documents those with the smallest
hashes (of seed and text), until they give the tokens asked for. So the sample is uniform over the corpus, independent of the
order of files, and a repeated document is taken once. A hub dataset is never read whole: it is a shuffled stream, left as
soon as the rows are full.
"""

import codecs
import errno
import hashlib
import heapq
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sae_core.config import CorpusSource, RowsConfig
from sae_core.errors import DiskFull, EmptyCorpus, MissingWorkerExtra, UnknownCorpus, UnreadableCorpus
from sae_core.progress import Progress

Encode = Callable[[list[str]], list[list[int]]]
Tokens = NDArray[np.int32]

TEXT, JSONL, PARQUET = {".txt", ".text", ".md", ".rst"}, {".jsonl", ".ndjson", ".json"}, {".parquet"}
DOCUMENT_CHARS = 8_000  # a text file is cut at blank lines into documents of about this size
BATCH_CHARS = 500_000  # text tokenised at a time
STREAM_BUFFER = 10_000  # documents that a hub stream is shuffled in
LEAST_SHARE = 0.01  # of the tokens asked for; a corpus with less is taken for a mistake
FORMAT = 1


@dataclass(frozen=True)
class Document:
    """A piece of text that belongs together."""

    text: str
    index: int
    """Its place in the corpus, from 0."""


@dataclass(frozen=True)
class Rows:
    """Token rows on disk, memory-mapped."""

    folder: Path
    context: int
    """Tokens in a row, the row start included."""
    row_start: int
    """Token id at position 0 of every row."""
    train: Tokens
    """[n, context]: for training and harvest, in shuffled order."""
    heldout: Tokens
    """[m, context]: of other documents, for evaluation."""
    fingerprint: str
    """Changes when any token does."""

    @classmethod
    def open(cls, folder: Path) -> "Rows":
        """The rows in `folder`. Raises `UnreadableCorpus` when they are missing or damaged."""
        try:
            facts = json.loads((folder / "rows.json").read_text())
            train, heldout = (_map(folder / f"{part}.npy", facts["context"]) for part in ("train", "heldout"))
        except (OSError, ValueError, KeyError) as error:
            raise UnreadableCorpus(
                f"The token rows in {folder} are damaged ({error}); delete that folder and try again."
            ) from error
        return cls(folder, facts["context"], facts["row_start"], train, heldout, facts["fingerprint"])


def _map(path: Path, context: int) -> Tokens:
    empty = path.stat().st_size <= 128  # a header alone: nothing to map
    rows: Tokens = np.load(path, mmap_mode=None if empty else "r")
    if rows.ndim != 2 or rows.shape[1] != context or rows.dtype != np.int32:
        raise ValueError(f"{path.name} holds {rows.dtype} {rows.shape}")
    return rows


def documents(source: CorpusSource) -> Iterator[Document]:
    """Every document of the corpus, in its own order; empty ones are left out.

    Raises `UnknownCorpus`, `EmptyCorpus` (no file of a known kind) or `UnreadableCorpus`, naming file and line.
    """
    texts = _hub_texts(source, seed=None) if _on_hub(source) else (text for text, _ in _file_texts(source, _files(source)))
    for index, text in enumerate(texts):
        yield Document(text, index)


def document_hash(text: str) -> str:
    """What a document is known by once its text is gone: its SHA-256, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def rows_of(source: CorpusSource, folder: Path) -> list[Path]:
    """The folders inside `folder` with rows of what `source` reads, however they are cut, and those that cannot be read."""
    places = sorted(path for path in folder.glob("*") if path.is_dir())
    return [place for place in places if rows_source(place) in (None, source.location)]


def rows_source(folder: Path) -> str | None:
    """What the rows in `folder` were cut from; None where they are damaged or half written."""
    try:
        return str(json.loads((folder / "rows.json").read_text())["source"]["location"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def prepare_rows(
    source: CorpusSource,
    cfg: RowsConfig,
    *,
    encode: Encode,
    row_start: int,
    tokenizer_fingerprint: str,
    folder: Path,
    without: frozenset[str] = frozenset(),
) -> Generator[Progress, None, Rows]:
    """Cut a corpus into rows, in a folder of their own inside `folder`; returns the rows that are there already.

    Documents whose hash is in `without` (`document_hash`) are left out, whatever the source still has.
    The name of that folder is made of the text's content, the tokenizer, `cfg` and `without`. A corpus with less text than `cfg`
    asks for gives what it has, training and held-out in the same proportion. Raises `EmptyCorpus` when that is less than one row,
    or less than 1 % of the tokens asked for, and what `documents` raises; nothing half written is left behind.
    """
    with _disk_full(folder):
        folder.mkdir(parents=True, exist_ok=True)
        content = _hub_name(source) if _on_hub(source) else (yield from _fingerprint(_files(source), folder))
        identity = {
            "format": FORMAT,
            "content": content,
            "field": source.field,
            "tokenizer": tokenizer_fingerprint,
            "row_start": row_start,
            "config": cfg.model_dump(mode="json"),
            **({"without": sorted(without)} if without else {}),
        }
        target = folder / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        if not target.exists():
            aside = Path(tempfile.mkdtemp(dir=folder, prefix=f"{target.name}.part-"))
            try:
                yield from _build(source, cfg, encode, row_start, aside, without)
                _finish(aside, cfg, row_start, {"source": source.model_dump(mode="json"), "identity": identity})
                _publish(aside, target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return Rows.open(target)


def _publish(aside: Path, target: Path) -> None:
    try:
        aside.rename(target)
    except OSError:
        if not target.exists():  # else another process made the same rows meanwhile: take those
            raise


# --------------------------------------------------------------------------------------------------------- reading files


def _on_hub(source: CorpusSource) -> bool:
    return source.location.startswith("hf:")


def _files(source: CorpusSource) -> list[Path]:
    place = Path(source.location).expanduser()
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise UnknownCorpus(
            f"There is no file or folder {place}; give a text, jsonl or parquet file, a folder of them, or hf:<dataset>.",
            field="corpus",
        )
    known = TEXT | JSONL | PARQUET
    seen = (path for path in place.rglob("*") if not any(part.startswith(".") for part in path.relative_to(place).parts))
    files = sorted(path for path in seen if path.suffix.lower() in known and path.is_file())
    if not files:
        raise EmptyCorpus(f"The folder {place} holds no {', '.join(sorted(known))} file.", field="corpus")
    return files


def _file_texts(source: CorpusSource, files: Sequence[Path]) -> Iterator[tuple[str, int]]:
    """Each document's text, with the bytes of all files read so far."""
    before = 0
    for path in files:
        suffix = path.suffix.lower()
        read = _parquet_texts if suffix in PARQUET else _jsonl_texts if suffix in JSONL else _plain_texts
        try:
            for text, done in read(path, source.field):
                if text.strip():
                    yield text, before + done
            before += path.stat().st_size
        except OSError as error:
            raise UnreadableCorpus(f"{path} cannot be read: {error.strerror or error}.", field="corpus") from error


def _plain_texts(path: Path, _field: str) -> Iterator[tuple[str, int]]:
    parts: list[str] = []
    size = 0
    with path.open("rb") as file:
        for line in _lines(file, path, longest=4 * DOCUMENT_CHARS):
            parts.append(line)
            size += len(line)
            if size >= DOCUMENT_CHARS and (not line.strip() or size >= 4 * DOCUMENT_CHARS):
                yield "".join(parts), file.tell()
                parts, size = [], 0
        yield "".join(parts), file.tell()


def _lines(file: BinaryIO, path: Path, longest: int = -1) -> Iterator[str]:
    """Decoded lines, line ends as \\n; one longer than `longest` bytes comes in pieces. An error names the line."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    number = 1
    while raw := file.readline(longest):
        if b"\0" in raw:
            raise UnreadableCorpus(
                f"{path} is not text: line {number} holds a zero byte (a binary file, or UTF-16). Give UTF-8 text.",
                field="corpus",
            )
        try:
            yield decoder.decode(raw).replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise UnreadableCorpus(
                f"{path} is not UTF-8 text: line {number} holds the byte 0x{error.object[error.start]:02x}. "
                "Convert it (iconv -t utf-8), or leave the file out if it is binary.",
                field="corpus",
            ) from error
        number += raw.endswith(b"\n")
    if decoder.getstate()[0]:
        raise UnreadableCorpus(f"{path} is not UTF-8 text: it ends within a character, on line {number}.", field="corpus")


def _jsonl_texts(path: Path, field: str) -> Iterator[tuple[str, int]]:
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if not line.strip():
                continue
            where = f"Line {number} of {path}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UnreadableCorpus(f"{where} is not one JSON record: {error}.", field="corpus") from error
            yield _text_of(record, field, where), file.tell()


def _text_of(record: object, field: str, where: str) -> str:
    if not isinstance(record, dict) or field not in record:
        has = f"it has {', '.join(sorted(record)[:12]) or 'none'}" if isinstance(record, dict) else "it is no record"
        raise UnreadableCorpus(f"{where} has no field {field!r} ({has}); name the field that holds the text.", field="field")
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UnreadableCorpus(f"{where} holds {type(text).__name__} in the field {field!r}, not text.", field="field")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a surrogate pair, which JSON can spell


def _parquet_texts(path: Path, field: str) -> Iterator[tuple[str, int]]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingWorkerExtra("Reading parquet needs pyarrow; install headscope[worker].") from error
    try:
        file = parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        if field not in columns:
            raise UnreadableCorpus(
                f"{path} has no column {field!r} (it has {', '.join(columns[:12])}); name the column that holds the text.",
                field="field",
            )
        if not any(test(file.schema_arrow.field(field).type) for test in (pa.types.is_string, pa.types.is_large_string)):
            raise UnreadableCorpus(
                f"{path} holds {file.schema_arrow.field(field).type} in the column {field!r}, not text.", field="field"
            )
        size, n_rows, done = path.stat().st_size, max(file.metadata.num_rows, 1), 0
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            for text in batch.column(0).to_pylist():
                done += 1
                yield text or "", size * done // n_rows
    except pa.ArrowException as error:
        raise UnreadableCorpus(f"{path} is not a whole parquet file: {error}.", field="corpus") from error


# ------------------------------------------------------------------------------------------------------- reading the hub


def _hub_name(source: CorpusSource) -> str:
    # The revision as asked for, not as resolved: a branch that moves on must not change a run that has begun.
    return f"{source.location}@{source.revision}/{source.split}"


def _hub_texts(source: CorpusSource, seed: int | None) -> Iterator[str]:
    """Texts of a hub dataset, streamed from one commit; shuffled in a buffer when a seed is given. Runs no remote code."""
    name, _, config = source.location.removeprefix("hf:").partition(":")
    try:
        import datasets
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    except ImportError as error:
        raise MissingWorkerExtra("Reading hub datasets needs the package datasets; install headscope[worker].") from error
    try:
        # The commit is settled first, so that every shard is read from the same one. (datasets 4 and later run no scripts.)
        commit = source.revision if Path(name).is_dir() else HfApi().dataset_info(name, revision=source.revision).sha
        stream = datasets.load_dataset(name, config or None, split=source.split, revision=commit, streaming=True)
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=STREAM_BUFFER)
        for number, record in enumerate(stream):
            if (text := _text_of(record, source.field, f"Record {number} of {source.location}")).strip():
                yield text
    except (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        OSError,
        ValueError,
        datasets.exceptions.DatasetsError,
    ) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnknownCorpus(
            f"The dataset {name!r} (split {source.split}) cannot be read from the hub: {reason}. Check its name, the split and "
            "revision, the connection and, for a gated one, the token.",
            field="corpus",
        ) from error


# -------------------------------------------------------------------------------------------------------- choosing text


class Sample:
    """The documents with the smallest keys that together give `wanted` tokens: exact in any order of arrival."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.total = wanted, 0
        self._kept: dict[int, Tokens] = {}
        self._largest: list[int] = []  # a heap of -key

    def __contains__(self, key: int) -> bool:
        return key in self._kept

    def takes(self, key: int) -> bool:
        """Whether a document of this key, not kept yet, would be kept."""
        return self.total < self.wanted or (bool(self._largest) and key < -self._largest[0])

    def add(self, key: int, tokens: Tokens) -> list[tuple[int, Tokens]]:
        """Keep a document; returns those that are not needed any more."""
        self._kept[key] = tokens
        heapq.heappush(self._largest, -key)
        self.total += len(tokens)
        return self.shrink(self.wanted)

    def shrink(self, wanted: int) -> list[tuple[int, Tokens]]:
        """Want so many tokens from now on; returns the documents that are not needed for them."""
        self.wanted = wanted
        dropped = []
        while self._largest and self.total - len(self._kept[-self._largest[0]]) >= wanted:
            key = -heapq.heappop(self._largest)
            dropped.append((key, self._kept.pop(key)))
            self.total -= len(dropped[-1][1])
        return dropped

    def in_order(self) -> Iterator[Tokens]:
        """The documents by key, which is a shuffled order."""
        for key in sorted(self._kept):
            yield self._kept[key]


def _key(text: str, seed: int) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(16, "little", signed=True)).digest()
    return int.from_bytes(digest, "little")


class Cutter:
    """Writes rows to a raw file as documents come, until there are `n` of them."""

    def __init__(self, file: BinaryIO, n: int, context: int, row_start: int) -> None:
        self.file, self.n, self.width, self.row_start = file, n, context - 1, row_start
        self.written = 0
        self._left = np.empty(0, np.int32)

    @property
    def full(self) -> bool:
        """All rows asked for are written."""
        return self.written >= self.n

    def add(self, tokens: Tokens) -> None:
        """Cut a document: its whole rows, and its tail behind the tails of others."""
        whole = len(tokens) // self.width * self.width
        self._write(tokens[:whole])
        if whole < len(tokens):
            between = [np.array([self.row_start], np.int32)] if len(self._left) else []
            packed = np.concatenate([self._left, *between, tokens[whole:]])
            whole = len(packed) // self.width * self.width
            self._write(packed[:whole])
            self._left = packed[whole:]

    def _write(self, tokens: Tokens) -> None:
        body = tokens.reshape(-1, self.width)[: self.n - self.written]
        rows = np.full((len(body), self.width + 1), self.row_start, "<i4")
        rows[:, 1:] = body
        self.file.write(rows.tobytes())
        self.written += len(rows)


# ---------------------------------------------------------------------------------------------------------------- rows


def _build(
    source: CorpusSource, cfg: RowsConfig, encode: Encode, row_start: int, aside: Path, without: frozenset[str]
) -> Generator[Progress, None, None]:
    """Write `train.raw` and `heldout.raw` into `aside`, in the order in which documents were chosen."""
    n, m = max(cfg.tokens // cfg.context, 1), -(-cfg.heldout_tokens // cfg.context)
    with (aside / "train.raw").open("wb") as first, (aside / "heldout.raw").open("wb") as second:
        train, heldout = Cutter(first, n, cfg.context, row_start), Cutter(second, m, cfg.context, row_start)
        fill = _from_stream if _on_hub(source) else _from_files
        yield from fill(source, cfg, encode, train, heldout, without)
    _check_enough(source, cfg, train, heldout)


def _from_files(
    source: CorpusSource, cfg: RowsConfig, encode: Encode, train: Cutter, heldout: Cutter, without: frozenset[str]
) -> Generator[Progress, None, None]:
    files = _files(source)
    watch = _Watch(sum(path.stat().st_size for path in files), "bytes")
    # By key, the first documents are held out and the next are for training.
    # A row more of each, since the last tail may not fill one.
    apart, kept = (Sample((cutter.n + 1) * cutter.width if cutter.n else 0) for cutter in (heldout, train))

    def offer(key: int, tokens: Tokens) -> None:
        passed_on = apart.add(key, tokens) if apart.takes(key) else [(key, tokens)]
        for key, tokens in passed_on:
            if kept.takes(key):
                kept.add(key, tokens)

    for texts, done in _batches(_left(_file_texts(source, files), without)):
        keyed = {_key(text, cfg.seed): text for text in texts}  # a repeated document is taken once
        keyed = {k: v for k, v in keyed.items() if k not in apart and k not in kept and (apart.takes(k) or kept.takes(k))}
        for key, ids in zip(keyed, encode(list(keyed.values())), strict=True):
            offer(key, np.array(ids, np.int32))
        yield watch.at(done)
    # A corpus that is smaller than asked for is shared in proportion.
    share = cfg.heldout_tokens / (cfg.tokens + cfg.heldout_tokens)
    for key, tokens in apart.shrink(min(apart.wanted, max(int(share * (apart.total + kept.total)), heldout.width))):
        kept.add(key, tokens)
    for cutter, sample in ((heldout, apart), (train, kept)):
        for tokens in sample.in_order():
            cutter.add(tokens)


def _from_stream(
    source: CorpusSource, cfg: RowsConfig, encode: Encode, train: Cutter, heldout: Cutter, without: frozenset[str]
) -> Generator[Progress, None, None]:
    """The first documents of the shuffled stream are held out, the next are for training; a repeated one is left out."""
    watch = _Watch((train.n + heldout.n) * cfg.context, "tokens")
    seen: set[int] = set()
    for texts, _ in _batches(_left(((text, 0) for text in _hub_texts(source, cfg.seed)), without)):
        fresh = {key: text for text in texts if (key := _key(text, cfg.seed)) not in seen}
        seen.update(fresh)
        for ids in encode(list(fresh.values())):
            (train if heldout.full else heldout).add(np.array(ids, np.int32))
        yield watch.at((train.written + heldout.written) * cfg.context)
        if train.full:
            return


def _left(texts: Iterable[tuple[str, int]], without: frozenset[str]) -> Iterator[tuple[str, int]]:
    """The texts but for those that were removed."""
    yield from ((text, done) for text, done in texts if not without or document_hash(text) not in without)


def _batches(texts: Iterable[tuple[str, int]]) -> Iterator[tuple[list[str], int]]:
    """Texts in batches of about `BATCH_CHARS`, each with how much was read when it was full."""
    batch: list[str] = []
    size = done = 0
    for text, done in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch, done
            batch, size = [], 0
    if batch:
        yield batch, done


def _check_enough(source: CorpusSource, cfg: RowsConfig, train: Cutter, heldout: Cutter) -> None:
    got = train.written * cfg.context
    if train.written and got >= LEAST_SHARE * cfg.tokens and (heldout.written or not cfg.heldout_tokens):
        return
    if train.written and got >= LEAST_SHARE * cfg.tokens:
        problem = f"too few documents to hold {cfg.heldout_tokens} tokens out for evaluation"
    elif not train.written and heldout.written:
        problem = "one document only, so that nothing is left to train on when it is held out"
    else:
        problem = f"text for {got} tokens only, in whole rows of {cfg.context}, of the {cfg.tokens} asked for"
    raise EmptyCorpus(f"{source.location} holds {problem}; add text, or ask for fewer tokens or shorter rows.", field="corpus")


def _finish(aside: Path, cfg: RowsConfig, row_start: int, facts: dict[str, Any]) -> None:
    """Turn the raw files into shuffled .npy files and write `rows.json`."""
    content = hashlib.sha256(str(row_start).encode())
    random = np.random.default_rng(cfg.seed % 2**63)
    for part in ("train", "heldout"):
        raw = aside / f"{part}.raw"
        n = raw.stat().st_size // (4 * cfg.context)
        rows = np.memmap(raw, "<i4", "r", shape=(n, cfg.context)) if n else np.empty((0, cfg.context), "<i4")
        order = random.permutation(n)
        with (aside / f"{part}.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": (n, cfg.context)})
            for first in range(0, n, 4096):
                block = rows[order[first : first + 4096]].tobytes()
                content.update(block)
                file.write(block)
        del rows
        raw.unlink()
    facts |= {"context": cfg.context, "row_start": row_start, "fingerprint": content.hexdigest()}
    (aside / "rows.json").write_text(json.dumps(facts, indent=1))


# ------------------------------------------------------------------------------------------------------------ small parts


def _fingerprint(files: Sequence[Path], folder: Path) -> Generator[Progress, None, str]:
    """A hash of what the files hold. Sums of unchanged files (by size and time) are remembered in `folder/files.json`."""
    memory = folder / "files.json"
    known: dict[str, list[Any]] = json.loads(memory.read_text()) if memory.exists() else {}
    watch = _Watch(sum(path.stat().st_size for path in files), "bytes")
    sums, done = [], 0
    for path in files:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        name = str(path.resolve())
        if known.get(name, [])[:2] != stamp:
            yield watch.at(done)
            with path.open("rb") as file:
                known[name] = [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
        sums.append([path.suffix.lower(), known[name][2]])
        done += stat.st_size
    if watch.used:
        aside = folder / f"files.json.{os.getpid()}"
        aside.write_text(json.dumps(known))
        aside.replace(memory)
    return hashlib.sha256(json.dumps(sorted(sums)).encode()).hexdigest()


class _Watch:
    """Makes progress reports with a rate."""

    def __init__(self, total: int, unit: str) -> None:
        self.total, self.unit, self.used, self._start = total, unit, False, time.monotonic()

    def at(self, done: int) -> Progress:
        self.used = True
        seconds = time.monotonic() - self._start
        return Progress("prepare", min(done, self.total), self.total, self.unit, done / seconds if seconds > 0.2 else 0.0)


@contextmanager
def _disk_full(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFull(f"No room is left in {folder} for the token rows; free some space and try again.") from error
        raise

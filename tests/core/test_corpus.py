"""Documents out of files, and rows of tokens out of documents."""

import errno
import json
import os
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from sae_core import corpus
from sae_core.config import CorpusSource, RowsConfig
from sae_core.corpus import Rows, documents, prepare_rows
from sae_core.errors import DiskFull, EmptyCorpus, UnknownCorpus, UnreadableCorpus
from sae_core.progress import Progress

START = 7


def encode(texts: list[str]) -> list[list[int]]:
    """A token per byte, moved up so that none is the row start."""
    return [[byte + 10 for byte in text.encode()] for text in texts]


def decode(ids: np.ndarray) -> str:
    return bytes(i - 10 if i >= 10 else ord("|") for i in ids).decode(errors="replace")


def finish(steps: Generator[Progress, None, Rows]) -> Rows:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def rows_of(place: Path, folder: Path, **settings: int) -> Rows:
    cfg = RowsConfig(**{"context": 16, "tokens": 160, "heldout_tokens": 32, **settings})
    source = CorpusSource(location=str(place))
    return finish(prepare_rows(source, cfg, encode=encode, row_start=START, tokenizer_fingerprint="t", folder=folder))


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """Twenty-six documents, each of one letter only and of another length."""
    path = tmp_path / "letters.jsonl"
    lines = [json.dumps({"text": chr(97 + i) * (20 + i)}) for i in range(26)]
    path.write_text("\n".join(lines))
    return path


# ------------------------------------------------------------------------------------------------------------ documents


def test_a_folder_gives_text_jsonl_and_parquet_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": null}\n{"text": "two"}\n')
    parquet.write_table(pa.table({"text": ["three", None, "four"]}), tmp_path / "c.parquet")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("no")
    found = list(documents(CorpusSource(location=str(tmp_path))))
    assert [d.text for d in found] == ["plain", "one", "two", "three", "four"]
    assert [d.index for d in found] == [0, 1, 2, 3, 4]


def test_a_long_text_file_is_cut_at_blank_lines_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_text("\n\n".join(f"Paragraph {i}. " + "word " * 300 for i in range(100)))
    texts = [d.text for d in documents(CorpusSource(location=str(path)))]
    assert "".join(texts) == path.read_text()
    assert len(texts) > 5
    assert all(text.startswith("Paragraph") for text in texts)


def test_a_text_without_any_line_end_is_still_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("äöü€" * 50_000)
    texts = [d.text for d in documents(CorpusSource(location=str(path)))]
    assert "".join(texts) == path.read_text()
    assert max(map(len, texts)) <= 8 * corpus.DOCUMENT_CHARS


def test_byte_order_mark_and_windows_line_ends_disappear(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert [d.text for d in documents(CorpusSource(location=str(path)))] == ["one\ntwo"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"fine\nbin\0ary", r"a\.txt is not text: line 2 holds a zero byte"),
        ("a.txt", b"fine\nfine\ncaf\xe9 noir", r"a\.txt is not UTF-8 text: line 3 holds the byte 0xe9"),
        ("a.txt", "fine €".encode()[:-1], r"a\.txt is not UTF-8 text: it ends within a character, on line 1"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": ', r"Line 2 of .*a\.jsonl is not one JSON record"),
        ("a.jsonl", b'{"body": "b", "title": "t"}', r"Line 1 of .*a\.jsonl has no field 'text' \(it has body, title\)"),
        ("a.jsonl", b'{"text": 5}', r"Line 1 of .*a\.jsonl holds int in the field 'text', not text"),
        ("a.jsonl", b'["text"]', r"Line 1 of .*a\.jsonl has no field 'text' \(it is no record\)"),
        ("a.parquet", b"PAR1 but not really", r"a\.parquet is not a whole parquet file"),
    ],
)
def test_unreadable_files_are_named_with_the_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableCorpus, match=says):
        list(documents(CorpusSource(location=str(tmp_path / name))))


def test_parquet_without_the_column_or_of_numbers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"body": ["x"], "n": [1]}), path)
    with pytest.raises(UnreadableCorpus, match=r"no column 'text' \(it has body, n\)"):
        list(documents(CorpusSource(location=str(path))))
    with pytest.raises(UnreadableCorpus, match="holds int64 in the column 'n', not text"):
        list(documents(CorpusSource(location=str(path), field="n")))
    assert [d.text for d in documents(CorpusSource(location=str(path), field="body"))] == ["x"]


def test_half_a_surrogate_pair_in_json_does_not_reach_the_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b"}')
    assert [d.text.encode() for d in documents(CorpusSource(location=str(path)))] == ["a\N{REPLACEMENT CHARACTER}b".encode()]


def test_missing_places_and_folders_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownCorpus, match=r"There is no file or folder .*nowhere"):
        list(documents(CorpusSource(location=str(tmp_path / "nowhere"))))
    with pytest.raises(EmptyCorpus, match=r"holds no .*jsonl"):
        list(documents(CorpusSource(location=str(tmp_path))))


# ----------------------------------------------------------------------------------------------------------------- rows


def test_rows_start_with_the_row_start_and_number_what_was_asked(letters: Path, tmp_path: Path) -> None:
    rows = rows_of(letters, tmp_path / "rows")
    assert rows.train.shape == (10, 16)
    assert rows.heldout.shape == (2, 16)
    assert rows.train.dtype == np.int32
    assert (rows.train[:, 0] == START).all()
    assert (rows.heldout[:, 0] == START).all()


def test_heldout_documents_are_never_trained_on(letters: Path, tmp_path: Path) -> None:
    for seed in range(20):
        rows = rows_of(letters, tmp_path / "rows", seed=seed, tokens=400, heldout_tokens=64)
        trained, held = ({i for i in part.flatten().tolist() if i >= 10} for part in (rows.train, rows.heldout))
        assert trained
        assert held
        assert not trained & held


def test_every_token_of_the_corpus_is_used_once_when_all_is_asked_for(letters: Path, tmp_path: Path) -> None:
    rows = rows_of(letters, tmp_path / "rows", tokens=2000, heldout_tokens=200)
    text = decode(rows.train.flatten()) + decode(rows.heldout.flatten())
    for i in range(26):
        # Up to a row less: the last tails of training and of held-out documents fill none.
        assert text.count(chr(97 + i)) <= 20 + i
    letters_used = sum(c != "|" for c in text)
    assert sum(20 + i for i in range(26)) - 2 * 15 < letters_used


def test_a_long_document_keeps_its_rows_to_itself_and_tails_are_packed_between_row_starts(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text(json.dumps({"text": "a" * 40}) + "\n" + json.dumps({"text": "b" * 40}) + "\n")
    rows = rows_of(path, tmp_path / "rows", tokens=96, heldout_tokens=0)
    texts = [decode(row[1:]) for row in rows.train]
    whole, packed = [text for text in texts if "|" not in text], [text for text in texts if "|" in text]
    assert sorted(whole) == ["a" * 15, "a" * 15, "b" * 15, "b" * 15]
    assert packed in (["a" * 10 + "|" + "b" * 4], ["b" * 10 + "|" + "a" * 4])


def test_rows_are_the_same_whatever_the_order_of_files_and_lines(letters: Path, tmp_path: Path) -> None:
    rows = rows_of(letters, tmp_path / "rows")
    lines = letters.read_text().splitlines()
    turned = tmp_path / "turned"
    turned.mkdir()
    (turned / "b.jsonl").write_text("\n".join(lines[:9]))
    (turned / "a.jsonl").write_text("\n".join(lines[9:][::-1]))
    again = rows_of(turned, tmp_path / "rows")
    assert again.folder != rows.folder
    assert again.fingerprint == rows.fingerprint
    assert (again.train == rows.train).all()


def test_a_repeated_document_is_taken_once(letters: Path, tmp_path: Path) -> None:
    rows = rows_of(letters, tmp_path / "rows", tokens=2000, heldout_tokens=200)
    twice = tmp_path / "twice.jsonl"
    twice.write_text(letters.read_text() + "\n" + letters.read_text())
    assert rows_of(twice, tmp_path / "rows", tokens=2000, heldout_tokens=200).fingerprint == rows.fingerprint


def test_sampling_in_small_batches_gives_the_same_rows(letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(letters, tmp_path / "rows")
    monkeypatch.setattr(corpus, "BATCH_CHARS", 1)
    assert rows_of(letters, tmp_path / "other").fingerprint == rows.fingerprint


def test_another_seed_gives_other_rows_and_other_heldout_documents(letters: Path, tmp_path: Path) -> None:
    rows, other = (rows_of(letters, tmp_path / "rows", seed=seed) for seed in (0, 1))
    assert rows.fingerprint != other.fingerprint
    assert set(rows.heldout.flatten().tolist()) != set(other.heldout.flatten().tolist())


def test_more_training_tokens_leave_the_heldout_documents_as_they_are(letters: Path, tmp_path: Path) -> None:
    small, large = (rows_of(letters, tmp_path / "rows", tokens=tokens) for tokens in (160, 320))
    assert sorted(small.heldout.tolist()) == sorted(large.heldout.tolist())


def test_the_second_call_opens_what_is_there_without_tokenising(letters: Path, tmp_path: Path) -> None:
    rows = rows_of(letters, tmp_path / "rows")
    source, cfg = CorpusSource(location=str(letters)), RowsConfig(context=16, tokens=160, heldout_tokens=32)
    never = pytest.fail
    again = prepare_rows(source, cfg, encode=never, row_start=START, tokenizer_fingerprint="t", folder=tmp_path / "rows")
    with pytest.raises(StopIteration) as end:
        next(again)  # not even a report
    assert end.value.value.folder == rows.folder


def test_changed_text_another_tokenizer_or_another_row_start_make_new_rows(letters: Path, tmp_path: Path) -> None:
    def folder_of(row_start: int = START, tokenizer: str = "t") -> Path:
        source, cfg = CorpusSource(location=str(letters)), RowsConfig(context=16, tokens=160, heldout_tokens=32)
        steps = prepare_rows(
            source, cfg, encode=encode, row_start=row_start, tokenizer_fingerprint=tokenizer, folder=tmp_path / "rows"
        )
        return finish(steps).folder

    folders = {folder_of(), folder_of(row_start=8), folder_of(tokenizer="u")}
    letters.write_text(letters.read_text().replace("zz", "yz"))
    folders.add(folder_of())
    assert len(folders) == 4


def test_a_corpus_smaller_than_asked_gives_what_it_has_in_proportion(letters: Path, tmp_path: Path) -> None:
    rows = rows_of(letters, tmp_path / "rows", tokens=8000, heldout_tokens=2000)
    total = rows.train.size + rows.heldout.size
    assert 700 < total < 1000
    assert 0.1 < rows.heldout.size / total < 0.35


@pytest.mark.parametrize(
    ("texts", "settings", "says"),
    [
        (["short"], {"heldout_tokens": 0}, "text for 0 tokens only, in whole rows of 16, of the 160 asked for"),
        (["a" * 50, "b" * 50], {"tokens": 100_000}, "of the 100000 asked for"),
        (["a" * 500], {}, "one document only, so that nothing is left to train on"),
        ([" ", ""], {}, "text for 0 tokens only"),
    ],
)
def test_too_little_text_is_refused_and_leaves_nothing(
    tmp_path: Path, texts: list[str], settings: dict[str, int], says: str
) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    with pytest.raises(EmptyCorpus, match=says):
        rows_of(path, tmp_path / "rows", **settings)
    assert [p.name for p in (tmp_path / "rows").iterdir()] == ["files.json"]


def test_an_interrupted_preparation_leaves_nothing_behind(letters: Path, tmp_path: Path) -> None:
    source, cfg = CorpusSource(location=str(letters)), RowsConfig(context=16, tokens=160, heldout_tokens=32)
    steps = prepare_rows(source, cfg, encode=encode, row_start=START, tokenizer_fingerprint="t", folder=tmp_path / "rows")
    next(steps)
    next(steps)
    steps.close()
    assert not [p for p in (tmp_path / "rows").iterdir() if p.is_dir()]


def test_a_full_disk_is_said_in_a_sentence(letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(corpus.Cutter, "_write", full)
    with pytest.raises(DiskFull, match="No room is left"):
        rows_of(letters, tmp_path / "rows")
    assert not [p for p in (tmp_path / "rows").iterdir() if p.is_dir()]


def test_damaged_rows_are_refused_with_their_folder(letters: Path, tmp_path: Path) -> None:
    rows = rows_of(letters, tmp_path / "rows")
    path = rows.folder / "train.npy"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UnreadableCorpus, match=f"{rows.folder.name} are damaged"):
        rows_of(letters, tmp_path / "rows")


def test_a_hub_dataset_is_streamed_and_left_once_the_rows_are_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A local folder in the hub's layout goes through the same streaming code as a dataset on the hub.
    data = tmp_path / "dataset"
    data.mkdir()
    (data / "train.jsonl").write_text("\n".join(json.dumps({"text": f"{i:05d} " + "x" * 60}) for i in range(2000)))
    monkeypatch.setattr(corpus, "STREAM_BUFFER", 10)
    monkeypatch.setattr(corpus, "BATCH_CHARS", 500)
    seen = []

    def counting(texts: list[str]) -> list[list[int]]:
        seen.extend(texts)
        return encode(texts)

    def make(folder: Path) -> Rows:
        cfg = RowsConfig(context=16, tokens=320, heldout_tokens=64)
        source = CorpusSource(location=f"hf:{data}")
        return finish(prepare_rows(source, cfg, encode=counting, row_start=START, tokenizer_fingerprint="t", folder=folder))

    rows = make(tmp_path / "rows")
    assert rows.train.shape == (20, 16)
    assert rows.heldout.shape == (4, 16)
    assert len(seen) < 50
    assert make(tmp_path / "again").fingerprint == rows.fingerprint


@pytest.mark.parametrize("location", ["hf:no/such/name", "hf:nobody/nothing"])
def test_a_dataset_that_cannot_be_had_is_said_in_a_sentence(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnknownCorpus, match="cannot be read from the hub"):
        rows_of(Path(location), tmp_path)

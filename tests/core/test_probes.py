"""Sparse probing: each step by hand or against an independent calculation, and the whole on a model that is a table."""

import argparse
import ast
import asyncio
import collections
import csv
import decimal
import email
import inspect
import json
import logging
import math
import pathlib
import random
import statistics
import subprocess
from collections.abc import Generator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_core.config import Site
from sae_core.errors import EmptyCorpus, UnknownCorpus, UnreadableCorpus
from sae_core.lens import Lens
from sae_core.probes import Probe, ProbeTexts, best_features, logistic, mean_accuracy, probe, read_texts, split, wilson
from tests.core.test_evaluate import identity_sae, made_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- its parts ----


def test_the_best_features_differ_most_in_their_means_and_ties_go_to_the_lower_index() -> None:
    truth = torch.tensor([True, True, False, False])
    x = torch.tensor([[1.0, 0.0, 9.0, 2.0], [1.0, 0.0, 9.0, 2.0], [0.0, 3.0, 9.0, 3.0], [0.0, 3.0, 9.0, 3.0]])
    assert best_features(x, truth, 4).tolist() == [1, 0, 3, 2]  # |gaps| 1, 3, 0, 1
    assert best_features(x, truth, 9).tolist() == [1, 0, 3, 2], "not more than there are"


def loss(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    sign = 2 * y.double() - 1
    return torch.log1p(torch.exp(-sign * (x @ w + b))).sum() + w.square().sum() / 2


@pytest.mark.parametrize("d", [1, 2, 5, 60])
def test_the_regression_ends_where_its_gradient_is_zero(d: int) -> None:
    """The loss is convex, so that is its minimum; autograd on the loss as written down, not as computed."""
    x, y = normal(80, d), normal(80, 1, seed=1)[:, 0] + normal(80, d)[:, 0] > 0.3
    w, b = logistic(x, y)
    w, bias = w.requires_grad_(), torch.tensor(b, dtype=torch.float64, requires_grad=True)
    loss(x, y, w, bias).backward()  # type: ignore[no-untyped-call]
    assert w.grad is not None
    assert bias.grad is not None
    assert float(w.grad.abs().max()) < 1e-5
    assert float(bias.grad.abs()) < 1e-5


def test_the_regression_beats_every_other_line_on_a_grid() -> None:
    x, y = normal(30, 1), normal(30, 1)[:, 0] + 0.5 * normal(30, 1, seed=1)[:, 0] > 0
    w, b = logistic(x, y)
    least = float(loss(x, y, w, torch.tensor(b)))
    grid = [torch.tensor(value, dtype=torch.float64) for value in torch.linspace(-6, 6, 61).tolist()]
    assert all(least <= float(loss(x, y, one[None], other)) + 1e-9 for one, other in product(grid, grid))


def test_separable_answers_still_have_finite_weights() -> None:
    w, b = logistic(torch.tensor([[-1.0], [-2.0], [1.0], [2.0]], dtype=torch.float64), torch.tensor([False, False, True, True]))
    assert 0.5 < float(w[0]) < 5
    assert b == pytest.approx(0.0, abs=1e-6)


def test_wilsons_interval_by_hand() -> None:
    """Where the true share p would put the seen share exactly 1.96 standard errors off: (s - p)^2 = z^2 p (1 - p) / n."""
    found = wilson(45, 50)
    for bound in (found.low, found.high):
        assert (0.9 - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / 50)
    assert found.mean == 0.9
    assert wilson(50, 50).high == pytest.approx(1.0)
    assert wilson(50, 50).low < 1.0


def test_the_mean_over_labels_counts_a_text_once() -> None:
    test, right = torch.arange(100), torch.arange(100) % 4 > 0
    alone = mean_accuracy([(test, right)], 100)
    half = 1.959964 * math.sqrt(0.75 * 0.25 / 100)
    assert (alone.mean, alone.low, alone.high) == pytest.approx((0.75, 0.75 - half, 0.75 + half))
    assert mean_accuracy([(test, right)] * 3, 100) == alone, "the same answers three times are no more evidence"
    apart = mean_accuracy([(test, right), (test + 100, right)], 200)
    assert apart.high - apart.mean == pytest.approx(half / math.sqrt(2)), "other texts are"


def test_halves_share_no_text_and_hold_labels_in_equal_parts() -> None:
    labels = ["a"] * 40 + ["b"] * 100 + ["c"] * 11
    train, test = split(labels, "a", ["a", "b", "c"], seed=0)
    assert not set(train.tolist()) & set(test.tolist())
    for half in (train, test):
        counts = [sum(labels[i] == name for i in half.tolist()) for name in "abc"]
        assert counts[0] == 20
        assert counts[1] in (14, 15)  # 40 others, drawn evenly: all 11 of c, 29 of b
        assert counts[2] in (5, 6)
    assert torch.equal(train, split(labels, "a", ["a", "b", "c"], seed=0)[0])
    assert not torch.equal(train, split(labels, "a", ["a", "b", "c"], seed=1)[0])


# ---- the whole ----


class Letters:
    """Stands where a Lens would: a token is a letter, its z a row of a table, whatever stands around it."""

    device = torch.device("cpu")
    row_start = 26
    table = normal(27, 4, seed=3).float()

    def __init__(self) -> None:
        self.widths: list[int] = []

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[ord(c) - ord("a") for c in text] for text in texts]

    def read_z(self, tokens: Tensor, layers: list[int]) -> dict[int, Tensor]:
        assert (tokens[:, 0] == self.row_start).all()
        self.widths.append(tokens.shape[1])
        return {layers[0]: self.table[tokens]}


def result_of(generator: Generator[int, None, Probe]) -> Probe:
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def texts_of(letters: dict[str, str], n: int = 60, noise: str = "") -> ProbeTexts:
    """`n` texts of random letters for each label."""
    draw = random.Random(1)
    made = [
        ("".join(draw.choices(pool + noise, k=draw.randint(3, 30))), label) for label, pool in letters.items() for _ in range(n)
    ]
    draw.shuffle(made)
    return ProbeTexts("letters", tuple(text for text, _ in made), tuple(label for _, label in made))


def probed(texts: ProbeTexts, sae: Any = None, **options: Any) -> Probe:
    lens: Any = Letters()
    return result_of(probe(lens, sae or identity_sae(), texts, context=32, **options))


def test_a_feature_that_knows_the_label_is_found_and_is_always_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first coordinate of z is 1 on vowels and -1 elsewhere; features 0 and 4 are its two signs."""
    table = 0.1 * Letters.table
    table[:, 0] = torch.tensor([1.0 if chr(ord("a") + i) in "aeiou" else -1.0 for i in range(27)])
    monkeypatch.setattr(Letters, "table", table)
    found = probed(texts_of({"vowels": "aeiou", "others": "bcdfg"}))
    assert [one.label for one in found.labels] == ["others", "vowels"]
    for one in found.labels:
        assert set(one.features[:2]) == {0, 4}
        assert [sparse.accuracy.mean for sparse in one.sparse] == [1.0, 1.0, 1.0]
        assert (one.majority, one.z.mean) == (0.5, 1.0)
    assert (found.majority, found.texts, found.note) == (0.5, 120, None)
    assert [(one.k, one.accuracy.mean) for one in found.sparse] == [(1, 1.0), (2, 1.0), (5, 1.0)]


def test_labels_that_mean_nothing_are_not_known() -> None:
    found = probed(texts_of({"x": "abcdefghij", "y": "abcdefghij"}, n=200))
    for accuracy in [found.z, *[one.accuracy for one in found.sparse]]:
        assert accuracy.low < 0.5 < accuracy.high or abs(accuracy.mean - 0.5) < 0.08
    assert probed(texts_of({"x": "abcdefghij", "y": "abcdefghij"}, n=200)) == found, "the same each time"


def test_an_sae_that_lost_the_label_is_told_from_z_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    table = normal(27, 4, seed=5).float()
    table[:, 3] = torch.where(torch.arange(27) < 5, 1.0, -1.0)
    monkeypatch.setattr(Letters, "table", table)
    blind = made_of(torch.cat([torch.eye(4)[:3], -torch.eye(4)[:3]]))  # sees all coordinates but the last
    found = probed(texts_of({"x": "abcde", "y": "fghij"}, noise="xyz"), blind)
    assert found.z.mean > found.sparse[0].accuracy.mean


def test_means_leave_out_row_start_sinks_and_padding() -> None:
    from sae_core.probes import _means

    lens: Any = Letters()
    far = Letters.table.norm(dim=1).median()
    sae = identity_sae(max_norm=float(far))
    texts = ProbeTexts("t", ("ab", "abcdefghijklmn", "ba", "ab"), ("x", "y", "x", "x"))
    reports = _means(lens, sae, texts, 8, 16)
    try:
        while True:
            next(reports)
    except StopIteration as end:
        f, z, labels, dropped = end.value
    assert lens.widths == [8], "cut to the context, the row start included"
    assert (labels, dropped) == (["x", "x", "y"], 1)
    for mean_f, mean_z, letters in zip(f, z, ("ab", "ba", "abcdefg"), strict=True):
        kept = [row for row in Letters.table[lens.encode([letters])[0]] if row.norm() <= far]
        assert torch.allclose(mean_z, torch.stack(kept).mean(0), atol=1e-6)
        assert torch.allclose(mean_f, torch.stack([sae.encode(row) for row in kept]).mean(0), atol=1e-6)


def test_texts_that_begin_alike_cannot_stand_in_both_halves() -> None:
    same = texts_of({"x": "abc", "y": "def"})
    twice = ProbeTexts("t", same.texts + same.texts, same.labels + same.labels)
    found = probed(twice)
    assert found.texts == len(set(same.texts))
    assert "were left out: they begin like another" in (found.note or "")


def test_too_few_labels_are_refused_in_words() -> None:
    with pytest.raises(EmptyCorpus, match="fewer than two labels have 10 texts"):
        probed(ProbeTexts("t", ("ab",) * 30, ("x", "y") * 15))


@pytest.mark.real
def test_features_of_a_real_model_know_code_from_prose(smollm2_lens: Lens) -> None:
    """Functions of the standard library against its docstrings, on SmolLM2; the SAE is z's coordinates and their opposites."""
    code, prose = [], []
    for module in (argparse, ast, asyncio, collections, csv, decimal, email, logging, pathlib, statistics, subprocess):
        for thing in [one for one in vars(module).values() if inspect.isclass(one) or inspect.isfunction(one)]:
            if inspect.isfunction(thing) and not thing.__doc__:
                code.append(inspect.getsource(thing))
            elif isinstance(thing.__doc__, str) and len(thing.__doc__) > 80:
                prose.append(inspect.cleandoc(thing.__doc__))
    draw = random.Random(0)
    texts = [(text, "code") for text in sorted(set(code))] + [(text, "prose") for text in sorted(set(prose))]
    draw.shuffle(texts)
    kept = [one for label in ("code", "prose") for one in [pair for pair in texts if pair[1] == label][:40]]
    d_in = smollm2_lens.info.d_in
    basis = torch.cat([torch.eye(d_in), -torch.eye(d_in)])
    sae = made_of(basis, n_heads=smollm2_lens.info.n_heads, d_head=smollm2_lens.info.d_head, site=Site(layer=8))
    found = result_of(probe(smollm2_lens, sae, ProbeTexts("stdlib", *zip(*kept, strict=True)), context=33))
    assert found.majority < 0.6
    assert found.z.mean > 0.85, "z knows it"
    assert found.sparse[-1].accuracy.low > 0.6, "five coordinates know most of it"


# ---- reading ----


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return path


def test_a_jsonl_file_and_a_folder_give_the_same_texts(tmp_path: Path) -> None:
    records = [{"text": f"{label} number {i}", "label": label} for label in ("en", "de") for i in range(15)]
    folder = tmp_path / "texts"
    for i, record in enumerate(records):
        (folder / record["label"]).mkdir(parents=True, exist_ok=True)
        (folder / record["label"] / f"{i:03}.txt").write_text(record["text"])
    (folder / "de" / "notes.pdf").write_bytes(b"\xff\xfe")
    a, b = read_texts(lines(tmp_path / "texts.jsonl", records)), read_texts(folder)
    assert (a.name, b.name) == ("texts.jsonl", "texts")
    assert (a.texts, a.labels) == (b.texts, b.labels)
    assert sorted(a.texts) == sorted(record["text"] for record in records)


def test_fields_can_be_named_and_labels_need_not_be_text(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", [{"body": f"{i}", "year": 2000 + i % 2} for i in range(40)])
    assert set(read_texts(path, field="body", label="year").labels) == {"2000", "2001"}


def test_a_draw_is_fair_and_small_labels_are_left_out(tmp_path: Path) -> None:
    records = [{"text": f"{label}{i}", "label": label} for label, n in (("a", 300), ("b", 40), ("c", 9)) for i in range(n)]
    found = read_texts(lines(tmp_path / "x.jsonl", records), per_label=50)
    assert {label: found.labels.count(label) for label in set(found.labels)} == {"a": 50, "b": 40}
    assert found == read_texts(tmp_path / "x.jsonl", per_label=50)
    assert {f"a{i}" for i in range(50)} != {text for text in found.texts if text[0] == "a"}, "not just the first ones"


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (
            '{"text": "x", "label": "a"}\n{"text": "y"}',
            UnreadableCorpus,
            "Line 2 of .* is no object with a text in 'text' and a label",
        ),
        ('{"text": 3, "label": "a"}', UnreadableCorpus, "Line 1 of"),
        ("[1]", UnreadableCorpus, "Line 1 of"),
        ("not json", UnreadableCorpus, "cannot be read as jsonl"),
        ("\xff\xfe".encode("latin-1"), UnreadableCorpus, "cannot be read as jsonl"),
        ("", EmptyCorpus, "has 0 labels with 10 different texts"),
        ('{"text": "x", "label": "a"}\n' * 50, EmptyCorpus, "has 0 labels"),
    ],
)
def test_bad_files_are_refused_in_words(tmp_path: Path, content: str | bytes, error: type[Exception], said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=said):
        read_texts(path)


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownCorpus, match=r"There is no file or folder .*missing"):
        read_texts(tmp_path / "missing")

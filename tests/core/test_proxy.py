"""Proxies against brute force: what holds where, and which texts are refused."""

import re
from collections.abc import Callable

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from sae_core.config import InductionProxy, Proxy, RegexProxy, TokensProxy, said
from sae_core.errors import UsageError
from sae_core.lens import Lens
from sae_core.studies.proxy import (
    NOBODY,
    Proxies,
    ending,
    fuzzy_classes,
    next_by_induction,
    ordinary_tokens,
    prefix_lengths,
    text_matches,
    token_ids,
)

TinyLens = Callable[[str], Lens]


def classes(rows: int = 6, length: int = 30, n: int = 5, seed: int = 0) -> Tensor:
    """Few classes, so that everything repeats; the first of a row is like no other, and so are some within."""
    drawn = torch.randint(0, n, (rows, length), generator=torch.Generator().manual_seed(seed))
    drawn[:, 0] = NOBODY
    drawn[drawn == n - 1] = NOBODY
    return drawn


def test_next_by_induction_is_what_loops_over_all_pairs_find() -> None:
    found = classes(seed=1)
    wanted = torch.rand(found.shape, generator=torch.Generator().manual_seed(2)) < 0.2
    expected = torch.zeros_like(wanted)
    for b, row in enumerate(found.tolist()):
        for d in range(len(row)):
            expected[b, d] = any(wanted[b, s] and row[s - 1] == row[d] != NOBODY for s in range(1, d + 1))
    assert torch.equal(next_by_induction(found, wanted), expected)
    assert 0.1 < expected.float().mean() < 0.9


def test_prefix_lengths_are_what_walking_back_finds() -> None:
    found = classes(n=3, seed=3)
    lengths = prefix_lengths(found, 4)
    assert lengths.shape == (6, 30, 30)
    assert lengths.dtype == torch.int8
    for b, row in enumerate(found.tolist()):
        for d in range(30):
            for s in range(30):
                p = 0
                while s < d and p < 4 and p + 1 <= d - s + 1 and s - 1 - p >= 0 and row[s - 1 - p] == row[d - p] != NOBODY:
                    p += 1
                assert lengths[b, d, s] == p, (b, d, s)
    assert set(lengths.unique().tolist()) == {0, 1, 2, 3, 4}


def test_a_run_of_one_token_is_no_long_prefix_of_itself() -> None:
    run = torch.tensor([[NOBODY, 7, 7, 7, 7, 7, 7, 7, 7]])
    lengths = prefix_lengths(run, 8)
    assert lengths[0, 8].tolist() == [0, 0, 1, 2, 3, 4, 3, 2, 0]  # s = 5 has four tokens before it; nearer ones would overlap


@pytest.mark.parametrize("pattern", ["b", "a+", "^a", "(?i)B$", "(?<=a)b", "b(?=a)", "a b", r"(a|b)\s\1", "(?x) a  # one\n b"])
def test_a_pattern_matches_where_the_text_cut_off_there_ends_with_it(pattern: str) -> None:
    texts = ["<start>", "a", "b", " a", " b", "ba", "ab", " B", "a b", " a", " a"]
    flags = re.match(r"\(\?[a-z]+\)", pattern)
    cut = flags.end() if flags else 0
    expected = [False]
    for i in range(1, len(texts)):
        so_far = "".join(texts[1 : i + 1])
        expected.append(any(m.end() == len(so_far) for m in _all_matches(pattern, cut, so_far)))
    assert text_matches(texts, ending(pattern)) == expected
    assert any(expected) or pattern in ("b(?=a)",)


def _all_matches(pattern: str, cut: int, text: str) -> list[re.Match[str]]:
    """Every match from every start to the text's end, asked one by one."""
    verbose = "x" in pattern[:cut]
    compiled = re.compile(f"{pattern[:cut]}(?:{pattern[cut:]}{chr(10) if verbose else ''})")
    return [m for start in range(len(text) + 1) if (m := compiled.fullmatch(text, start))]


def test_proxies_are_joined_by_and_and_can_be_negated(tiny_lens: TinyLens) -> None:
    lens = tiny_lens("llama")
    row = lens.encode([" the cat the mat the cat The"])[0]
    tokens = torch.tensor([[lens.row_start, *row]])
    texts = lens.token_texts(tokens[0].tolist())
    the = torch.tensor([[text == " the" for text in texts]])
    assert torch.equal(Proxies([TokensProxy(texts=(" the",))], lens).hold(tokens), the)
    assert torch.equal(Proxies([TokensProxy(texts=(" the",), negated=True)], lens).hold(tokens), ~the)
    ends = torch.tensor([["cat" in "".join(texts[1 : i + 1])[-3:] for i in range(len(texts))]])
    assert torch.equal(Proxies([RegexProxy(pattern="cat")], lens).hold(tokens), ends)
    assert ends.sum() == 2
    both = Proxies([TokensProxy(texts=(" the",)), RegexProxy(pattern="mat the")], lens).hold(tokens)
    assert both.sum() == 1
    on_token = Proxies([RegexProxy(pattern="^[tT]", on="token")], lens).hold(tokens)
    assert torch.equal(on_token, torch.tensor([[text[:1] in ("t", "T") for text in texts]]))


def test_induction_compares_the_token_fuzzily_and_what_follows_exactly(tiny_lens: TinyLens) -> None:
    lens = tiny_lens("llama")
    ids = {text: i for i, text in enumerate(lens.token_texts(range(lens.info.d_vocab)))}
    row = ["t", "cat", " t", "a", "T", "h"]  # T follows an earlier t, which was followed by cat
    tokens = torch.tensor([[lens.row_start, *(ids[text] for text in row)]])
    held = Proxies([InductionProxy(texts=("cat",))], lens).hold(tokens)[0].tolist()
    assert held == [False, False, False, True, False, True, False]
    assert not Proxies([InductionProxy(texts=("h",))], lens).hold(tokens).any(), "h was never followed by anything"


def test_classes_tell_forms_of_a_word_together_and_row_starts_apart(tiny_lens: TinyLens) -> None:
    lens = tiny_lens("llama")
    found = fuzzy_classes(lens)
    ids = {text: i for i, text in enumerate(lens.token_texts(range(lens.info.d_vocab)))}
    assert found[ids["t"]] == found[ids["T"]] == found[ids[" t"]] != found[ids["h"]]
    assert found[lens.row_start] == NOBODY
    assert (found[1:] >= 0).all()
    assert lens.row_start not in ordinary_tokens(lens)
    assert max(ordinary_tokens(lens)) < lens.info.d_vocab - 1, "the vocabulary is padded, and padding stands for no text"


def test_a_text_that_is_no_single_token_is_refused_with_how_it_splits(tiny_lens: TinyLens) -> None:
    lens = tiny_lens("llama")
    assert len(token_ids(lens, ["cat", " the"], field="tokens")) == 2
    with pytest.raises(UsageError, match="'cats' is no single token of llama: it is split into 'cat', 's'; name single tokens"):
        token_ids(lens, ["cat", "cats"], field="tokens")
    with pytest.raises(UsageError, match="'' is no single token of llama: no token has just this text"):
        Proxies([InductionProxy(texts=("",))], lens)


def test_configs_refuse_what_cannot_be_a_proxy_and_say_the_rest_in_words() -> None:
    adapter: TypeAdapter[Proxy] = TypeAdapter(Proxy)
    for wrong, words in (
        ({"kind": "tokens", "texts": []}, "at least 1 item"),
        ({"kind": "regex", "pattern": ""}, "at least 1 character"),
        (
            {"kind": "regex", "pattern": "a(b"},
            r"'a\(b' is no regular expression at character 2: missing \), unterminated subpattern",
        ),
        ({"kind": "psychic"}, "does not match any of the expected tags"),
    ):
        with pytest.raises(ValidationError, match=words):
            adapter.validate_python(wrong)
    proxies = (
        TokensProxy(texts=(" board", "Board")),
        RegexProxy(pattern="[0-9]$", negated=True),
        RegexProxy(pattern="x", on="token"),
        InductionProxy(texts=(" b",)),
    )
    assert said(proxies) == (
        "the token is ' board' or 'Board' and not (the text so far ends with /[0-9]$/) and the token matches /x/ "
        "and ' b' is next by induction"
    )

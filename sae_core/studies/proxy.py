"""Proxies: conditions on a token and what stands before it, which a feature can be held against.

A proxy is what a person thinks that a feature stands for, in a form that can be checked on every token (Kissane et al. 2024 did
it with "' board' is next by induction"). Several are joined by and; each can be negated.

    tokens      the token is one of a set
    regex       a match ends where the row's text, up to and including the token, ends; or the token's own text matches
    induction   X is next by induction: the token stood earlier in the row, followed by X. "The token" is fuzzy, as in the
                paper: with or without a leading space, in upper or lower case; X is exact, or one of a set
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_core.config import InductionProxy, Proxy, RegexProxy, TokensProxy
from sae_core.errors import UsageError
from sae_core.token_texts import plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_core.lens import Lens

    Condition = Callable[[Tensor], Tensor]

FLAGS = re.compile(r"\(\?([aimsux]+)\)")
NOBODY = -1
"""The class of a token that is like no other, not even itself: a row start, which says nothing about the text."""


class Proxies:
    """Proxies, ready for the rows of one model. Raises UsageError where a text is no single token of it."""

    def __init__(self, proxies: Sequence[Proxy], lens: "Lens") -> None:
        self.conditions: list[tuple[Condition, bool]] = [(_condition(proxy, lens), proxy.negated) for proxy in proxies]

    def hold(self, tokens: Tensor) -> Tensor:
        """Whether all of them hold, for each token of rows [b, pos] (on the CPU): bool [b, pos]."""
        held = torch.ones(tokens.shape, dtype=torch.bool)
        for condition, negated in self.conditions:
            held &= condition(tokens) ^ negated
        return held


def _condition(proxy: Proxy, lens: "Lens") -> "Condition":
    if isinstance(proxy, RegexProxy):
        return _on_token(proxy.pattern, lens) if proxy.on == "token" else partial(_text_matches, pattern=proxy.pattern, lens=lens)
    wanted = torch.zeros(lens.info.d_vocab, dtype=torch.bool)
    wanted[token_ids(lens, proxy.texts, field=proxy.kind)] = True
    if isinstance(proxy, TokensProxy):
        return lambda tokens: wanted[tokens]
    assert isinstance(proxy, InductionProxy)
    classes = fuzzy_classes(lens)
    return lambda tokens: next_by_induction(classes[tokens], wanted[tokens])


# ---------------------------------------------------------------------------------------------------------------- tokens


def vocabulary(lens: "Lens") -> list[str]:
    """The text of every id of the model."""
    return lens.token_texts(range(lens.info.d_vocab))


def ordinary_tokens(lens: "Lens") -> list[int]:
    """Ids that stand for text: not the row start, nor an id that the tokenizer does not know."""
    return [i for i, text in enumerate(vocabulary(lens)) if i != lens.row_start and text != f"<id {i}>"]


def token_ids(lens: "Lens", texts: Sequence[str], *, field: str) -> list[int]:
    """The ids of tokens with these texts, just as pages show them; UsageError says how a text that is no token is split."""
    known: dict[str, list[int]] = {}
    for i, text in enumerate(vocabulary(lens)):
        known.setdefault(text, []).append(i)
    found: list[int] = []
    for text in texts:
        if text not in known:
            parts = lens.token_texts(lens.encode([text])[0])
            how = f"it is split into {', '.join(map(repr, parts))}" if len(parts) > 1 else "no token has just this text"
            raise UsageError(f"{text!r} is no single token of {lens.info.name}: {how}; name single tokens.", field=field)
        found += known[text]
    return found


def fuzzy_classes(lens: "Lens") -> Tensor:
    """int64 [d_vocab]: equal for tokens that count as the same; NOBODY for the row start, which is like no other."""
    numbers: dict[str, int] = {}
    classes = torch.tensor([numbers.setdefault(plain(text), len(numbers)) for text in vocabulary(lens)])
    classes[lens.row_start] = NOBODY
    return classes


# ------------------------------------------------------------------------------------------------------------- induction


def next_by_induction(classes: Tensor, wanted: Tensor) -> Tensor:
    """Where a wanted token is next by induction: bool [b, pos], from classes [b, pos] and whether each token is wanted.

    True at d where some s <= d has a wanted token with classes[s - 1] = classes[d] before it. Wanted tokens are few, so each is
    taken with all that it speaks for rather than every d with every s.
    """
    length = classes.shape[1]
    row, s = wanted[:, 1:].nonzero(as_tuple=True)
    s = s + 1  # nothing stands before the row's first token
    before = classes[row, s - 1]
    row, s, before = (part[before != NOBODY] for part in (row, s, before))
    found = torch.zeros(classes.shape, dtype=torch.int32)
    for at in torch.split(torch.arange(len(row)), max(1, 2**22 // length)):
        same = (classes[row[at]] == before[at, None]) & (torch.arange(length) >= s[at, None])
        found.index_add_(0, row[at], same.int())
    return found > 0


def prefix_lengths(classes: Tensor, longest: int) -> Tensor:
    """How long a prefix each (destination, source) pair repeats: int8 [b, dest, src], at most `longest`; 0 for most.

    The length at (d, s) is the largest p with classes[s - 1 - i] = classes[d - i] for all i < p: the p tokens before the source
    are the last p up to the destination. A source is before its destination (s < d), and the two copies do not overlap
    (p <= d - s + 1), else a run of one token would count as a long prefix of itself.
    """
    length = classes.shape[1]
    place = torch.arange(length)
    distance = place[:, None] - place  # [dest, src]
    like = torch.zeros(len(classes), length, length, dtype=torch.bool)
    like[:, :, 1:] = (classes[:, :, None] == classes[:, None, :-1]) & (classes[:, :, None] != NOBODY)
    like &= distance > 0
    found, whole = like.to(torch.int8), like
    for p in range(2, longest + 1):
        # One further back on both sides: the pair (d - 1, s - 1) must go on for p - 1.
        whole = like & torch.nn.functional.pad(whole, (1, 0, 1, 0))[:, :-1, :-1] & (distance + 1 >= p)
        found += whole.to(torch.int8)
    return found


# ----------------------------------------------------------------------------------------------------------------- regex


def ending(pattern: str) -> re.Pattern[str]:
    """The expression, made to match only where a text ends."""
    flags = FLAGS.match(pattern)
    start = flags.end() if flags else 0
    # Flags must stay in front; a comment of a verbose expression must not swallow what we add.
    close = "\n)" if flags and "x" in flags[1] else ")"
    return re.compile(f"{pattern[:start]}(?:{pattern[start:]}{close}\\Z")


def text_matches(texts: Sequence[str], pattern: re.Pattern[str]) -> list[bool]:
    """For each token of a row, by the texts of its tokens, whether the row's text up to its end matches; False for the first,
    which is the row start and no text."""
    text, end = "".join(texts[1:]), 0
    found = [False]
    for token in texts[1:]:
        end += len(token)
        found.append(pattern.search(text, 0, end) is not None)  # the text is taken to end there, lookaheads included
    return found


def _text_matches(tokens: Tensor, pattern: str, lens: "Lens") -> Tensor:
    compiled = ending(pattern)
    return torch.tensor([text_matches(lens.token_texts(row), compiled) for row in tokens.tolist()])


def _on_token(pattern: str, lens: "Lens") -> "Condition":
    compiled = re.compile(pattern)
    matches = torch.tensor([compiled.search(text) is not None for text in vocabulary(lens)])
    return lambda tokens: matches[tokens]

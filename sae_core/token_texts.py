"""What the texts of tokens say: which are the same word, and which comes after which."""

import re

NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
WEEKDAYS = "monday tuesday wednesday thursday friday saturday sunday"
MONTHS = "january february march april may june july august september october november december"
ROMAN = "i ii iii iv v vi vii viii ix x xi xii xiii xiv xv xvi xvii xviii xix xx"


def _places(words: list[str]) -> dict[str, int]:
    return {word: place for place, word in enumerate(words)}


SEQUENCES: dict[str, dict[str, int]] = {
    "number word": _places([*NUMBERS.split(), "eighteen", "nineteen", "twenty"]),
    "ordinal": _places(ORDINALS.split()),
    "weekday": _places(WEEKDAYS.split()),
    "short weekday": _places([day[:3] for day in WEEKDAYS.split()]),
    "month": _places(MONTHS.split()),
    "short month": _places([month[:3] for month in MONTHS.split()]),
    "letter": _places(list("abcdefghijklmnopqrstuvwxyz")),
    "roman numeral": _places(ROMAN.split()),
}
"""Things that are said in order; those of `CYCLES` begin again."""
CYCLES = {"weekday": 7, "short weekday": 7, "month": 12, "short month": 12}


def plain(text: str) -> str:
    """The word that a token's text is a form of: one leading space and capitals do not count, as Kissane et al. compare.

    White space alone stays as it is: it has no other form.
    """
    return text.removeprefix(" ").casefold() if text.strip(" ") else text


def sequence_places(text: str) -> dict[str, int]:
    """The sequences that a token is in, and its place in each: `may` is a month, `I` a letter and a Roman numeral."""
    word = plain(text)
    found = {name: members[word] for name, members in SEQUENCES.items() if word in members}
    if number := re.fullmatch(r"([0-9]{1,4})(st|nd|rd|th)?", word):
        found["number" if number[2] is None else "ordinal number"] = int(number[1])
    return found


def next_place(sequence: str, place: int) -> int:
    """The place after `place`."""
    return (place + 1) % CYCLES[sequence] if sequence in CYCLES else place + 1


def promoted_successor(text: str, promoted: list[str]) -> int | None:
    """Where in `promoted` (strongest first) the token stands that comes after `text`; None unless it is the first there of
    its sequence. A direction that promotes all weekdays alike is about weekdays, not about what comes next."""
    for sequence, place in sequence_places(text).items():
        for rank, other in enumerate(promoted):
            there = sequence_places(other).get(sequence)
            if there is not None:
                if there == next_place(sequence, place):
                    return rank
                break
    return None

"""A document's text is found in what is stored however it was cut, packed and quoted, and little else is."""

import random

from server.store.redact import REMOVED, Matcher, words

DRAW = random.Random(3)
VOCABULARY = [f"w{n:x}" for n in range(900)]
START = "<|endoftext|>"


def document(n: int) -> list[str]:
    return [f" {DRAW.choice(VOCABULARY)}" for _ in range(n)]


def cut(documents: list[list[str]], width: int) -> list[tuple[list[str], list[int | None]]]:
    """Rows as the corpus cuts them, each with the document of every token, written anew from its description."""
    rows, left = [], [(None, [])]
    left = []
    for number, tokens in enumerate(documents):
        whole = len(tokens) // width * width
        rows += [([START, *tokens[i : i + width]], [None] + [number] * width) for i in range(0, whole, width)]
        tail = [(token, number) for token in tokens[whole:]]
        if tail:
            left += ([(START, None)] if left else []) + tail
            while len(left) >= width:
                rows.append(([START, *(t for t, _ in left[:width])], [None, *(d for _, d in left[:width])]))
                left = left[width:]
    return rows


def test_whole_rows_tails_and_seams_are_found_and_no_other_document_is() -> None:
    documents = [document(DRAW.randint(5, 90)) for _ in range(300)]
    gone = {3, 17, 40, 41, 120, 200, 299}
    matcher = Matcher("".join(documents[n]) for n in gone)
    missed = taken = 0
    for texts, owner in cut(documents, 31):
        for was, now, of in zip(texts, matcher.tokens(texts, packed=True), owner, strict=True):
            assert was != START or now == START
            if of in gone:
                missed += now != REMOVED
            else:
                taken += now == REMOVED
    total = sum(len(documents[n]) for n in gone)
    assert taken == 0
    assert missed <= 0.04 * total, f"{missed} of {total}: only what is left of one or two words at a seam"


def test_words_are_compared_whatever_their_case_form_and_cut() -> None:
    text = "Dear Ms. Ångström,\n the parcel No 7 was DELIVERED to the ﬁrst floor; 北京大学的图书馆 is far."
    matcher = Matcher([text])
    assert matcher.tokens([START, "…nothing", " of", " it"], packed=True) == [START, "…nothing", " of", " it"]
    cut_ = [
        START,
        "Dear",
        " Ms",
        ".",
        " <0xC3>",
        "<0x85>",
        "ngström",
        ",\n",
        " the par",
        "cel No",
        " 7 was",
        " delivered",
        " to",
        ".",
    ]
    assert set(matcher.tokens(cut_, packed=True)[1:]) == {REMOVED}
    assert [word for word, _ in words("ﬁrst 北京 ÅB")] == ["first", "北", "京", "åb"]
    quoted = matcher.text('She wrote "the parcel No 7 was delivered to the first floor" — why?')
    assert quoted == f'She wrote "{REMOVED}" — why?'


def test_short_documents_are_found_whole_and_what_is_common_is_left() -> None:
    matcher = Matcher(["Nobody knew why"])
    assert matcher.tokens([START, "No", "body", " knew", " why", START, " other", " words"], packed=True) == [
        START, *[REMOVED] * 4, START, " other", " words",
    ]  # fmt: skip
    assert matcher.text("and nobody knew what") == "and nobody knew what"
    assert Matcher(["", "  ", "…"]).text("anything …") == "anything …"


def test_json_is_searched_to_its_leaves() -> None:
    matcher = Matcher(["one two three four five six seven eight nine"])
    found = matcher.json({"n": 3, "texts": ["one", " two", " three four", " five six seven eight"], "note": "x one two"})
    assert found == {"n": 3, "texts": [REMOVED] * 4, "note": "x one two"}

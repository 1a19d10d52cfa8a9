"""What people write, before it is stored: lengths, and no character that a page or a database could not hold."""

import unicodedata

from sae_core.errors import UsageError

LONGEST_AUTHOR = 60
LONGEST_LABEL = 200
LONGEST_TITLE = 120
LONGEST_TEXT = 10_000


def one_line(text: str, what: str, longest: int, *, field: str, empty: bool = False) -> str:
    """`text` as one line, its white space made single spaces. UsageError when it is too long, holds a control character, or
    has nothing that can be seen, unless it may be `empty`."""
    return _checked(" ".join(text.split()), what, longest, field, empty)


def many_lines(text: str, what: str, longest: int = LONGEST_TEXT, *, field: str, empty: bool = False) -> str:
    """`text` with its lines, which end in one character however the browser sent them; checked as `one_line` does."""
    return _checked(text.replace("\r\n", "\n").replace("\r", "\n").strip(), what, longest, field, empty)


def author_name(text: str) -> str:
    """The name that somebody signs with."""
    return one_line(text, "name", LONGEST_AUTHOR, field="author")


def _checked(text: str, what: str, longest: int, field: str, empty: bool) -> str:
    text = unicodedata.normalize("NFC", text)
    control = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"), None)
    if control is not None:
        raise UsageError(f"The {what} holds the control character U+{ord(control):04X}; take it out.", field=field)
    if len(text) > longest:
        raise UsageError(f"That {what} has {len(text)} characters; at most {longest} are kept.", field=field)
    # Zero-width characters alone would make a link that nobody sees.
    if not any(unicodedata.category(c)[0] not in "CZM" for c in text) and (text or not empty):
        raise UsageError(f"The {what} is empty; type something.", field=field)
    return text

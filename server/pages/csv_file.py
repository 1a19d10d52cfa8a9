"""A table as a CSV file, sent as it is read, and safe to open in a spreadsheet."""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence

from starlette.responses import StreamingResponse

ROWS_AT_ONCE = 200


def csv_stream(name: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> StreamingResponse:
    """`rows` as the file `name`.csv; an empty cell is a value that is not known."""
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "headscope"
    headers = {"Content-Disposition": f'attachment; filename="{kept}.csv"', "Cache-Control": "private, no-cache"}
    return StreamingResponse(_lines(header, rows), 200, headers, media_type="text/csv; charset=utf-8")


def _lines(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(header)
    for number, row in enumerate(rows, 1):
        writer.writerow([cell(value) for value in row])
        if number % ROWS_AT_ONCE == 0:
            yield text.getvalue()
            text.seek(0)
            text.truncate()
    yield text.getvalue()


def cell(value: object) -> object:
    """Text that a spreadsheet would take for a formula gets an apostrophe before it, and a NUL is shown by its sign."""
    if not isinstance(value, str):
        return value
    text = value.replace("\0", "\u2400")
    return f"'{text}" if text.lstrip(" \u00a0").startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text

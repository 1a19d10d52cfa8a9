"""examples hold their numbers in two packed columns; the worst gap of a part beside its mark

Every example is packed anew, from both layouts that there were: plain arrays, told by a filled `dropped`; and codes of 12 bits
with places in steps of 4 bits. Going back writes plain arrays.
"""

from collections.abc import Iterator
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import numpy as np
import sqlalchemy as sa
from alembic import op
from numpy.typing import NDArray

from server.packing import F4, pack, pack_acts, pack_dfa, read_acts, read_dfa

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

AT_ONCE = 1000
ACTS = np.dtype([("pos", "<u2"), ("value", "<f4")])
DFA = np.dtype([("src", "<u2"), ("head", "u1"), ("value", "<f4")])
CODED_ACTS = np.dtype([("n", "<u2"), ("top", "<f4")])
CODED_DFA = np.dtype([("n_heads", "u1"), ("before", "u1"), ("n", "<u2"), ("top", "<f4"), ("rest", "<f4")])
GONE = {"preact": sa.Double(), "bias": sa.Double(), "gap": sa.Double(), "abs_dfa": sa.Double()}
GONE_BYTES = ("dropped", "before")

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def upgrade() -> None:
    op.add_column("harvest_part", sa.Column("worst_gap", sa.Double(), nullable=True))
    op.execute(
        "update harvest_part set worst_gap = (select max(example.gap) from example join feature on feature.id = example.feature_id "
        "where feature.harvest_id = harvest_part.harvest_id) where harvest_part.part = 'features'"
    )
    for found in _examples("id, start, dest, act, preact, bias, abs_dfa, acts, dfa, dropped, before"):
        for _, group in groupby(sorted(map(_old, found), key=_heads), key=_heads):
            old = list(group)
            packed = zip(old, pack_acts(old), pack_dfa(old), strict=True)
            _write(
                "update example set acts = :acts, dfa = :dfa where id = :id",
                [{"id": one.id, "acts": acts, "dfa": dfa} for one, acts, dfa in packed],
            )
    with op.batch_alter_table("example") as batch:
        for name in (*GONE, *GONE_BYTES):
            batch.drop_column(name)
    op.execute("update head_summary set diversity = null")  # was a share of 1 for every head; says something else now
    _feature_head_anew(with_rowid=False)


def downgrade() -> None:
    with op.batch_alter_table("example") as batch:
        for name, kind in GONE.items():
            batch.add_column(sa.Column(name, kind, nullable=False, server_default="0"))
        for name in GONE_BYTES:
            batch.add_column(sa.Column(name, sa.LargeBinary(), nullable=False, server_default=sa.text("''")))
    for found in _examples("id, start, dest, act, acts, dfa"):
        _write(
            "update example set acts = :acts, dfa = :dfa, dropped = :dropped, before = :before, preact = :preact, bias = :bias, "
            "gap = :gap, abs_dfa = :abs_dfa where id = :id",
            [{"id": row.id, **_plain(row)} for row in found],
        )
    op.drop_column("harvest_part", "worst_gap")
    _feature_head_anew(with_rowid=True)


def _examples(columns: str) -> Iterator[list[sa.Row[Any]]]:
    """All examples, some at a time; the list of ids first, since the rows change meanwhile."""
    connection, id = op.get_bind(), sa.column("id")
    wanted = [sa.column(name) for name in columns.split(", ")]
    ids = connection.execute(sa.text("select id from example order by id")).scalars().all()
    for begin in range(0, len(ids), AT_ONCE):
        low, high = ids[begin], ids[begin : begin + AT_ONCE][-1]
        found = sa.select(*wanted).select_from(sa.table("example")).where(id.between(low, high)).order_by(id)
        yield list(connection.execute(found))


def _write(statement: str, rows: list[dict[str, object]]) -> None:
    op.get_bind().execute(sa.text(statement), rows)


def _feature_head_anew(*, with_rowid: bool) -> None:
    if op.get_bind().dialect.name == "sqlite":
        with op.batch_alter_table("feature_head", recreate="always", table_kwargs={"sqlite_with_rowid": with_rowid}):
            pass


# ---- the layouts before ----


def _old(row: sa.Row[Any]) -> Any:
    """The example as `pack_acts` and `pack_dfa` take it."""
    acts_pos, acts_value = _old_acts(row)
    if row.dropped:
        entries = np.frombuffer(row.dfa, DFA)
        src, head, value = entries["src"].astype(np.int64), entries["head"].astype(np.int64), entries["value"].astype(np.float64)
        dropped, before = (np.frombuffer(blob, F4).astype(np.float64) for blob in (row.dropped, row.before))
    else:
        src, head, value, dropped, before = _coded_dfa(row)
    return SimpleNamespace(
        id=row.id, start=row.start, dest=row.dest, preact=row.preact, bias=row.bias, abs_dfa=row.abs_dfa, acts_pos=acts_pos,
        acts_value=acts_value, dfa_src=src, dfa_head=head, dfa_value=value, dropped=dropped, before=before,
    )  # fmt: skip


def _heads(example: Any) -> int:
    return len(example.dropped)


def _old_acts(row: sa.Row[Any]) -> tuple[Ints, Floats]:
    if row.dropped:
        plain = np.frombuffer(row.acts, ACTS)
        return plain["pos"].astype(np.int64), plain["value"].astype(np.float64)
    if not row.acts:
        return np.array([row.dest]), np.array([row.act])
    header = np.frombuffer(row.acts, CODED_ACTS, 1)[0]
    values, end = _codes(row.acts, CODED_ACTS.itemsize, int(header["n"]), float(header["top"]))
    pos, value = np.append(row.start + _steps(row.acts, end), row.dest), np.append(values, row.act)
    order = np.argsort(pos)
    return pos[order], value[order]


def _coded_dfa(row: sa.Row[Any]) -> tuple[Ints, Ints, Floats, Floats, Floats]:
    header = np.frombuffer(row.dfa, CODED_DFA, 1)[0]
    n_heads = int(header["n_heads"])
    n_rests = n_heads * (1 + int(header["before"]))
    values, end = _codes(row.dfa, CODED_DFA.itemsize, n_rests + int(header["n"]), float(header["top"]))
    dropped, value = values[:n_heads], values[n_rests:]
    before = values[n_heads:n_rests] if n_rests > n_heads else np.zeros(n_heads)
    dropped[np.abs(dropped).argmax()] += float(header["rest"])
    head, src = np.divmod(_steps(row.dfa, end), row.dest - row.start + 1)
    return src + row.start, head, value, dropped, before


def _codes(blob: bytes, offset: int, n: int, top: float) -> tuple[Floats, int]:
    """Numbers of 12 bits, two in three bytes, and where they end: a sign and 11 bits of 128 log2(|value| / top)."""
    size = (n + 1) // 2 * 3
    raw = np.frombuffer(blob, np.uint8, size, offset).astype(np.int64)
    codes = np.stack([raw[0::3] | (raw[1::3] & 15) << 8, raw[1::3] >> 4 | raw[2::3] << 4], 1).ravel()[:n]
    sign, level = np.where(codes > 2047, -1.0, 1.0), np.where(codes > 2047, codes - 2048, codes)
    return np.where(level > 0, sign * top * np.exp2((level - 2047) / 128), 0.0), offset + size


def _steps(blob: bytes, offset: int) -> Ints:
    """Places: s < 15 is one s + 1 after the last, 15 passes 15 over and marks none."""
    raw = np.frombuffer(blob, np.uint8, offset=offset)
    steps = np.stack([raw & 15, raw >> 4], 1).ravel().astype(np.int64)
    found: Ints = (np.cumsum(steps + (steps != 15)) - 1)[steps != 15]
    return found


def _plain(row: Any) -> dict[str, object]:
    acts, dfa = read_acts(row), read_dfa(row)
    return {
        "acts": np.rec.fromarrays([acts.pos, acts.value], dtype=ACTS).tobytes(),
        "dfa": np.rec.fromarrays([dfa.src, dfa.head, dfa.value], dtype=DFA).tobytes(),
        "dropped": pack(dfa.dropped, F4),
        "before": pack(dfa.before, F4),
        "preact": dfa.preact,
        "bias": dfa.bias,
        "gap": dfa.gap,
        "abs_dfa": dfa.abs_dfa,
    }

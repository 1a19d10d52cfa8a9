"""Migrations keep what is there: a database of an older version, filled, then upgraded and taken back."""

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from server.db import _versions
from server.packing import read_acts, read_dfa
from server.resources import resource_path

FILLED = {
    "model": "insert into model (id, name, source, created_at) values (1, 'm', '{}', '2026-01-01')",
    "corpus": "insert into corpus (id, name, source, licences, created_at) values (1, 'c', '{}', '[]', '2026-01-01')",
    "sae": "insert into sae (id, name, model_id, layer, hook, arch, d_in, d_sae, k, n_heads, config, metrics, folder, sha256, "
    "run, harvest_id, created_at) values (1, 's', 1, 0, 'h', 'topk', 8, 16, 4, 2, '{}', '{}', 'f', 'x', 0, 1, '2026-01-01')",
    "harvest": "insert into harvest (id, sae_id, corpus_id, job_id, config, status, n_tokens, n_rows, n_live, n_examples, "
    "context, created_at) values (1, 1, 1, 'j', '{}', 'published', 1, 1, 1, 0, 8, '2026-01-01')",
    "feature": "insert into feature (id, harvest_id, idx, n_fired, density, max_act, mean_act, top_head, top_head_share, "
    "shuffle_key) values (1, 1, 0, 1, 0.5, 1, 1, 0, 1, 7)",
    "feature_detail": "insert into feature_detail (feature_id, histogram, bands, head_norm, head_dfa, head_dfa_std, promoted, "
    "suppressed, neighbours, evidence) values (1, '{}', '[]', x'00', x'00', x'00', '[]', '[]', '[]', '{}')",
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    made = Config()
    made.set_main_option("script_location", str(resource_path("migrations")))
    made.attributes["url"] = sa.make_url(f"sqlite:///{tmp_path / 'old.db'}")
    return made


def counted(path: Path) -> dict[str, int]:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("pragma foreign_key_check").fetchall() == []
        return {table: connection.execute(f"select count(*) from {table}").fetchone()[0] for table in FILLED}


def test_an_older_database_keeps_its_rows_up_and_down(config: Config, tmp_path: Path) -> None:
    command.upgrade(config, "0001")
    with closing(sqlite3.connect(tmp_path / "old.db")) as connection:
        for statement in FILLED.values():
            connection.execute(statement)
        connection.commit()
    every = dict.fromkeys(FILLED, 1)
    command.upgrade(config, "head")
    assert counted(tmp_path / "old.db") == every
    command.downgrade(config, "0001")
    assert counted(tmp_path / "old.db") == every


CONTEXT = "insert into context (id, harvest_id, row, tokens, texts) values (1, 1, 0, x'00', '[]')"
IN_12_BITS = ("02000000a03f56f77f62", "0201030001002040c3878ab9d965d5d60600a16f65ff070041f7", "", "")
"""acts, dfa, dropped and before of an example, as version 0002 packed it."""
PLAIN = (
    "04000000003f0900000040400b000000a03f", "080001000020400300000000c0bf0800000000803e", "0000003e000080bd", "0000003f00000000",
)  # fmt: skip
"""The same as version 0001 wrote it."""


def test_examples_of_both_older_layouts_say_what_they_said(config: Config, tmp_path: Path) -> None:
    command.upgrade(config, "0002")
    file = tmp_path / "old.db"
    with closing(sqlite3.connect(file)) as connection:
        for statement in (*FILLED.values(), CONTEXT):
            connection.execute(statement)
        connection.execute("insert into harvest_part (harvest_id, part) values (1, 'features'), (1, 'part 0')")
        for rank, blobs in enumerate((PLAIN, IN_12_BITS)):
            connection.execute(
                "insert into example (feature_id, context_id, band, rank, dest, start, act, preact, bias, gap, abs_dfa, acts, "
                "dfa, dropped, before) values (1, 1, 0, ?, 9, 2, 3.0, 3.0, 1.1875, 0.00002, 5.0, ?, ?, ?, ?)",
                (rank, *map(bytes.fromhex, blobs)),
            )
        connection.commit()
    command.upgrade(config, "0003")
    with sa.create_engine(config.attributes["url"]).connect() as connection:
        rows = connection.execute(sa.text("select start, dest, act, acts, dfa from example order by rank")).all()
        gaps = connection.execute(sa.text("select part, worst_gap from harvest_part order by part")).all()
    assert [tuple(row) for row in gaps] == [("features", 0.00002), ("part 0", None)]
    for row in rows:
        acts, dfa = read_acts(row), read_dfa(row)
        assert acts.pos.tolist() == [4, 9, 11]
        assert acts.value == pytest.approx([0.5, 3.0, 1.25], rel=0.01)
        assert (dfa.src.tolist(), dfa.head.tolist()) == ([8, 3, 8], [1, 0, 0])
        assert dfa.value == pytest.approx([2.5, -1.5, 0.25], rel=0.01)
        assert dfa.dropped + np.bincount(dfa.head, dfa.value) == pytest.approx([-1.125, 2.4375], abs=0.02)
        assert dfa.before == pytest.approx([0.5, 0.0], rel=0.01)
        assert (dfa.total, dfa.preact, dfa.bias, dfa.abs_dfa) == pytest.approx((1.8125, 3.0, 1.1875, 5.0), rel=1e-6)
    command.downgrade(config, "0002")
    with closing(sqlite3.connect(file)) as connection:
        found = connection.execute("select preact, bias, abs_dfa, length(dfa), length(dropped) from example").fetchall()
    assert found == [(3.0, 1.1875, 5.0, 21, 8)] * 2


def test_the_versions_that_each_start_looks_up_are_those_that_alembic_knows(config: Config) -> None:
    script = ScriptDirectory.from_config(config)
    assert _versions() == (script.get_current_head(), {one.revision for one in script.walk_revisions()})

"""Migrations keep what is there: a database of an older version, filled, then upgraded and taken back."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

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

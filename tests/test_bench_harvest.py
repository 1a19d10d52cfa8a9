"""The harvest's benchmarks: what they compare is the same on both sides, and what they count is what is there."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
import torch
from safetensors.torch import load_file

from bench import _postgres, harvest, harvest_vs_saedashboard, store
from bench._smollm2 import finished
from sae_core import attribution
from sae_core.config import HarvestConfig, ModelSource
from sae_core.corpus import Rows
from sae_core.harvest import HarvestResult
from sae_core.harvest import harvest as sweep
from sae_core.lens import Lens, load_lens
from sae_core.saes.base import SAE
from tests.core.tiny_harvest import CFG, LAYER, tiny_rows, tiny_sae, z_of
from tests.core.tiny_models import save_tiny


@pytest.fixture(scope="module")
def lens(tmp_path_factory: pytest.TempPathFactory) -> Lens:
    folder = save_tiny("llama", tmp_path_factory.mktemp("llama"))
    return load_lens(ModelSource(location=str(folder)), name="llama", cache=folder.parent)


@pytest.fixture(scope="module")
def rows() -> Rows:
    return tiny_rows()


@pytest.fixture(scope="module")
def sae(lens: Lens, rows: Rows) -> SAE:
    return tiny_sae(lens, rows)


@pytest.fixture(scope="module")
def result(lens: Lens, rows: Rows, sae: SAE, tmp_path_factory: pytest.TempPathFactory) -> HarvestResult:
    return finished(sweep(lens, sae, rows, CFG, tmp_path_factory.mktemp("harvest")))


# ---- store ----


def test_filling_gives_every_feature_its_examples_once_and_changes_nothing_else(result: HarvestResult) -> None:
    features, filled = store.fill(result, 50)
    places = [(e.feature, e.band, e.rank) for row in filled for e in row.examples]
    assert len(places) == len(set(places)) == 50 * 40
    assert sorted({(band, rank) for feature, band, rank in places if feature == 7}) == sorted(
        [(0, rank) for rank in range(20)] + [(band, rank) for band in range(1, 5) for rank in range(5)]
    )
    assert [record.idx for record in features] == list(range(50))
    assert all(record.n_fired for record in features)
    assert len({row.row for row in filled}) == len(filled)
    real = {(e.dest, e.act): e for e in result.examples}
    for row in filled:
        for e in row.examples:
            moved = real[e.dest, e.act]
            assert e.row == row.row
            np.testing.assert_array_equal(e.dfa_value, moved.dfa_value)


def test_what_is_filled_can_be_stored_and_weighed(result: HarvestResult) -> None:
    sizes, speed = store._on_sqlite(result, *store.fill(result, 20))
    assert speed.rows_per_s > 0
    assert sizes["example"] > 20 * 40 * 50
    assert set(store.FEATURES) <= set(sizes)


def test_heads_cut_finer_have_the_same_dfa_in_sum(lens: Lens, rows: Rows, sae: SAE) -> None:
    read, dest = lens.read_attention(torch.from_numpy(rows.train[:1].astype(np.int64)), LAYER), 12
    w, pattern = sae.W_enc[:, 5], read.pattern[0][:, dest]
    whole = attribution.dfa(read.v[0], pattern[None], w.view(1, sae.cfg.n_heads, -1))[0]
    torch.testing.assert_close(store.split_dfa(read.v[0], pattern, w, sae.cfg.n_heads), whole)
    finer = store.split_dfa(read.v[0], pattern, w, 4 * sae.cfg.n_heads)
    torch.testing.assert_close(finer.view(sae.cfg.n_heads, 4, -1).sum(1), whole)
    assert not torch.allclose(finer[0], finer[1])


@pytest.mark.skipif(_postgres.programs() is None, reason="PostgreSQL is not installed; on Debian: apt-get install postgresql")
def test_a_postgresql_of_ones_own_comes_and_goes() -> None:
    with _postgres.server() as url:
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        with engine.connect() as connection:
            assert connection.scalar(sa.text("select 1")) == 1
            assert url.host == "127.0.0.1"
    with pytest.raises(sa.exc.OperationalError), engine.connect():
        pass


# ---- harvest ----


def test_every_other_layer_gets_an_sae_that_fires_as_often(lens: Lens, rows: Rows, sae: SAE) -> None:
    made = harvest.made_saes(lens, sae, rows)
    assert sorted([*made, LAYER]) == list(range(lens.info.n_layers))
    for layer, other in made.items():
        assert other.cfg.site.layer == layer
        z = z_of(lens, rows, layer)[:, 1:]
        assert (other.encode(z) > 0).float().sum(-1).mean() == pytest.approx(sae.cfg.k, rel=0.3)


def test_the_clocks_of_a_scan_leave_nothing_behind(lens: Lens, rows: Rows, sae: SAE, tmp_path: Path) -> None:
    cfg = HarvestConfig(tokens=rows.train.size, shard_rows=12, batch_rows=4, model_dtype="float32", top_k=3)
    with harvest._timed(lens, sae) as seconds:
        harvest._scan_all(lens, [sae], rows, cfg, tmp_path)
    assert seconds["model"] > 0
    assert seconds["encoder"] > 0
    assert "read_z" not in vars(lens)
    assert "encode_sparse" not in vars(sae)
    assert 0 < harvest._visit(lens, sae, rows, cfg, tmp_path) <= len(rows.train)


def test_the_harvest_that_keeps_streams_really_does(lens: Lens, rows: Rows, sae: SAE, tmp_path: Path) -> None:
    cfg = HarvestConfig(tokens=rows.train.size, shard_rows=12, batch_rows=4, top_k=3)
    harvest._kept(lens, sae, rows, cfg, tmp_path)
    assert list((tmp_path / "streams").iterdir())
    with pytest.raises(RuntimeError, match="something else"):
        harvest._kept(lens, sae, rows, cfg.model_copy(update={"kept_gb": 0}), tmp_path / "not")


# ---- against SAEDashboard ----


def test_the_file_for_saelens_means_what_our_sae_does(sae: SAE, lens: Lens, rows: Rows, tmp_path: Path) -> None:
    harvest_vs_saedashboard.save_for_saelens(sae, tmp_path / "theirs")
    cfg, w = json.loads((tmp_path / "theirs/cfg.json").read_text()), load_file(tmp_path / "theirs/sae_weights.safetensors")
    assert (cfg["architecture"], cfg["apply_b_dec_to_input"], cfg["metadata"]["hook_name"]) == (
        "jumprelu",
        True,
        f"blocks.{LAYER}.attn.hook_z",
    )
    z = z_of(lens, rows)
    preacts = (z - w["b_dec"]) @ w["W_enc"] + w["b_enc"]  # JumpReLUSAE.encode of SAELens 6
    torch.testing.assert_close(preacts.relu() * (preacts > w["threshold"]), sae.encode(z))


def test_the_sae_of_the_first_features_is_the_same_on_them(sae: SAE, lens: Lens, rows: Rows) -> None:
    z = z_of(lens, rows)
    torch.testing.assert_close(harvest_vs_saedashboard.first_features(sae, 7).encode(z), sae.encode(z)[..., :7])
    assert harvest_vs_saedashboard.first_features(sae, 40) is sae


def theirs(lens: Lens, sae: SAE, rows: Rows, n: int = 12, checked: int = 10) -> dict[str, Any]:
    """What SAEDashboard would hand over if it were right in everything: made by hooks' own z and a sum over heads in full."""
    ours = harvest_vs_saedashboard._rows(lens, sae, rows.train, np.arange(checked), n)
    acts = np.stack([ours[row].acts for row in range(checked)])  # [row, pos, F]
    dest = acts.argmax(1).T  # [F, row]
    w = sae.W_enc[:, :n].T.reshape(n, sae.cfg.n_heads, -1)
    dfa = np.zeros((n, checked, rows.context), np.float32)
    group = sae.cfg.n_heads // ours[0].v.shape[1]
    for feature in range(n):
        for row in range(checked):
            pattern = ours[row].pattern[:, dest[feature, row]]
            for head in range(sae.cfg.n_heads):
                dfa[feature, row] += (pattern[head] * (ours[row].v[:, head // group] @ w[feature, head])).numpy()
    places = [(feature, row) for feature in range(n) for row in range(checked)]
    return {
        "feature": np.array([f for f, _ in places]),
        "row": np.array([r for _, r in places]),
        "acts": np.array([acts[r, 1:, f] for f, r in places]).round(4),
        "dest": dest,
        "dfa": dfa,
    }


def values(figures: dict[str, dict[str, object]]) -> dict[str, Any]:
    return {name: figure["value"] for name, figure in figures.items()}


def test_a_peer_that_is_right_agrees(lens: Lens, sae: SAE, rows: Rows) -> None:
    found = theirs(lens, sae, rows)
    said = values(harvest_vs_saedashboard._agreement(lens, sae, rows.train, found))
    assert said["activation_gap"] < 1e-3
    assert said["activation_flips"] == 0
    assert said["dfa_gap"] < 1e-5
    assert said["dfa_compared"] > 20
    assert 0 < said["dfa_of_silent_share"] < 0.5


def test_a_peer_that_is_wrong_is_found_out(lens: Lens, sae: SAE, rows: Rows) -> None:
    def with_(**changes: Any) -> dict[str, Any]:
        return values(harvest_vs_saedashboard._agreement(lens, sae, rows.train, theirs(lens, sae, rows) | changes))

    found = theirs(lens, sae, rows)
    assert with_(dfa=np.roll(found["dfa"], 1, axis=2))["dfa_gap"] > 0.01
    assert with_(acts=found["acts"] * 1.01)["activation_gap"] > 1e-3
    assert with_(acts=np.zeros_like(found["acts"]))["activation_flips"] > 0

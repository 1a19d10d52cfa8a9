"""The training loop on a source of z whose dictionary is known, and its promises about interruption."""

import errno
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_core import checkpoint
from sae_core.activations import Activations
from sae_core.config import HarvestConfig, RowsConfig, Site, TrainConfig
from sae_core.errors import EmptyCorpus, UnreadableSAE
from sae_core.progress import Progress
from sae_core.saes import SAE, load_sae, save_sae
from sae_core.train import train

N_ATOMS, D_IN, ACTIVE, CONTEXT = 24, 16, 2, 16


class KnownDictionary:
    """Stands where a Lens would: z of a token is a fixed sparse sum of known unit atoms; position 3 is a sink."""

    info = SimpleNamespace(n_heads=2, d_head=8, name="known", fingerprint="f", processing={"folded": False})
    tokenizer_fingerprint = "t"
    device = torch.device("cpu")

    def __init__(self, vocab: int = 4000) -> None:
        generator = torch.Generator().manual_seed(1)
        self.atoms = torch.nn.functional.normalize(torch.randn(N_ATOMS, D_IN, generator=generator), dim=1)
        chosen = torch.rand(vocab, N_ATOMS, generator=generator).topk(ACTIVE, dim=1).indices
        sizes = 1 + torch.rand(vocab, ACTIVE, generator=generator)
        self.table = torch.einsum("va,vad->vd", sizes, self.atoms[chosen]) + 0.3
        self.passes = 0

    def check_layer(self, layer: int) -> None:
        assert layer in (0, 1)

    def read_z(self, tokens: Tensor, layers: Sequence[int], dtype: torch.dtype = torch.float32) -> dict[int, Tensor]:
        self.passes += 1
        z = self.table[tokens].clone()
        z[:, 3] *= 1000  # an attention sink
        return {layer: (z * (1 + layer)).to(dtype) for layer in layers}


@pytest.fixture
def rows() -> Any:
    tokens = np.random.default_rng(0).integers(0, 4000, (600, CONTEXT)).astype(np.int32)
    return SimpleNamespace(train=tokens, heldout=tokens[:8], context=CONTEXT, row_start=0, fingerprint="r")


def config(**changes: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "model": "known", "corpus": "c", "site": Site(layer=0), "rows": RowsConfig(context=CONTEXT, tokens=600 * CONTEXT),
        "expansion": 2, "k": ACTIVE, "passes": 4, "batch": 256, "lr": 1e-2, "model_dtype": "float32", "step_dtype": "float32",
        "checkpoint_steps": 7, "pool_tokens": 600 * CONTEXT, "collect_rows": 50, "harvests": (HarvestConfig(),),
    }  # fmt: skip
    return TrainConfig(**(base | changes))


def run(cfg: TrainConfig, lens: Any, rows: Any, folder: Path, stop_after: int | None = None) -> tuple[list[Progress], SAE | None]:
    """Everything `train` yields and what it returns; closed after `stop_after` reports, as a stopping worker does."""
    generator, reports = train(cfg, lens, rows, folder), []
    while stop_after is None or len(reports) < stop_after:
        try:
            reports.append(next(generator))
        except StopIteration as end:
            return reports, end.value
    generator.close()
    return reports, None


def same(a: SAE | None, b: SAE | None) -> bool:
    assert a is not None
    assert b is not None
    return all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers(), strict=True))


def test_it_finds_the_known_dictionary(rows: Any, tmp_path: Path) -> None:
    lens = KnownDictionary()
    reports, sae = run(config(passes=20), lens, rows, tmp_path)
    assert sae is not None
    best = (lens.atoms @ sae.W_dec.T).max(1).values
    assert best.mean() > 0.95
    assert reports[-1].done == reports[-1].total
    fvu = [r.values["fvu"] for r in reports if r.values]
    assert fvu[-1] < 0.1 < fvu[0]


def test_the_saved_sae_reads_raw_z_with_k_active_features_and_unit_decoder(rows: Any, tmp_path: Path) -> None:
    lens = KnownDictionary()
    _, sae = run(config(), lens, rows, tmp_path)
    assert sae is not None
    z = lens.read_z(torch.from_numpy(rows.train.astype(np.int64)), [0])[0]
    kept = z[~sae.excluded(z)]
    assert float((sae.encode(kept) > 0).sum(1).float().mean()) == pytest.approx(ACTIVE, abs=0.05)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(sae.cfg.d_sae), atol=1e-5)
    assert sae.cfg.scale == pytest.approx(4.0 / float(kept.norm(dim=1).mean()), rel=1e-4)  # sqrt(16) / mean norm
    sparse, dense = sae.encode_sparse(kept), sae.encode(kept)
    assert torch.equal(torch.stack([sparse.token, sparse.feature]), torch.stack(dense.nonzero(as_tuple=True)))
    assert torch.equal(sparse.value, dense[sparse.token, sparse.feature])
    w, c = sae.affine(torch.tensor([5, 1]))
    assert torch.allclose(kept @ w.T + c, sae.preacts(kept)[:, [5, 1]], atol=1e-4)


def test_row_starts_and_sinks_are_excluded(rows: Any, tmp_path: Path) -> None:
    lens = KnownDictionary()
    _, sae = run(config(), lens, rows, tmp_path)
    assert sae is not None
    mask = sae.excluded(lens.read_z(torch.from_numpy(rows.train[:4].astype(np.int64)), [0])[0])
    assert mask[:, [0, 3]].all()
    assert not mask[:, [1, 2, 4, 15]].any()
    assert sae.b_dec.norm() < 10  # the mean of z, had sinks counted, would be 60 times as large


@pytest.mark.parametrize("stops", [(3,), (12, 1), (13, 9, 30), (20, 20, 20, 20)])
def test_an_interrupted_run_ends_with_the_same_weights(rows: Any, tmp_path: Path, stops: tuple[int, ...]) -> None:
    _, whole = run(config(), KnownDictionary(), rows, tmp_path / "whole")
    for stop in stops:
        run(config(), KnownDictionary(), rows, tmp_path / "torn", stop)
    _, resumed = run(config(), KnownDictionary(), rows, tmp_path / "torn")
    assert same(whole, resumed)


def test_a_run_killed_between_checkpoints_ends_with_the_same_weights(rows: Any, tmp_path: Path) -> None:
    _, whole = run(config(), KnownDictionary(), rows, tmp_path / "whole")
    generator = train(config(), KnownDictionary(), rows, tmp_path / "killed")  # type: ignore[arg-type]
    for _ in range(12 + 25):
        next(generator)
    kept = sorted((tmp_path / "killed/runs/000/checkpoints").iterdir())
    generator.close()  # writes one more checkpoint, which a kill would not have written
    (newest,) = set((tmp_path / "killed/runs/000/checkpoints").iterdir()) - set(kept)
    (newest / "state.safetensors").write_bytes(b"torn")
    _, resumed = run(config(), KnownDictionary(), rows, tmp_path / "killed")
    assert same(whole, resumed)


def test_several_pools_train_on_every_row_once_and_resume(rows: Any, tmp_path: Path) -> None:
    cfg = config(pool_tokens=200 * CONTEXT, passes=2)
    lens = KnownDictionary()
    _, whole = run(cfg, lens, rows, tmp_path / "whole")
    assert lens.passes == 600 / 50
    run(cfg, KnownDictionary(), rows, tmp_path / "torn", 30)
    _, resumed = run(cfg, KnownDictionary(), rows, tmp_path / "torn")
    assert same(whole, resumed)


def test_a_finished_run_called_again_gives_the_same_sae_without_a_model_pass(rows: Any, tmp_path: Path) -> None:
    _, first = run(config(), KnownDictionary(), rows, tmp_path)
    lens = KnownDictionary()
    _, again = run(config(), lens, rows, tmp_path)
    assert same(first, again)
    assert lens.passes == 0


def test_the_harvest_finds_the_collected_rows(rows: Any, tmp_path: Path) -> None:
    lens = KnownDictionary()
    run(config(), lens, rows, tmp_path)
    activations = Activations.open(tmp_path / "activations", 0)
    assert activations is not None
    assert activations.n_rows == 600
    wanted = lens.read_z(torch.from_numpy(rows.train[95:230].astype(np.int64)), [0])[0]
    assert torch.equal(activations.read_z(95, 230), wanted)


def test_too_little_text_is_a_sentence(rows: Any, tmp_path: Path) -> None:
    rows.train = rows.train[:10]
    with pytest.raises(EmptyCorpus, match="less than one batch of 256"):
        next(train(config(), KnownDictionary(), rows, tmp_path))  # type: ignore[arg-type]


def test_a_disk_without_room_for_the_pool_is_an_error_before_anything_is_collected(
    rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a SIGBUS in the middle; and once there is room, the run goes on as if nothing had been."""

    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    lens = KnownDictionary()
    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", refuse)
        with pytest.raises(OSError, match="No space left"):
            next(train(config(), lens, rows, tmp_path))  # type: ignore[arg-type]
    assert lens.passes == 0
    assert not list(tmp_path.rglob("pool-*.npy"))
    _, resumed = run(config(), KnownDictionary(), rows, tmp_path)
    assert resumed is not None


def test_auxk_revives_features_that_died(rows: Any, tmp_path: Path) -> None:
    """All features but four are pushed below the cut early on; with AuxK more of them come back."""
    alive = {}
    for name, coef in (("with", 1.0), ("without", 0.0)):
        cfg = config(passes=12, aux_coef=coef, dead_tokens=512, k_anneal=0.0, lr=3e-3)
        generator = train(cfg, KnownDictionary(), rows, tmp_path / name)  # type: ignore[arg-type]
        for _ in range(14):
            next(generator)
        generator.close()
        saved, _ = checkpoint.newest(tmp_path / name / "runs/000/checkpoints")
        assert saved is not None
        saved.tensors["b_enc"][4:] = -2.0
        saved.tensors["silent"][4:] = 10**6
        checkpoint.save(tmp_path / name / "runs/000/checkpoints", saved)
        _, sae = run(cfg, KnownDictionary(), rows, tmp_path / name)
        assert sae is not None
        z = KnownDictionary().table
        alive[name] = int((sae.encode(z) > 0).any(0).sum())
    assert alive["with"] >= alive["without"] + 5


def test_save_and_load_give_the_same_sae_and_damage_is_named(rows: Any, tmp_path: Path) -> None:
    _, sae = run(config(), KnownDictionary(), rows, tmp_path)
    assert sae is not None
    assert same(sae, load_sae(tmp_path / "runs/000/sae"))
    with pytest.raises(UnreadableSAE, match=r"cfg\.json is missing"):
        load_sae(tmp_path / "nothing")
    weights = tmp_path / "runs/000/sae/sae.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:100])
    with pytest.raises(UnreadableSAE, match="cannot be read"):
        load_sae(tmp_path / "runs/000/sae")
    sae.W_dec[0, 0] = torch.nan
    save_sae(sae, tmp_path / "runs/000/sae")
    with pytest.raises(UnreadableSAE, match=r"W_dec .* not finite"):
        load_sae(tmp_path / "runs/000/sae")
    (tmp_path / "runs/000/sae/cfg.json").write_text("{}")
    with pytest.raises(UnreadableSAE, match="not an SAE's config"):
        load_sae(tmp_path / "runs/000/sae")

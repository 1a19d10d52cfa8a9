"""The training loop on a source of z whose dictionary is known, and its promises about interruption."""

import errno
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_core import checkpoint
from sae_core.activations import Activations, Store, about
from sae_core.config import HarvestConfig, RowsConfig, Site, TrainConfig
from sae_core.errors import CacheBusy, CacheMismatch, Diverged, EmptyCorpus, Fenced, UnreadableSAE, UsageError
from sae_core.presets import PRESETS
from sae_core.progress import Progress
from sae_core.saes import SAE, load_sae, row_starts, save_sae
from sae_core.train import diverged, train, train_many
from sae_core.trainer import Trainer

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


def finish(generator: Any, stop_after: int | None = None) -> tuple[list[Progress], Any]:
    """Everything a generator yields and what it returns; closed after `stop_after` reports, as a stopping worker does."""
    reports = list[Progress]()
    while stop_after is None or len(reports) < stop_after:
        try:
            reports.append(next(generator))
        except StopIteration as end:
            return reports, end.value
    generator.close()
    return reports, None


def run(cfg: TrainConfig, lens: Any, rows: Any, folder: Path, stop_after: int | None = None) -> tuple[list[Progress], SAE | None]:
    """Train one SAE."""
    return finish(train(cfg, lens, rows, folder), stop_after)


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
    kept = z[~sae.excluded(z, row_starts(rows.train, rows.row_start))]
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
    z = lens.read_z(torch.from_numpy(rows.train[:4].astype(np.int64)), [0])[0]
    mask = sae.excluded(z, row_starts(rows.train[:4], rows.row_start))
    assert mask[:, [0, 3]].all()
    assert not mask[:, [1, 2, 4, 15]].any()
    assert sae.b_dec.norm() < 10  # the mean of z, had sinks counted, would be 60 times as large


def test_row_starts_between_packed_documents_are_not_trained_on(rows: Any, tmp_path: Path) -> None:
    """Were they, a token that comes in every second row, far from all others, would move the mean and the scale."""
    rows.train[::2, 7] = rows.row_start
    lens = KnownDictionary()
    lens.table[rows.row_start] = 4  # norm 16, below the limit for sinks
    _, sae = run(config(), lens, rows, tmp_path / "without")
    assert sae is not None
    z = lens.read_z(torch.from_numpy(rows.train.astype(np.int64)), [0])[0]
    inner = torch.from_numpy(rows.train == rows.row_start)
    inner[:, 3] = False  # the sink
    mask = sae.excluded(z, row_starts(rows.train, rows.row_start))
    assert mask[inner].all()
    assert sae.cfg.scale == pytest.approx(4.0 / float(z[~mask].norm(dim=1).mean()), rel=1e-4)
    _, every = run(config(exclude_start=False), lens, rows, tmp_path / "with")
    assert every is not None
    assert not every.excluded(z, row_starts(rows.train, rows.row_start))[inner].any()
    assert every.cfg.scale < 0.97 * sae.cfg.scale


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
    activations = Activations.open(tmp_path / "activations", 0, about(lens, rows, config()))  # type: ignore[arg-type]
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


# ---- many SAEs on one stream ----


def run_many(cfgs: list[TrainConfig], lens: Any, rows: Any, folder: Path, stop_after: int | None = None) -> Any:
    """Train several."""
    return finish(train_many(cfgs, lens, rows, folder), stop_after)


def siblings(**changes: Any) -> list[TrainConfig]:
    """Runs of two layers, three architectures and two batch sizes."""
    first = config(**changes)
    others: list[dict[str, Any]] = [{"site": Site(layer=1)}, {"arch": "topk"}, {"arch": "relu", "batch": 128}]
    return [first, *(config(**(changes | other)) for other in others)]


def test_many_saes_on_one_stream_are_those_of_runs_of_their_own(rows: Any, tmp_path: Path) -> None:
    lens, cfgs = KnownDictionary(), siblings(pool_tokens=250 * CONTEXT, passes=2)
    reports, saes = run_many(cfgs, lens, rows, tmp_path / "many")
    assert lens.passes == 600 / 50
    assert {r.run for r in reports if r.phase == "train"} == {0, 1, 2, 3}
    assert reports[-1].done == reports[-1].total
    for i, (cfg, sae) in enumerate(zip(cfgs, saes, strict=True)):
        _, alone = run(cfg, KnownDictionary(), rows, tmp_path / f"alone-{i}")
        assert same(alone, sae), cfg.arch
    assert not list((tmp_path / "many/activations").rglob("pool-0000.npy")), "what is read no more gives its disk back"


def test_many_saes_resume_wherever_they_were_stopped(rows: Any, tmp_path: Path) -> None:
    cfgs = siblings(pool_tokens=250 * CONTEXT, passes=2)
    _, whole = run_many(cfgs, KnownDictionary(), rows, tmp_path / "whole")
    for stop in (3, 30, 55, 55, 90):
        run_many(cfgs, KnownDictionary(), rows, tmp_path / "torn", stop)
    _, resumed = run_many(cfgs, KnownDictionary(), rows, tmp_path / "torn")
    assert all(same(a, b) for a, b in zip(whole, resumed, strict=True))


def test_runs_that_read_different_activations_cannot_share_a_stream(rows: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must agree in collect_rows"):
        next(train_many([config(), config(collect_rows=7)], KnownDictionary(), rows, tmp_path))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arch", "most"),
    [("relu", 0.5), ("gated", 0.25), ("topk", 0.25), ("jumprelu", 0.25), ("matryoshka", 0.25)],  # L1 shrinks what it keeps
)
def test_every_architecture_finds_the_known_dictionary_and_resumes(arch: Any, most: float, rows: Any, tmp_path: Path) -> None:
    cfg = config(arch=arch, passes=20)
    lens = KnownDictionary()
    reports, whole = run(cfg, lens, rows, tmp_path / "whole")
    assert whole is not None
    z = lens.table + 0  # every token once
    acts = whole.encode(z)
    fvu = (whole.decode(acts) - z).square().sum() / (z - z.mean(0)).square().sum()
    assert float(fvu) < most
    assert 0.6 * ACTIVE < float((acts > 0).sum(1).float().mean()) < 1.7 * ACTIVE
    assert torch.allclose(whole.W_dec.norm(dim=1), torch.ones(whole.cfg.d_sae), atol=1e-5)
    run(cfg, KnownDictionary(), rows, tmp_path / "torn", len(reports) // 2)
    _, resumed = run(cfg, KnownDictionary(), rows, tmp_path / "torn")
    assert same(whole, resumed)


@pytest.mark.parametrize("n", [1, 2])
def test_a_run_that_another_worker_took_over_writes_nothing_more(n: int, rows: Any, tmp_path: Path) -> None:
    """An error thrown in is not a stop: no checkpoint is written over what the other worker does."""
    generator = train_many(siblings()[:n], KnownDictionary(), rows, tmp_path)  # type: ignore[arg-type]
    for _ in range(12 + 10):
        next(generator)
    with pytest.raises(Fenced):
        generator.throw(Fenced("taken over"))
    assert [path.name for path in (tmp_path / "runs/000/checkpoints").iterdir()] == ["step-00000007"]


# ---- the activation cache ----


def test_a_named_cache_is_read_again_by_runs_of_other_saes_and_grows_by_layers(rows: Any, tmp_path: Path) -> None:
    lens = KnownDictionary()
    first = config(cache="shared", k=3)
    _, made = finish(train(first, lens, rows, tmp_path / "a", tmp_path / "caches"))  # type: ignore[arg-type]
    passes = lens.passes
    _, again = finish(train(first, lens, rows, tmp_path / "b", tmp_path / "caches"))  # type: ignore[arg-type]
    assert lens.passes == passes, "nothing is read from the model a second time"
    assert same(made, again)
    finish(train(config(cache="shared", site=Site(layer=1)), lens, rows, tmp_path / "c", tmp_path / "caches"))  # type: ignore[arg-type]
    assert lens.passes == 2 * passes


@pytest.mark.parametrize(("name", "value"), [("fingerprint", "other"), ("context", 8), ("row_start", 5)])
def test_a_cache_of_other_activations_is_refused_and_says_what_differs(name: str, value: Any, rows: Any, tmp_path: Path) -> None:
    finish(train(config(cache="shared"), KnownDictionary(), rows, tmp_path / "a", tmp_path / "caches"))  # type: ignore[arg-type]
    setattr(rows, name, value)
    word = {"fingerprint": "rows is r there and other here"}.get(name, name)
    with pytest.raises(CacheMismatch, match=word) as caught:
        next(train(config(cache="shared"), KnownDictionary(), rows, tmp_path / "b", tmp_path / "caches"))  # type: ignore[arg-type]
    assert caught.value.field == "cache"


def test_a_cache_made_anew_under_the_same_name_is_not_taken_for_the_old_one(rows: Any, tmp_path: Path) -> None:
    lens, cfg = KnownDictionary(), config(cache="shared")
    finish(train(cfg, lens, rows, tmp_path / "a", tmp_path / "caches"))  # type: ignore[arg-type]
    wanted = about(lens, rows, cfg)  # type: ignore[arg-type]
    here = Activations.open(tmp_path / "caches/shared", 0, wanted)
    assert here is not None
    assert here.n_rows == len(rows.train)
    assert Activations.open(tmp_path / "caches/shared", 0, wanted | {"rows": "others"}) is None
    assert Activations.open(tmp_path / "caches/gone", 0, wanted) is None


def test_a_cache_that_another_run_fills_is_left_alone(rows: Any, tmp_path: Path) -> None:
    with Store(tmp_path / "caches/shared").filling(), pytest.raises(CacheBusy, match="filling the activation cache shared"):
        next(train(config(cache="shared"), KnownDictionary(), rows, tmp_path / "a", tmp_path / "caches"))  # type: ignore[arg-type]


# ---- what goes wrong ----


def test_activations_that_are_no_numbers_stop_it_and_are_named(rows: Any, tmp_path: Path) -> None:
    lens = KnownDictionary()
    lens.table[int(rows.train[120, 9])] = torch.nan
    with pytest.raises(Diverged, match=r"not finite at blocks\.0\.attn\.hook_z, training row \d+, position \d+"):
        run(config(), lens, rows, tmp_path)


def test_a_loss_that_is_no_number_stops_it_and_names_step_and_checkpoint(rows: Any, tmp_path: Path) -> None:
    """The last good checkpoint stays, and from it a run goes on."""
    generator = train(config(), KnownDictionary(), rows, tmp_path)  # type: ignore[arg-type]
    for _ in range(12 + 20):
        next(generator)
    generator.close()
    saved, _ = checkpoint.newest(tmp_path / "runs/000/checkpoints")
    assert saved is not None
    broken = dict(saved.tensors) | {"b_dec": saved.tensors["b_dec"] * torch.nan}
    checkpoint.save(tmp_path / "runs/000/checkpoints", saved._replace(step=saved.step + 1, tensors=broken))
    with pytest.raises(Diverged, match=r"blocks\.0\.attn\.hook_z .* at step 2\d\. The last good checkpoint is step 2\d"):
        run(config(), KnownDictionary(), rows, tmp_path)
    assert checkpoint.newest_step(tmp_path / "runs/000/checkpoints") <= 21


def test_one_that_diverges_among_several_is_given_up_and_the_others_are_made(rows: Any, tmp_path: Path) -> None:
    cfgs = [config(), config(lr=1e30), config(k=3)]
    reports, made = finish(train_many(cfgs, KnownDictionary(), rows, tmp_path))  # type: ignore[arg-type]
    assert [sae.cfg.k for sae in made] == [cfgs[0].k, 3]
    assert [diverged(tmp_path, index) is None for index in range(3)] == [True, False, True]
    (said,) = [report.note for report in reports if report.note]
    assert "given up" in said
    again, same_ones = finish(train_many(cfgs, KnownDictionary(), rows, tmp_path))  # type: ignore[arg-type]
    assert [report.phase for report in again] == [], "what is made and what is given up stays so"
    assert all(same(one, other) for one, other in zip(made, same_ones, strict=True))
    with pytest.raises(Diverged, match="at step"):
        finish(train_many(cfgs[1:2], KnownDictionary(), rows, tmp_path / "alone"))  # type: ignore[arg-type]


def test_a_full_disk_while_saving_loses_nothing_that_was_saved(
    rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    _, whole = run(config(), KnownDictionary(), rows, tmp_path / "whole")
    generator = train(config(), KnownDictionary(), rows, tmp_path / "torn")  # type: ignore[arg-type]
    for _ in range(12 + 10):
        next(generator)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", refuse)
        with pytest.raises(OSError, match="No space left"):
            list(generator)
    kept = tmp_path / "torn/runs/000/checkpoints"
    assert [path.name for path in sorted(kept.iterdir())] == ["step-00000007"]
    _, resumed = run(config(), KnownDictionary(), rows, tmp_path / "torn")
    assert same(whole, resumed)


def test_a_checkpoint_that_cannot_be_read_is_said(rows: Any, tmp_path: Path) -> None:
    run(config(), KnownDictionary(), rows, tmp_path, 40)
    newest = sorted((tmp_path / "runs/000/checkpoints").iterdir())[-1]
    (newest / "state.safetensors").write_bytes(b"torn")
    reports, _ = run(config(), KnownDictionary(), rows, tmp_path)
    (note,) = [r.note for r in reports if r.note]
    assert newest.name in note
    assert "going on from the one before" in note


def test_more_active_features_than_there_are_is_refused_before_anything_is_read(rows: Any, tmp_path: Path) -> None:
    lens = KnownDictionary()
    with pytest.raises(UsageError, match=r"k = 40 active features of 32 \(expansion 2 x 16\)") as caught:
        next(train(config(k=40), lens, rows, tmp_path))  # type: ignore[arg-type]
    assert caught.value.field == "k"
    assert lens.passes == 0


# ---- the paper's recipe ----


def test_resampling_points_dead_features_at_what_is_rebuilt_badly(rows: Any, tmp_path: Path) -> None:
    """At the published moments only; decoder rows of the resampled are inputs less b_dec, unit; moments start again."""
    cfg = config(arch="relu", l1=0.05, resample_steps=20, resample_times=2, dead_frequency=1e-3, passes=8, schedule="restarts")
    generator = train(cfg, KnownDictionary(), rows, tmp_path)  # type: ignore[arg-type]
    for _ in range(12 + 8):
        next(generator)
    generator.close()
    saved, _ = checkpoint.newest(tmp_path / "runs/000/checkpoints")
    assert saved is not None
    assert saved.step == 8
    saved.tensors["b_enc"][5:9] = -100.0  # four features die
    before = saved.tensors["W_dec"][5:9].clone()
    checkpoint.save(tmp_path / "runs/000/checkpoints", saved)
    reports, _ = run(cfg, KnownDictionary(), rows, tmp_path)
    notes = [r.note for r in reports if r.note]
    assert notes[0].startswith("Step 20: pointed 4 dead features elsewhere")
    assert len(notes) <= 2

    trainer = Trainer(cfg, D_IN, torch.device("cpu"), torch.float32)
    trainer.load(saved)
    trainer.steps_done, trainer.counts[:], trainer.counts[5:9] = 20, 1000, 0
    x = KnownDictionary().table[:256]
    assert trainer.count_firings(256, lambda *_: x) == 4
    assert not torch.allclose(trainer.recipe.W_dec[5:9], before)
    toward = torch.nn.functional.normalize(x - trainer.recipe.b_dec, dim=1)
    assert ((trainer.recipe.W_dec[5:9] @ toward.T).max(1).values > 0.9999).all()
    others = torch.ones(trainer.d_sae, dtype=torch.bool)
    others[5:9] = False
    mean_norm = trainer.recipe.W_enc_t[others].norm(dim=1).mean()
    assert torch.allclose(trainer.recipe.W_enc_t[5:9].norm(dim=1), 0.2 * mean_norm.expand(4), rtol=1e-4)
    assert (trainer.recipe.b_enc[5:9] == 0).all()
    moments = trainer.optimizer.state[trainer.parameters["W_dec"]]["exp_avg"]
    assert (moments[5:9] == 0).all()
    assert (moments[others].abs().sum(1) > 0).any()
    assert trainer.rate(20, 400) == pytest.approx(0.1 * cfg.lr)
    assert trainer.rate(520, 4000) == pytest.approx(cfg.lr * 0.55, rel=1e-3)
    assert trainer.rate(1020, 4000) == pytest.approx(cfg.lr)


def test_raw_z_and_row_starts_are_trained_on_where_a_preset_says_so(rows: Any, tmp_path: Path) -> None:
    preset = PRESETS["kissane-gpt2-l5"]
    tiny = {"model": "known", "corpus": "c", "site": Site(layer=0), "rows": RowsConfig(context=CONTEXT, tokens=600 * CONTEXT)}
    cfg = TrainConfig.model_validate(
        preset | tiny | {"expansion": 2, "batch": 256, "pool_tokens": 600 * CONTEXT, "model_dtype": "float32"}
    )
    assert (cfg.l1, cfg.lr, cfg.beta2, cfg.scaling) == (1.0, 1.2e-3, 0.99, False)
    _, sae = run(cfg, KnownDictionary(), rows, tmp_path)
    assert sae is not None
    assert sae.cfg.scale == 1.0
    z = KnownDictionary().read_z(torch.from_numpy(rows.train[:4].astype(np.int64)), [0])[0]
    assert not sae.excluded(z, row_starts(rows.train[:4], rows.row_start)).any()


def test_curves_are_on_disk_as_lines_of_json_without_gaps_or_repeats(rows: Any, tmp_path: Path) -> None:
    run(config(), KnownDictionary(), rows, tmp_path, 45)
    run(config(), KnownDictionary(), rows, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "runs/000/metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    assert steps[:3] == [1, 5, 9]
    assert {"loss", "fvu", "l0", "dead", "lr", "k"} <= set(lines[0])

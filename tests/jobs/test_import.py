"""A peer's SAE, from its files to a harvest that adds up, by the command line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_core.saes import load_sae
from server.cli import main
from server.db import Database
from server.settings import Settings
from server.store import harvests, registry
from server.store.saes import find_sae
from tests.processes import ran

pytestmark = pytest.mark.real
TEXT = "The harvest moon rose over the barn, and the barn was red. Mary gave John the book, and John gave Mary the pen.\n\n"
D_IN, D_SAE, LAYER = 576, 300, 17


def saelens_folder(folder: Path) -> Path:
    """As SAELens 6 writes a jumprelu SAE of SmolLM2."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(2)
    W_enc = torch.randn(D_IN, D_SAE, generator=generator) / D_IN**0.5
    tensors = {
        "W_enc": W_enc,
        "W_dec": W_enc.T.contiguous(),
        "b_enc": 0.05 * torch.randn(D_SAE, generator=generator),
        "b_dec": 0.05 * torch.randn(D_IN, generator=generator),
        "threshold": torch.full((D_SAE,), 0.15),
    }
    folder.mkdir()
    save_file(tensors, folder / "sae_weights.safetensors")
    meta = {"model_name": "smollm2", "hook_name": f"blocks.{LAYER}.attn.hook_z", "sae_lens_version": "6.54.12"}
    config = {"architecture": "jumprelu", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "apply_b_dec_to_input": False}
    (folder / "cfg.json").write_text(json.dumps(config | {"normalize_activations": "none", "metadata": meta}))
    return folder


def run(*arguments: str) -> str:
    """A process of its own: the browser tests leave an event loop in this one, where DBOS refuses."""
    done = ran(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_saelens_sae_of_smollm2_is_imported_harvested_and_exported(
    tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEADSCOPE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HEADSCOPE_PORT", "8931")
    source = saelens_folder(tmp_path / "theirs")
    (tmp_path / "text.txt").write_text(TEXT * 40)
    run("import", "sae", str(source), "--model", str(smollm2), "--name", "mine")
    run("harvest", "--sae", "mine", "--corpus", str(tmp_path / "text.txt"), "--tokens", "1024", "--top-k", "3", "--per-band", "1")
    db = Database(Settings(data=tmp_path / "data").url)
    with db.read() as session:
        door, record = find_sae(session, "mine"), registry.sae(session, "mine")
        harvest = door.sae.harvest
        assert harvest is not None
        gaps = harvests.stored_gaps(session, harvest.id)
    db.close()
    assert harvest.n_live > 50
    assert len(gaps) > 100
    assert harvest.worst_gap is not None
    assert harvest.worst_gap < 1e-4
    assert record.config.imported is not None
    assert record.config.imported.source == str(source)

    run("export", "sae", "mine", str(tmp_path / "ours"))
    ours, theirs = (load_file(folder / "sae_weights.safetensors") for folder in (tmp_path / "ours", source))
    assert torch.equal(ours["W_enc"], theirs["W_enc"])
    shift = theirs["b_dec"].double() @ theirs["W_enc"].double()
    assert torch.allclose(ours["b_enc"].double(), theirs["b_enc"].double() + shift, atol=1e-6)
    assert load_sae(tmp_path / "data" / record.folder).cfg.site.layer == LAYER

    monkeypatch.setattr("sys.argv", ["headscope", "export", "sae", "mine", str(tmp_path / "ours")])
    with pytest.raises(SystemExit):
        main()
    assert "not empty" in capsys.readouterr().err

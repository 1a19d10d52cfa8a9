"""Peers' SAE files: what their own packages wrote is read, computes what they computed, and what is wrong is refused."""

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_core.errors import (
    DownloadFailed,
    HeadscopeError,
    LayerOutOfRange,
    SAEMismatch,
    UnreadableSAE,
    UnsupportedSAE,
    UsageError,
)
from sae_core.formats import convert, fetched, open_peer, write_saelens
from sae_core.lens import LensInfo, ValueMap
from sae_core.saes import SAE, load_sae, save_sae

CASES = Path(__file__).resolve().parent.parent / "fixtures" / "formats"
ARCHS = {
    "saelens-standard": "relu", "saelens-standard-no-b-dec": "relu", "saelens-standard-normed": "relu", "saelens-gated": "gated",
    "saelens-topk": "topk", "saelens-topk-rescaled": "topk", "saelens-jumprelu": "jumprelu", "saelens-batchtopk": "jumprelu",
    "saelens-checkpoint": "batchtopk", "saelens5-standard": "relu", "saelens5-topk": "topk", "saelens5-gated": "gated",
    "saelens5-jumprelu": "jumprelu", "saelens5-finetuned": "relu", "sparsify": "topk", "gemma-scope": "jumprelu",
    "kissane": "relu",
    "dictionary_learning-AutoEncoder": "relu", "dictionary_learning-AutoEncoderNew": "relu",
    "dictionary_learning-GatedAutoEncoder": "gated", "dictionary_learning-JumpReluAutoEncoder": "jumprelu",
    "dictionary_learning-AutoEncoderTopK": "topk", "dictionary_learning-BatchTopKSAE": "batchtopk",
    "dictionary_learning-MatryoshkaBatchTopKSAE": "matryoshka",
}  # fmt: skip
HEADS, D_HEAD, LAYER = 4, 8, 1


class TinyModel:
    """As much of a lens as a conversion asks for: a model of four heads, whose values hold a bias where `bias` says."""

    def __init__(self, bias: float = 0.0, n_heads: int = HEADS, n_layers: int = 2) -> None:
        self.info = LensInfo(
            name="tiny", fingerprint="weights:1", n_layers=n_layers, n_heads=n_heads, n_kv_heads=2, d_head=D_HEAD, d_model=32,
            d_vocab=10, max_context=64, processing={"folded": False, "centred": False, "dtype": "float32", "tl_version": "4"},
        )  # fmt: skip
        drawn = torch.randn(2, 2, D_HEAD, generator=torch.Generator().manual_seed(5))
        self.values = ValueMap(torch.zeros(2, 32, D_HEAD), bias * drawn[0], bias * drawn[1])

    def value_map(self, layer: int) -> ValueMap:
        assert layer == LAYER
        return self.values


def lens(**changes: Any) -> Any:
    return TinyModel(**changes)


def place(case: str) -> Path:
    found = next((CASES / case).rglob("params.npz"), None)
    return found or CASES / case


def converted(case: str, **changes: Any) -> SAE:
    said = LAYER if case.startswith(("sparsify", "dictionary")) else None
    return convert(open_peer(place(case)), lens(), case, **({"layer": said} | changes))


def expected(case: str) -> dict[str, Tensor]:
    return load_file(CASES / case / "expected.safetensors")


def close(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("case", ARCHS)
def test_what_a_peer_wrote_computes_what_the_peer_computed(case: str, tmp_path: Path) -> None:
    wanted = expected(case)
    made = converted(case)
    save_sae(made, tmp_path)
    sae = load_sae(tmp_path)
    assert sae.cfg.arch == ARCHS[case]
    assert sae.cfg.site.layer == LAYER
    assert sae.cfg.imported == made.cfg.imported
    assert 0.02 < float((wanted["acts"] > 0).float().mean()) < 0.9
    acts = sae.encode(wanted["z"])
    assert torch.equal(acts > 0, wanted["acts"] > 0)
    assert close(acts, wanted["acts"])
    assert close(sae(wanted["z"]), wanted["z_hat"])
    sparse = sae.encode_sparse(wanted["z"])
    assert close(sparse.value, wanted["acts"][sparse.token, sparse.feature])


def test_every_case_that_is_kept_is_read() -> None:
    assert {path.name for path in CASES.iterdir()} == {*ARCHS, "saelens-head"}


def test_an_sae_of_one_head_reads_that_head_of_all() -> None:
    wanted = expected("saelens-head")
    sae = converted("saelens-head")
    z = torch.randn(len(wanted["z"]), HEADS * D_HEAD)
    z[:, 2 * D_HEAD : 3 * D_HEAD] = wanted["z"]
    assert close(sae.encode(z), wanted["acts"])
    by_head = sae(z).unflatten(-1, (HEADS, D_HEAD))
    assert close(by_head[:, 2], wanted["z_hat"])
    assert not by_head[:, [0, 1, 3]].any()
    assert sae.cfg.imported is not None
    assert "head 2 alone" in sae.cfg.imported.notes[0]


@pytest.mark.parametrize("case", ["kissane", "saelens-head"])
def test_value_biases_that_were_folded_away_are_put_back(case: str) -> None:
    """z of weights as they are is z of folded ones plus what the biases give every token through the heads."""
    wanted = expected(case)
    model = lens(bias=1.0)
    sae = convert(open_peer(place(case)), model, case, folded=True)
    constant = (model.values.norm_bias + model.values.v_bias)[[0, 0, 1, 1]]
    z = wanted["z"] + constant.flatten() if case == "kissane" else torch.randn(len(wanted["z"]), HEADS * D_HEAD)
    if case != "kissane":
        z[:, 2 * D_HEAD : 3 * D_HEAD] = wanted["z"] + constant[2]
    assert close(sae.encode(z), wanted["acts"])
    rebuilt = sae(z).unflatten(-1, (HEADS, D_HEAD)) - constant
    assert close(rebuilt.flatten(1) if case == "kissane" else rebuilt[:, 2], wanted["z_hat"])


def test_kissanes_are_folded_unless_a_person_says_otherwise() -> None:
    folded, plain = (convert(open_peer(place("kissane")), lens(bias=1.0), "x", folded=said) for said in (None, False))
    assert not torch.equal(folded.b_dec, plain.b_dec)
    same = convert(open_peer(place("saelens-standard")), lens(bias=1.0), "x")
    assert torch.equal(same.b_dec, converted("saelens-standard").b_dec)


# ---- to SAELens and back ----


@pytest.mark.parametrize("case", [case for case in ARCHS if ARCHS[case] in ("relu", "topk", "jumprelu", "gated", "batchtopk")])
def test_a_saelens_folder_of_ours_comes_back_the_same(case: str, tmp_path: Path) -> None:
    sae = converted(case)
    write_saelens(sae, tmp_path)
    # Whoever may read the settings may read the weights.
    assert (tmp_path / "sae_weights.safetensors").stat().st_mode == (tmp_path / "cfg.json").stat().st_mode
    again = convert(open_peer(tmp_path, "saelens"), lens(), "x")
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        assert torch.equal(getattr(again, name), getattr(sae, name)), name
    assert again.cfg.input_norm == sae.cfg.input_norm
    z = expected(case)["z"]
    assert torch.equal(again.encode(z), sae.encode(z))


def test_a_folder_of_ours_is_taken_as_it_is(tmp_path: Path) -> None:
    sae = converted("saelens-jumprelu")
    save_sae(sae, tmp_path)
    assert (tmp_path / "sae.safetensors").stat().st_mode == (tmp_path / "cfg.json").stat().st_mode
    again = convert(open_peer(tmp_path), lens(), "x")
    assert again.cfg.imported is not None
    assert again.cfg.imported.format == "headscope"
    assert torch.equal(again.W_enc, sae.W_enc)


# ---- what is refused, and why ----


def copied(case: str, folder: Path) -> Path:
    return Path(shutil.copytree(CASES / case, folder / case))


def edited(case: str, folder: Path, **fields: Any) -> Path:
    """The case with fields of its config changed, in `metadata` too."""
    path = copied(case, folder)
    file = next(p for p in (path / "cfg.json", path / "config.json", *path.glob("*_cfg.json")) if p.exists())
    config = json.loads(file.read_text())
    for name, value in fields.items():
        (config["metadata"] if name in config.get("metadata", {}) else config)[name] = value
    file.write_text(json.dumps(config))
    return path


def retensored(path: Path, file: str, **tensors: Tensor | None) -> Path:
    stored = load_file(path / file) | {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file({name: t.contiguous() for name, t in stored.items() if tensors.get(name, t) is not None}, path / file)
    return path


def refusal(path: Path, kind: type[HeadscopeError] = UnreadableSAE, **how: Any) -> str:
    with pytest.raises(kind) as found:
        convert(open_peer(path), lens(), "x", **how)
    said = str(found.value)
    assert said.endswith((".", ")."))
    return said


def test_what_our_form_cannot_carry_is_refused_by_name(tmp_path: Path) -> None:
    for number, (fields, named) in enumerate(
        [
            ({"normalize_activations": "layer_norm"}, "layer_norm: the reconstruction adds each token's mean back"),
            ({"normalize_activations": "covariance_whitening"}, "not folded into the weights"),
            ({"normalize_activations": "expected_average_only_in"}, "give it with --scale"),
            ({"architecture": "transcoder"}, "architecture transcoder"),
            ({"hook_name": "blocks.1.hook_resid_pre"}, "blocks.1.hook_resid_pre"),
            ({"activation_fn": "tanh-relu"}, "tanh-relu"),
        ]
    ):
        assert named in refusal(edited("saelens-standard", tmp_path / str(number), **fields), UnsupportedSAE)
    for field in ("transcode", "skip_connection", "signed"):
        assert f"says {field}" in refusal(edited("sparsify", tmp_path / field, **{field: True}), UnsupportedSAE, layer=LAYER)
    assert "groupmax" in refusal(edited("sparsify", tmp_path / "g", activation="groupmax"), UnsupportedSAE, layer=LAYER)
    normed = edited("saelens-standard-normed", tmp_path / "n")
    with pytest.raises(UnsupportedSAE, match="less the value biases"):
        convert(open_peer(normed), lens(bias=1.0), "x", folded=True)
    one_head = edited("saelens-head", tmp_path / "h", normalize_activations="constant_norm_rescale")
    assert "norm of one head" in refusal(one_head, UnsupportedSAE)


def test_a_factor_given_by_a_person_is_folded_in(tmp_path: Path) -> None:
    path = edited("saelens-standard", tmp_path, normalize_activations="expected_average_only_in")
    wanted = expected("saelens-standard")
    sae = convert(open_peer(path, scale=4.0), lens(), "x")
    assert sae.cfg.scale == 4.0
    assert close(sae.encode(wanted["z"] / 4), wanted["acts"])
    assert close(4 * sae(wanted["z"] / 4), wanted["z_hat"])
    with pytest.raises(UsageError, match="says its scale itself"):
        open_peer(place("sparsify"), scale=4.0)


def test_a_layer_that_the_files_do_not_say_must_be_said(tmp_path: Path) -> None:
    assert "name the layer" in refusal(place("sparsify"), UnsupportedSAE)
    assert "SAE of layer 1, and layer 0 was asked for" in refusal(place("kissane"), SAEMismatch, layer=0)
    there = tmp_path / "params.npz"
    shutil.copy(place("gemma-scope"), there)
    assert "name the layer" in refusal(there, UnsupportedSAE)
    with pytest.raises(LayerOutOfRange, match="reads layer 1, and tiny has layers 0 to 0"):
        convert(open_peer(place("kissane")), lens(n_layers=1), "x")


def test_a_model_of_another_width_is_refused() -> None:
    with pytest.raises(SAEMismatch, match="reads 32 numbers a token, and z of tiny has 6 heads of 8, together 48"):
        convert(open_peer(place("kissane")), lens(n_heads=6), "x")


class Bomb:
    """What a pickle can hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("bomb-went-off"),))


def test_a_pickle_with_code_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for case, name in (("kissane", "tiny_L1_Hcat_z_v9.pt"), ("dictionary_learning-AutoEncoder", "ae.pt")):
        path = copied(case, tmp_path)
        torch.save({"W_enc": Bomb()}, path / name)
        said = refusal(path, layer=LAYER)
        assert name in said
        assert "could run code" in said
        (path / name).write_bytes(pickle.dumps(Bomb()))
        assert name in refusal(path, layer=LAYER)
    objects = tmp_path / "layer_1" / "params.npz"
    objects.parent.mkdir()
    np.savez(objects, W_enc=np.array([Bomb()], dtype=object), allow_pickle=True)
    assert "could run code" in refusal(objects)
    assert not (tmp_path / "bomb-went-off").exists()


@pytest.mark.parametrize("case", ["saelens-standard", "sparsify", "kissane", "dictionary_learning-AutoEncoderTopK"])
def test_damaged_weights_are_named(case: str, tmp_path: Path) -> None:
    path = copied(case, tmp_path)
    file = next(p for p in path.iterdir() if p.suffix in (".pt", ".safetensors") and p.name != "expected.safetensors")
    whole = file.read_bytes()
    # A pickle's call with arguments that do not fit: what atheris made of a zip file by changing six bytes of it.
    miscalled = b"\x80\x02ccollections\nOrderedDict\n(K\x01K\x01K\x01tR."
    for damaged in (whole[: len(whole) // 2], b"", b"not an SAE at all", miscalled):
        file.write_bytes(damaged)
        assert file.name in refusal(path, layer=LAYER)


def test_damaged_configs_are_named(tmp_path: Path) -> None:
    for case, name in (("saelens-standard", "cfg.json"), ("dictionary_learning-AutoEncoder", "config.json")):
        path = copied(case, tmp_path)
        for text in ("{", "[1]", '{"trainer": 3}'):
            (path / name).write_text(text)
            assert name in refusal(path, layer=LAYER)
    path = edited("saelens-standard", tmp_path / "odd", metadata=[1], activation_fn_kwargs=3, architecture=["relu"])
    assert "the architecture ['relu']" in refusal(path, UnsupportedSAE)
    path = copied("dictionary_learning-AutoEncoder", tmp_path / "odd")
    (path / "config.json").write_text('{"trainer": {"dict_class": ["AutoEncoder"]}}')
    assert "dict_class ['AutoEncoder']" in refusal(path, UnsupportedSAE, layer=LAYER)
    archive = tmp_path / "params.npz"
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("W_enc.npy", b"nothing")
    assert "params.npz" in refusal(archive)


def test_tensors_that_are_missing_misshapen_or_not_numbers_are_named(tmp_path: Path) -> None:
    weights = "sae_weights.safetensors"
    path = copied("saelens-jumprelu", tmp_path / "a")
    assert "lacks the tensor b_enc" in refusal(retensored(path, weights, b_enc=None))
    path = copied("saelens-jumprelu", tmp_path / "b")
    assert "b_enc" in refusal(retensored(path, weights, b_enc=torch.zeros(41)))
    path = copied("saelens-jumprelu", tmp_path / "c")
    assert "W_dec" in refusal(retensored(path, weights, W_dec=torch.full((40, 32), torch.nan)))
    assert "should be a whole number" in refusal(edited("saelens-topk", tmp_path / "d", k=None))
    assert "W_enc" in refusal(edited("saelens-standard", tmp_path / "e", d_in=33))
    arrays = dict(np.load(place("gemma-scope")))
    np.savez(tmp_path / "params.npz", **{name: array for name, array in arrays.items() if name != "threshold"})
    assert "lacks the tensor threshold" in refusal(tmp_path / "params.npz")
    np.savez(tmp_path / "params.npz", **(arrays | {"threshold": np.zeros(3, np.float32)}))
    assert "threshold" in refusal(tmp_path / "params.npz")
    buffer = io.BytesIO()
    torch.save([torch.zeros(2)], buffer)
    path = copied("kissane", tmp_path)
    (path / "tiny_L1_Hcat_z_v9.pt").write_bytes(buffer.getvalue())
    assert "no state dict" in refusal(path)


def test_a_want_of_memory_is_not_laid_to_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError):
        open_peer(place("kissane"))


def test_what_is_no_sae_is_refused_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert "notes.txt" in refusal(tmp_path)
    with pytest.raises(UnreadableSAE, match="no file or folder"):
        open_peer(tmp_path / "none")
    with pytest.raises(UsageError, match="There is no format pickle"):
        open_peer(tmp_path, "pickle")
    with pytest.raises(UnreadableSAE, match="in the format sparsify"):
        open_peer(place("kissane"), "sparsify")
    two = copied("kissane", tmp_path)
    for name in ("tiny_L1_Hcat_z_v9.pt", "tiny_L1_Hcat_z_v9_cfg.json"):
        shutil.copy(two / name, two / f"b{name}")
    assert "holds 2 SAEs" in refusal(two)


# ---- from the hub ----


def test_what_the_hub_has_is_found_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub is reachable in a test: the cache has what an earlier download left, laid out by huggingface_hub's own rules."""
    import huggingface_hub.constants as hub

    commit = "0" * 40
    repo = tmp_path / "models--someone--saes"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    copied("saelens-standard", snapshot)
    copied("kissane", snapshot)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    assert fetched("someone/saes/saelens-standard") == snapshot / "saelens-standard"
    assert open_peer(fetched("hf:someone/saes/kissane/tiny_L1_Hcat_z_v9.pt")).folded
    with pytest.raises(UnreadableSAE, match="has no nothing"):
        fetched("someone/saes/nothing")
    with pytest.raises(DownloadFailed, match="someone/else could not be fetched"):
        fetched("someone/else/x")
    with pytest.raises(UnreadableSAE, match="There is no file or folder"):
        fetched("./someone/saes")


def test_a_path_is_a_path_before_it_is_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "someone" / "saes"
    path.mkdir(parents=True)
    assert fetched("someone/saes") == path

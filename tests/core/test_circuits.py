"""OV circuits: constructed ones with a known answer, and brute force over the vocabulary of tiny models."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_core.lens import Lens
from sae_core.studies.circuits import Class, by_sequence, classes, copying, successors

N, D, D_HEAD = 300, 48, 16


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(v: Tensor, o: Tensor) -> Tensor:
    """C [n, n] itself, centred both ways."""
    c = v.double() @ o.double().T
    c = c - c.mean(0)
    return c - c.mean(1, keepdim=True)


def test_a_head_whose_output_undoes_its_values_copies_and_its_negative_suppresses() -> None:
    embedding, W_V = drawn(N, D), drawn(D, D_HEAD, seed=1)
    v = embedding @ W_V
    found = copying(v, embedding @ W_V)  # tied unembedding, W_O = W_V^T: C is a Gram matrix, so no eigenvalue is below 0
    assert found.eigenvalues == pytest.approx(1)
    assert found.own > 2
    against = copying(v, -(embedding @ W_V))
    assert against.eigenvalues == pytest.approx(-1)
    assert against.own == pytest.approx(-found.own)


def test_a_head_that_turns_what_it_reads_by_a_right_angle_does_neither() -> None:
    v = drawn(N, D_HEAD)
    turned = torch.cat([v[:, 1::2, None], -v[:, ::2, None]], 2).flatten(1)  # each pair of coordinates by 90 degrees
    found = copying(v, turned)
    assert found.eigenvalues == pytest.approx(0, abs=0.1)
    assert found.own == pytest.approx(0, abs=0.01), "a vector is at a right angle to what it is turned to"


def test_what_a_head_writes_of_every_token_alike_is_no_copying() -> None:
    v, o = drawn(N, D_HEAD), drawn(N, D_HEAD, seed=1)
    plain, moved = copying(v, o), copying(v + 100 * drawn(1, D_HEAD, seed=2), o - 7)
    assert moved.eigenvalues == pytest.approx(plain.eigenvalues, abs=1e-6)
    assert moved.own == pytest.approx(plain.own, abs=1e-6)
    assert abs(plain.eigenvalues) < 0.3, "random weights copy nothing"
    assert copying(torch.zeros(N, 4), torch.zeros(N, 4)) == (0.0, 0.0)


def test_the_small_matrix_has_the_eigenvalues_of_the_whole_vocabulary_s() -> None:
    v, o = drawn(N, D_HEAD), drawn(N, D_HEAD, seed=1) + 0.2 * drawn(N, D_HEAD)
    whole = dense(v, o).numpy()
    values = np.linalg.eigvals(whole)
    found = copying(v, o)
    assert found.eigenvalues == pytest.approx(values.real.sum() / np.abs(values).sum(), abs=1e-6)
    assert found.own == pytest.approx((whole.diagonal() / whole.std(1)).mean(), rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "pythia", "olmo2"])
@pytest.mark.parametrize("layer", [0, 1])
def test_values_of_tokens_alone_are_those_that_a_row_of_one_token_has(
    tiny_lens: Callable[[str], Lens], kind: str, layer: int
) -> None:
    lens, ids = tiny_lens(kind), list(range(5, 60))
    hooked = lens.read_attention(torch.tensor(ids)[:, None], layer).v[:, 0]
    streams = lens.alone(ids)
    found = lens.values(streams.later if layer else streams.first, layer)
    # Biases are the same for every token, and left out here.
    assert found - found.mean(0) == pytest.approx(hooked - hooked.mean(0), abs=2e-5 * float(hooked.abs().max()))


# ---- successors ----


def test_classes_are_tokens_of_one_sequence_and_one_form_in_order() -> None:
    words = [" Monday", " Tuesday", " Thursday", " Friday", " monday", "Monday", "x", " Wednesday", "7", "8", "9", "1984", "6"]
    found = {one.sequence: one for one in classes(dict(enumerate(words)))}
    assert set(found) == {"weekday", "number"}, "of ` monday` and `Monday` there are too few"
    days = found["weekday"]
    assert [words[i] for i in days.ids] == [" Monday", " Tuesday", " Wednesday", " Thursday", " Friday"]
    assert days.after == ((0, 1), (1, 2), (2, 3), (3, 4)), "no Saturday, so Friday is not asked"
    assert [words[i] for i in found["number"].ids] == ["6", "7", "8", "9"]
    whole = classes(dict(enumerate(["sun", "mon", "tue", "wed", "thu", "fri", "sat"])))
    assert ("short weekday", 6) in [(one.sequence, after) for one in whole for _, after in one.after]
    assert len(whole[0].after) == 7, "the week begins again"


def test_the_score_is_the_share_whose_successor_is_first() -> None:
    letters = Class("letter", tuple(range(26)), tuple((i, i + 1) for i in range(25)))
    steps = torch.eye(26).roll(1, 1)  # each writes the one after it
    assert successors(steps, letters) == 1
    assert successors(torch.eye(26), letters) == 0, "a copy is no successor"
    half = torch.where((torch.arange(26) < 5)[:, None], steps, torch.eye(26))
    assert successors(half, letters) == 5 / 25
    assert successors(-steps, letters) == 0


def test_a_sequence_of_many_forms_counts_once() -> None:
    days, letters = (Class(name, (0, 1, 2, 3), ((0, 1),)) for name in ("weekday", "letter"))
    assert by_sequence([1.0, 0.0, 0.5], [letters, letters, days]) == {"letter": 0.5, "weekday": 0.5}

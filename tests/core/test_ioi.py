"""The indirect-object study: prompts and places by their words, and every number against hooks set by hand, prompt by prompt."""

from collections.abc import Callable, Generator
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_core.config import IoiStudy
from sae_core.errors import UsageError
from sae_core.lens import Lens
from sae_core.progress import Progress
from sae_core.saes import SAE
from sae_core.studies import ioi as study
from sae_core.studies.ioi import Ioi, Prompt, ioi, prompts, rows_of, single_names
from tests.core.test_interventions import by_hand
from tests.core.test_rdfa import random_sae

R = TypeVar("R")
LAYER = 2


def done(reports: Generator[Progress, None, R]) -> R:
    """What a study returns; the reports of each of its phases go up to their total."""
    last: dict[str, Progress] = {}
    while True:
        try:
            report = next(reports)
            before = last.get(report.phase)
            assert (0 if before is None else before.done) < report.done <= report.total
            assert before is None or before.total == report.total
            last[report.phase] = report
        except StopIteration as end:
            assert all(report.done == report.total for report in last.values())
            found: R = end.value
            return found


@pytest.fixture(autouse=True)
def small_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny tokenizer has letters for names, and the tiny models short rows."""
    shrink(monkeypatch)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of letters."""
    names = {
        "NAMES": tuple("CDEFGHJKLMNP"),
        "SENTENCES": (("if", "at {place}", "{s} to {thing}"), ("so", "by {place}", "{s} at {thing}")),
        "PLACES": ("x", "yy"), "THINGS": ("v", "w"), "BEFORE": "oh. ", "INSERTED": " so",
    }  # fmt: skip
    for name, value in names.items():
        monkeypatch.setattr(study, name, value)


def small(**changed: object) -> IoiStudy:
    fields = {"sae": "x", "samples": 8, "features": 3, "random": 4, "words": ("or", "with"), "pass_tokens": 100}
    return IoiStudy.model_validate(fields | changed)


def made(lens: Lens, **changed: object) -> tuple[SAE, IoiStudy, Ioi]:
    sae, cfg = random_sae(lens, LAYER), small(**changed)
    return sae, cfg, done(ioi(lens, sae, cfg))


def at_each(lens: Lens, every: list[Prompt]) -> list[tuple[Tensor, int, int, int]]:
    """(row, S2, IO's id, S's id) of each prompt, by its letters alone."""
    found = []
    for prompt in every:
        ids = [lens.row_start, *lens.encode([prompt.text])[0]]
        texts = lens.token_texts(ids)
        s2 = max(i for i, text in enumerate(texts) if text == prompt.s2)
        io, s = (lens.encode([name])[0][0] for name in (prompt.io, prompt.s))
        found.append((torch.tensor([ids]), s2, io, s))
    return found


def difference(lens: Lens, row: Tensor, io: int, s: int, layers: dict[int, Callable[[Tensor], Tensor]]) -> float:
    logits = by_hand(lens, row, layers)[0, -1]
    return float(logits[io] - logits[s])


def put(at: int, vector: Tensor) -> Callable[[Tensor], Tensor]:
    def change(z: Tensor) -> Tensor:
        z = z.clone()
        z[0, at] = vector
        return z

    return change


def mean(values: list[float], every: list[Prompt], template: str) -> float:
    mine = [value for value, prompt in zip(values, every, strict=True) if prompt.template == template]
    return sum(mine) / len(mine)


def test_prompts_alternate_and_hold_each_name_as_often_as_their_template_says(tiny_lens: Callable[[str], Lens]) -> None:
    lens, cfg = tiny_lens("llama"), small(samples=40)
    names = single_names(lens)
    every = prompts(cfg, list(names))
    assert [one.template for one in every] == ["ABBA", "BABA"] * 20
    assert every == prompts(cfg, list(names))
    assert every != prompts(small(samples=40, seed=1), list(names))
    rows = rows_of(lens, names, every)
    for prompt, row, s2, end in zip(every, rows.tokens, rows.s2.tolist(), rows.end.tolist(), strict=True):
        texts = lens.token_texts(row.tolist())
        order = [text for text in texts if text in (prompt.io, prompt.s)]
        a, b = prompt.io, prompt.s
        assert order == ([a, b, b] if prompt.template == "ABBA" else [b, a, b])
        assert (texts[s2], "".join(texts[1 : end + 1])) == (prompt.s, prompt.text)
    changed = study.changed_prompts(cfg, every, list(names))
    assert list(changed) == ["names", "moved", "names moved", "or", "with", "exchanged", "third"]
    for name, (_, those) in changed.items():
        for was, now in zip(every, those, strict=True):
            kept = {was.io, was.s} & {now.io, now.s}
            assert kept == (set() if "names" in name else {was.io, was.s})
            assert (now.template == was.template) == (name != "exchanged")
            assert (now.s2 == now.s) == (name != "third")
            assert ("oh. " in now.text) == ("moved" in name)
            assert (f" {name} " in now.text) == (name in ("or", "with"))


@pytest.mark.parametrize(("norm", "d_sae", "rate"), [("none", 96, 0.1), ("token", 96, 0.1), ("none", 5, 0.9)])
def test_every_change_is_that_of_a_hook_at_each_prompts_own_second_subject(
    tiny_lens: Callable[[str], Lens], norm: str, d_sae: int, rate: float
) -> None:
    """Of five features all fire, and there are fewer others than directions are asked for."""
    lens, cfg = tiny_lens("llama"), small(random=7)
    sae = random_sae(lens, LAYER, d_sae, rate=rate, norm=norm)
    found = done(ioi(lens, sae, cfg))
    names = list(single_names(lens))
    every = prompts(cfg, names)
    places = at_each(lens, every)
    assert len({s2 for _, s2, _, _ in places}) > 1, "prompts have their own S2"
    zs = [lens.read_z(row, [LAYER])[LAYER][0, s2] for row, s2, _, _ in places]
    plain = [difference(lens, row, io, s, {}) for row, _, io, s in places]
    for template in ("ABBA", "BABA"):
        assert getattr(found.difference, template).mean == pytest.approx(mean(plain, every, template), abs=1e-4)
    assert found.right.hits == sum(value > 0 for value in plain)
    codes = [sae.encode(z[None])[0] for z in zs]
    by_size = torch.stack(codes).mean(0).argsort(descending=True)[:3].tolist()
    assert {one.index for one in found.features} == set(by_size)
    scales = [lens.info.d_in**0.5 / float(z.norm()) if norm == "token" else 1.0 for z in zs]

    def changes(directions: Callable[[Tensor], Tensor]) -> list[float]:
        """Of the logit difference of each prompt, less what its features give along some directions."""
        vectors = [z - directions(f) / scale for z, f, scale in zip(zs, codes, scales, strict=True)]
        return changed_by(lens, places, plain, vectors)

    for one in found.features:
        holds(one.change, changes(lambda f, index=one.index: f[index] * sae.W_dec[index]), every)
        acts = [float(f[one.index]) for f in codes]
        for template in ("ABBA", "BABA"):
            assert getattr(one.activation, template) == pytest.approx(mean(acts, every, template), rel=1e-4)
    holds(found.error, changed_by(lens, places, plain, [sae(z[None])[0] for z in zs]), every)
    holds(found.every, changes(lambda f: f @ sae.W_dec), every)
    fires = [any(f[index] > 0 for f in codes) for index in range(d_sae)]
    assert found.n_live == sum(fires)
    sizes = [max(abs(one.change.ABBA.mean or 0), abs(one.change.BABA.mean or 0)) for one in found.features]
    assert sizes == sorted(sizes, reverse=True)

    # Other directions, as long as the feature's own: of features that are silent here, or of all others where none is.
    assert [one.index for one in found.controls] == [one.index for one in found.features]
    for one in found.controls:
        others = [index for index in range(d_sae) if not fires[index]] or [index for index in range(d_sae) if index != one.index]
        drawn = np.random.default_rng((cfg.seed, 2, one.index)).choice(others, min(7, len(others)), replace=False)
        own = changes(lambda f, index=one.index: f[index] * sae.W_dec[index])
        size, template = max((abs(mean(own, every, name)), name) for name in ("ABBA", "BABA"))
        moved = []
        for other in drawn.tolist():
            along = sae.W_dec[other] * float(sae.W_dec[one.index].norm()) / float(sae.W_dec[other].norm())
            moved.append(mean(changes(lambda f, index=one.index, along=along: f[index] * along), every, template))
        assert (one.template, one.as_large.n) == (template, min(7, d_sae - 1))
        assert one.change == pytest.approx(mean(own, every, template), abs=1e-5)
        assert one.random_mean == pytest.approx(np.mean(moved), abs=1e-5)
        assert one.random_spread == pytest.approx(np.std(moved), abs=1e-5)
        assert one.as_large.hits == sum(abs(value) >= size for value in moved)


def changed_by(lens: Lens, places: list[Any], plain: list[float], vectors: list[Tensor]) -> list[float]:
    """What each prompt's logit difference changes by when a vector is put in the place of z at its S2."""
    return [
        difference(lens, row, io, s, {LAYER: put(s2, vector)}) - before
        for (row, s2, io, s), vector, before in zip(places, vectors, plain, strict=True)
    ]


def holds(said: study.Changes, change: list[float], every: list[Prompt]) -> None:
    for template in ("ABBA", "BABA"):
        assert getattr(said, template).mean == pytest.approx(mean(change, every, template), rel=1e-3, abs=1e-5)
    assert max(map(abs, change)) > 1e-3, "something changed"


def test_of_few_ablations_the_z_is_held_at_once(tiny_lens: Callable[[str], Lens], monkeypatch: pytest.MonkeyPatch) -> None:
    """z of all prompts with each feature ablated would fill the memory: a group's is made, put in, and let go."""
    monkeypatch.setattr(study, "GROUP", 2)
    waiting, most = [0], [0]
    without, differences = study._without, study._Measure.differences

    def make(*given: Any) -> Tensor:
        waiting[0] += 1
        most[0] = max(most[0], waiting[0])
        return without(*given)

    def put_in(self: study._Measure, layer: int, z_at_s2: Any) -> list[Tensor]:
        waiting[0] = 0
        return differences(self, layer, z_at_s2)

    monkeypatch.setattr(study, "_without", make)
    monkeypatch.setattr(study._Measure, "differences", put_in)
    _, _, found = made(tiny_lens("llama"), features=5, random=5)
    assert (len(found.features), most) == (5, [2])


@pytest.mark.parametrize("layers", [(), (1,)])
def test_z_of_changed_prompts_is_put_from_their_second_subject_to_ours(
    tiny_lens: Callable[[str], Lens], layers: tuple[int, ...]
) -> None:
    lens = tiny_lens("gemma2")
    sae, cfg, found = made(lens, layers=layers)
    names = list(single_names(lens))
    every = prompts(cfg, names)
    places = at_each(lens, every)
    plain = [difference(lens, row, io, s, {}) for row, _, io, s in places]
    changed = study.changed_prompts(cfg, every, names)
    replaced = sorted({LAYER, *layers})
    assert found.layers == replaced
    known = {one.name: one for one in found.conditions}
    for name in ("moved", "exchanged", "third", "with"):
        there = at_each(lens, changed[name][1])
        now, acts = [], []
        for (row, s2, io, s), (other, other_s2, _, _) in zip(places, there, strict=True):
            zs = lens.read_z(other, replaced)
            now.append(difference(lens, row, io, s, {one: put(s2, zs[one][0, other_s2]) for one in replaced}))
            acts.append(float(sae.encode(zs[LAYER][0, other_s2][None])[0, found.features[0].index]))
        for template in ("ABBA", "BABA"):
            there_now, before = mean(now, every, template), mean(plain, every, template)
            assert getattr(known[name].difference, template).mean == pytest.approx(there_now, abs=1e-5)
            assert getattr(known[name].left, template) == pytest.approx(there_now / before, rel=1e-4, abs=1e-4)
            in_it = getattr(found.features[0].in_conditions[name], template)
            assert in_it == pytest.approx(mean(acts, every, template), rel=1e-3, abs=1e-5)
        assert max(abs(after - before) for after, before in zip(now, plain, strict=True)) > 1e-3
    assert [one.name for one in found.conditions][-3:] == ["shuffled", "mean", "zero"]
    zs = [{one: z[0, s2] for one, z in lens.read_z(row, replaced).items()} for row, s2, _, _ in places]
    means = {one: sum(z[one] for z in zs) / len(zs) for one in replaced}
    instead = {
        "shuffled": [zs[other] for other in study._derangement(every, cfg).tolist()],
        "mean": [means] * len(zs),
        "zero": [{one: torch.zeros(lens.info.d_in) for one in replaced}] * len(zs),
    }
    for name, there_z in instead.items():
        now = [
            difference(lens, row, io, s, {one: put(s2, z[one]) for one in replaced})
            for (row, s2, io, s), z in zip(places, there_z, strict=True)
        ]
        for template in ("ABBA", "BABA"):
            assert getattr(known[name].difference, template).mean == pytest.approx(mean(now, every, template), abs=1e-5)
        assert max(abs(after - before) for after, before in zip(now, plain, strict=True)) > 1e-3


def test_another_prompts_z_is_never_ones_own() -> None:
    every = [Prompt(study.TEMPLATES[i % 2], "C", "D", "D", 0, "x", "v") for i in range(20)]
    order = study._derangement(every, small(samples=20)).tolist()
    assert sorted(order) == list(range(20))
    assert all(a != b and (a - b) % 2 == 0 for a, b in enumerate(order))


def test_a_model_without_names_and_a_config_without_pairs_get_a_sentence(
    tiny_lens: Callable[[str], Lens], monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = tiny_lens("llama")
    monkeypatch.setattr(study, "NAMES", ("Mary", "John", "C"))
    with pytest.raises(UsageError, match="only 1 are single tokens"):
        done(ioi(lens, random_sae(lens, LAYER), small()))
    taken = ("and", "names", "moved", "exchanged", "third", "shuffled", "mean", "zero")
    for word in taken:
        with pytest.raises(ValueError, match=f"must differ from each other and from {', '.join(taken)}"):
            small(words=("or", word))
    for change, says in (({"samples": 9}, "even"), ({"words": ("or", "or")}, "differ"), ({"words": ("a b",)}, "pattern")):
        with pytest.raises(ValueError, match=says):
            small(**change)


@pytest.mark.real
def test_smollm2_prefers_the_indirect_object_and_a_third_name_at_s2_takes_some_of_it(
    smollm2_lens: Lens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    sae = random_sae(smollm2_lens, 17, 1152, rate=0.02)
    found = done(ioi(smollm2_lens, sae, small(features=1, random=1, words=("alongside",))))
    assert found.names > 30
    assert found.right.hits == 8
    known = {one.name: one.left for one in found.conditions}
    assert abs(known["names"].ABBA - 1) < 0.2
    assert known["third"].ABBA < 0.9

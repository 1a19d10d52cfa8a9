"""The indirect-object experiment (Kissane et al. 2024, after Wang et al. 2023) on an SAE of any model.

"When Mary and John went to the store, John gave a drink to" goes on with the name that stood once (IO, Mary), not the one that
stood twice (S, John). The paper looks at attention output at the second subject, S2. Half of the prompts are ABBA (IO first),
half BABA (S first), with random names, places and things; the measure is logit(IO) - logit(S) after the last token.

(a) features   Each of the features that fire most at S2 is ablated there, and there alone, with the SAE's error kept: the change
               of the logit difference, by template. Beside them the error itself, and all features at once.
(b) controls   For the features with the largest changes: the same length taken off along the decoder directions of other
               features, drawn at random. A change is the feature's own if hardly any of these does as much.
(c) what the   z at S2 is taken from a changed prompt (resample ablation): other names; the same names at other positions in the
    layer      row; both; " and" replaced by " alongside" and, as controls, by other words; the two first names exchanged; S2 a
    says       third name; another prompt of the same template. How much of the logit difference is left says what of the prompt
               z at S2 stands for. Zeros and the mean over the prompts are there to compare.

Every prompt has its own S2 and its own last token: all that is read or replaced is indexed by prompt. (The published code sets
features at all prompts' positions in every prompt, and zeroes the whole layer where it means S2.) The row start stands
before each prompt, as everywhere here; the paper's prompts have none.
"""

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_core.config import IoiStudy
from sae_core.errors import UsageError
from sae_core.evaluate import Interval, interval
from sae_core.progress import Clock, Progress
from sae_core.saes import SAE
from sae_core.studies.passes import codes_at, putting
from sae_core.studies.shares import Record, Share, share, short

if TYPE_CHECKING:
    from sae_core.lens import Lens

Template = Literal["ABBA", "BABA"]
TEMPLATES: tuple[Template, Template] = ("ABBA", "BABA")

NAMES = (
    "Mary", "John", "Tom", "James", "Dan", "Martin", "Amy", "Anna", "Kate", "Sarah", "David", "Michael", "Paul", "Mark",
    "Peter", "George", "Alice", "Emma", "Laura", "Jack", "Henry", "Adam", "Jane", "Robert", "Lisa", "Daniel", "Simon",
    "Rachel", "Kevin", "Brian", "Susan", "Helen", "Andrew", "Steven", "Lucy", "Julia", "Frank", "Alex", "Ben", "Sam", "Eric",
    "Rose", "Grace", "Max", "Victor",
)  # fmt: skip
PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station")
THINGS = ("ring", "drink", "book", "basket", "letter", "computer", "snack", "map")
SENTENCES = (
    ("When", "went to the {place}", "{s} gave a {thing} to"),
    ("After", "sat down at the {place}", "{s} handed a {thing} to"),
    ("While", "were working at the {place}", "{s} showed a {thing} to"),
    ("Once", "had come to the {place}", "{s} passed a {thing} to"),
    ("Then, when", "met at the {place}", "{s} decided to give a {thing} to"),
    ("Because", "had to wait at the {place}", "{s} offered a {thing} to"),
)
BEFORE, INSERTED = "It was a nice day. ", " while the weather was nice"
LEAST_NAMES = 8
TESTED = 3
"""Features that random directions are held against."""


class ByTemplate(Record):
    """A number for each template."""

    ABBA: float
    BABA: float


class Changes(Record):
    """Change of the logit difference, paired over prompts; 95 % intervals."""

    ABBA: Interval
    BABA: Interval


class FeatureEffect(Record):
    """A feature that fires at S2."""

    index: int
    activation: ByTemplate
    """Mean at S2."""
    in_conditions: dict[str, ByTemplate]
    """The same in the changed prompts of (c), at their S2."""
    change: Changes
    """With it ablated at S2."""


class Control(Record):
    """A feature beside random directions of its length."""

    index: int
    template: Template
    """Where its change is larger."""
    change: float
    random_mean: float
    """Over directions."""
    random_spread: float
    """Standard deviation over directions."""
    as_large: Share
    """Directions that change the logit difference as much, whichever way."""


class Condition(Record):
    """z at S2 taken from changed prompts."""

    name: str
    says: str
    """What was changed."""
    example: str
    """The changed form of the first prompt; empty where z comes from no text."""
    left: ByTemplate
    """Mean logit difference over the plain one: 1 where nothing is lost."""
    difference: Changes
    """The logit difference itself."""


class Ioi(Record):
    """What the study found."""

    kind: Literal["ioi"] = "ioi"
    summary: str
    """In a line."""
    layer: int
    """The SAE's."""
    layers: list[int]
    """Whose z is replaced together in (c)."""
    samples: int
    """Prompts."""
    tokens: int
    """In all prompts."""
    names: int
    """Names that are single tokens."""
    words: list[str]
    example: str
    right: Share
    """Prompts whose logit difference is above 0."""
    difference: Changes
    """The logit difference of the model as it is."""
    features: list[FeatureEffect]
    """Largest change first."""
    n_live: int
    """Features that fire at S2 of any prompt."""
    error: Changes
    """Without the SAE's error at S2, its features as they are."""
    every: Changes
    """With all features at S2 ablated, its error kept."""
    random: int
    """Directions of each control."""
    controls: list[Control]
    conditions: list[Condition]
    notes: list[str]


# ------------------------------------------------------------------------------------------------------------ prompts


class Prompt(NamedTuple):
    """One prompt, in words."""

    template: Template
    io: str
    s: str
    s2: str
    """Who acts: `s`, unless a control puts a third name there."""
    sentence: int
    place: str
    thing: str
    word: str = "and"
    moved: bool = False

    @property
    def text(self) -> str:
        """As the model reads it."""
        opening, middle, rest = SENTENCES[self.sentence]
        first, second = (self.io, self.s) if self.template == "ABBA" else (self.s, self.io)
        clause = f"{opening} {first} {self.word} {second} {middle}"
        clause = f"{BEFORE}{clause}{INSERTED}" if self.moved else clause
        return f"{clause}, {rest}".format(place=self.place, thing=self.thing, s=self.s2)


class Rows(NamedTuple):
    """Prompts as rows, filled up behind their ends, which changes nothing before them."""

    tokens: Tensor
    """int64 [n, pos]"""
    s2: Tensor
    """int64 [n]: the second subject's own position in each prompt."""
    end: Tensor
    """int64 [n]: its last token."""
    answers: Tensor
    """int64 [n, 2]: ids of IO and S."""


def single_names(lens: "Lens") -> dict[str, int]:
    """Names that are one token in the middle of a text, with its id; UsageError where there are too few to draw from."""
    found = {}
    for name, ids in zip(NAMES, lens.encode([f"to {name}" for name in NAMES]), strict=True):
        if lens.token_texts(ids[-1:])[0].strip() == name:
            found[name] = ids[-1]
    if len(found) < LEAST_NAMES:
        raise UsageError(
            f"Of {len(NAMES)} common names only {len(found)} are single tokens of {lens.info.name}; the experiment needs "
            f"{LEAST_NAMES}, since it compares the logits of two names.",
            field="sae",
        )
    return found


def prompts(cfg: IoiStudy, names: Sequence[str]) -> list[Prompt]:
    """`samples` prompts, ABBA and BABA in turn."""
    draw = np.random.default_rng(cfg.seed % 2**63)
    made = []
    for i in range(cfg.samples):
        io, s = draw.choice(list(names), 2, replace=False).tolist()
        place, thing = str(draw.choice(PLACES)), str(draw.choice(THINGS))
        made.append(Prompt(TEMPLATES[i % 2], io, s, s, int(draw.integers(len(SENTENCES))), place, thing))
    return made


def rows_of(lens: "Lens", names: dict[str, int], every: Sequence[Prompt]) -> Rows:
    """Token rows of prompts, the row start first."""
    encoded = [[lens.row_start, *ids] for ids in lens.encode([prompt.text for prompt in every])]
    width = max(map(len, encoded))
    if width > lens.info.max_context:
        raise UsageError(f"{lens.info.name} takes at most {lens.info.max_context} tokens, and prompts have {width}.", field="sae")
    s2 = [len(ids) - 1 - ids[::-1].index(names[prompt.s2]) for ids, prompt in zip(encoded, every, strict=True)]
    for ids, at, prompt in zip(encoded, s2, every, strict=True):
        if ids.count(names[prompt.s]) + ids.count(names[prompt.io]) + (prompt.s2 != prompt.s) != 3 or at < 4:
            raise UsageError(f"'{prompt.text}' is not read by {lens.info.name} as single names.", field="sae")
    return Rows(
        torch.tensor([ids + [lens.row_start] * (width - len(ids)) for ids in encoded]),
        torch.tensor(s2),
        torch.tensor([len(ids) - 1 for ids in encoded]),
        torch.tensor([[names[prompt.io], names[prompt.s]] for prompt in every]),
    )


def changed_prompts(cfg: IoiStudy, every: Sequence[Prompt], names: Sequence[str]) -> dict[str, tuple[str, list[Prompt]]]:
    """By name: what was changed, and the prompts so changed."""
    draw = np.random.default_rng((cfg.seed % 2**63, 1))

    def others(prompt: Prompt, n: int) -> list[str]:
        free = [name for name in names if name not in (prompt.io, prompt.s)]
        chosen: list[str] = draw.choice(free, n, replace=False).tolist()
        return chosen

    renamed = []
    for prompt in every:
        io, s = others(prompt, 2)
        renamed.append(prompt._replace(io=io, s=s, s2=s))
    flipped: dict[Template, Template] = {"ABBA": "BABA", "BABA": "ABBA"}
    made = {
        "names": ("other names in their places", renamed),
        "moved": ("the same names at other positions", [prompt._replace(moved=True) for prompt in every]),
        "names moved": ("other names at other positions", [prompt._replace(moved=True) for prompt in renamed]),
    }
    for word in cfg.words:
        made[word] = (f"“and” replaced by “{word}”", [prompt._replace(word=word) for prompt in every])
    made["exchanged"] = ("the two first names exchanged", [p._replace(template=flipped[p.template]) for p in every])
    made["third"] = ("the second subject a third name", [p._replace(s2=others(p, 1)[0]) for p in every])
    return made


# ------------------------------------------------------------------------------------------------------------ measuring


class _Measure:
    """Logit differences of the prompts with z at S2 replaced."""

    def __init__(self, lens: "Lens", rows: Rows, cfg: IoiStudy) -> None:
        self.lens, self.rows = lens, rows
        self.at_once = max(1, min(cfg.pass_tokens // rows.tokens.shape[1], lens.logit_rows(rows.tokens.shape[1])))

    def at_s2(self, rows: Rows, layers: Sequence[int]) -> dict[int, Tensor]:
        """[n, d_in] by layer: z at each row's own S2."""
        parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        for low in range(0, len(rows.tokens), self.at_once):
            some = slice(low, low + self.at_once)
            place = torch.arange(len(rows.s2[some])), rows.s2[some]
            for layer, z in self.lens.read_z(rows.tokens[some], layers).items():
                parts[layer].append(z.cpu()[place])
        return {layer: torch.cat(found) for layer, found in parts.items()}

    def differences(self, layer: int, z_at_s2: Sequence[Tensor | None]) -> list[Tensor]:
        """[n] for each: logit(IO) - logit(S) with z [n, d_in] of the layer put at S2; None leaves it."""
        parts: list[list[Tensor]] = [[] for _ in z_at_s2]
        rows = self.rows
        for low in range(0, len(rows.tokens), self.at_once):
            some = slice(low, low + self.at_once)
            swaps = [None if z is None else putting(z[some], rows.s2[some]) for z in z_at_s2]
            found = self.lens.answers_with(rows.tokens[some], layer, swaps, rows.end[some], rows.answers[some])
            for part, answers in zip(parts, found, strict=True):
                part.append((answers[:, 0] - answers[:, 1]).double().cpu())
        return [torch.cat(part) for part in parts]

    def together(self, z_at_s2: dict[int, Tensor]) -> Tensor:
        """[n]: the same with several layers replaced in one pass."""
        rows, parts = self.rows, []
        for low in range(0, len(rows.tokens), self.at_once):
            some = slice(low, low + self.at_once)
            swaps = {layer: putting(z[some], rows.s2[some]) for layer, z in z_at_s2.items()}
            logits = self.lens.run_with(rows.tokens[some], swaps).logits
            at = torch.arange(len(logits), device=logits.device)
            ends = logits[at, rows.end[some].to(at.device)].gather(1, rows.answers[some].to(at.device))
            parts.append((ends[:, 0] - ends[:, 1]).double().cpu())
        return torch.cat(parts)


def ioi(lens: "Lens", sae: SAE, cfg: IoiStudy) -> Generator[Progress, None, Ioi]:
    """All parts. Raises UsageError where names are no single tokens of the model, LayerOutOfRange for one that it lacks."""
    layer = sae.cfg.site.layer
    layers = sorted({layer, *cfg.layers})
    for one in layers:
        lens.check_layer(one)
    names = single_names(lens)
    every = prompts(cfg, list(names))
    rows = rows_of(lens, names, every)
    measure, templates = _Measure(lens, rows, cfg), [prompt.template for prompt in every]
    changed = changed_prompts(cfg, every, list(names))
    zs = measure.at_s2(rows, layers)
    z, f = zs[layer], codes_at(sae, zs[layer])
    candidates = f.mean(0).topk(min(cfg.features, f.shape[1])).indices.tolist()
    candidates = [index for index in candidates if f[:, index].any()]
    drawn = min(cfg.random, len(_others(f, candidates[0]))) if candidates else 0
    passes = 4 + len(candidates) + min(TESTED, len(candidates)) * drawn + 2 * len(changed) + 3
    done, clock, ablated = 4, Clock("prompts", passes, "passes"), list[Tensor]()
    reconstructed = sae(z.to(sae.W_enc.device)).cpu()
    clean, no_error, none = measure.differences(layer, [None, reconstructed, z - f @ sae.W_dec.cpu() / _scale(sae, z)])
    yield clock.at(done)
    # In groups, so that a cancel is heard, one pass of the layers before serves many, and the z of few are held.
    for low in range(0, len(candidates), GROUP):
        some = [_without(sae, z, f, index) for index in candidates[low : low + GROUP]]
        ablated += measure.differences(layer, some)
        done += len(some)
        yield clock.at(done)
    order = sorted(range(len(candidates)), key=lambda i: -_largest(ablated[i] - clean, templates)[0])
    controls = []
    for i in order[:TESTED]:
        about = candidates[i], ablated[i] - clean
        controls.append((yield from _control(measure, sae, z, f, *about, clean, templates, cfg, clock, done)))
        done += drawn
    conditions, codes = [], dict[str, Tensor]()
    for name, (says, those) in changed.items():
        there = measure.at_s2(rows_of(lens, names, those), layers)
        codes[name] = codes_at(sae, there[layer])
        conditions.append(_condition(name, says, those[0].text, measure.together(there), clean, templates))
        done += 2
        yield clock.at(done)
    order_of = _derangement(every, cfg)
    without_text = (
        ("shuffled", "z of another prompt of the template", {one: part[order_of] for one, part in zs.items()}),
        ("mean", "the mean of z at S2 over all prompts", {one: part.mean(0).expand_as(part) for one, part in zs.items()}),
        ("zero", "zeros", {one: torch.zeros_like(part) for one, part in zs.items()}),
    )
    for name, says, there in without_text:
        conditions.append(_condition(name, says, "", measure.together(there), clean, templates))
        done += 1
        yield clock.at(done)
    features = [
        FeatureEffect(
            index=candidates[i],
            activation=_means(f[:, candidates[i]], templates),
            in_conditions={name: _means(there[:, candidates[i]], templates) for name, there in codes.items()},
            change=_changes(ablated[i] - clean, templates),
        )
        for i in order
    ]
    return Ioi(
        summary=_summary(clean, features, controls, conditions),
        layer=layer,
        layers=layers,
        samples=len(every),
        tokens=int((rows.end + 1).sum()),
        names=len(names),
        words=list(cfg.words),
        example=every[0].text,
        right=share(int((clean > 0).sum()), len(clean)),
        difference=_changes(clean, templates),
        features=features,
        n_live=int((f > 0).any(0).sum()),
        error=_changes(no_error - clean, templates),
        every=_changes(none - clean, templates),
        random=cfg.random,
        controls=controls,
        conditions=conditions,
        notes=_notes(clean, templates),
    )


GROUP = 8


def _scale(sae: SAE, z: Tensor) -> Tensor:
    scale = sae.token_scale(z)
    return torch.ones(()) if scale is None else scale


def _without(sae: SAE, z: Tensor, f: Tensor, index: int, direction: Tensor | None = None) -> Tensor:
    """z [n, d_in] less what the feature puts there, or as much along another direction; the error stays."""
    d = sae.W_dec[index] if direction is None else direction
    return z - f[:, index, None] * d.cpu() / _scale(sae, z)


def _control(
    measure: _Measure, sae: SAE, z: Tensor, f: Tensor, index: int, change: Tensor, clean: Tensor,
    templates: Sequence[Template], cfg: IoiStudy, clock: Clock, done: int,
) -> Generator[Progress, None, Control]:  # fmt: skip
    """The feature beside directions of other features, made as long as its own."""
    draw, others = np.random.default_rng((cfg.seed % 2**63, 2, index)), _others(f, index)
    chosen = draw.choice(others, min(cfg.random, len(others)), replace=False).tolist()
    length = sae.W_dec[index].norm()
    size, template = _largest(change, templates)
    mask = torch.tensor([one == template for one in templates])
    moved: list[float] = []
    for low in range(0, len(chosen), GROUP):
        some = [_without(sae, z, f, index, length * sae.W_dec[i] / sae.W_dec[i].norm()) for i in chosen[low : low + GROUP]]
        moved += [float((found - clean)[mask].mean()) for found in measure.differences(sae.cfg.site.layer, some)]
        yield clock.at(done + len(moved))
    spread = torch.tensor(moved, dtype=torch.float64)
    return Control(
        index=index,
        template=template,
        change=short(float(change[mask].mean())),
        random_mean=short(float(spread.mean())),
        random_spread=short(float(spread.std(correction=0))),
        as_large=share(int((spread.abs() >= size).sum()), len(moved)),
    )


def _others(f: Tensor, index: int) -> list[int]:
    """Features whose directions a live one is held against: those that fire at no S2, or all but it where there are none."""
    silent: list[int] = (~(f > 0).any(0)).nonzero()[:, 0].tolist()
    return silent or [i for i in range(f.shape[1]) if i != index]


def _derangement(every: Sequence[Prompt], cfg: IoiStudy) -> Tensor:
    """For each prompt another one of its template."""
    draw, found = np.random.default_rng((cfg.seed % 2**63, 3)), torch.zeros(len(every), dtype=torch.int64)
    for template in TEMPLATES:
        mine = [i for i, prompt in enumerate(every) if prompt.template == template]
        shift = int(draw.integers(1, len(mine)))
        order = draw.permutation(mine).tolist()
        for i, at in enumerate(order):
            found[at] = order[(i + shift) % len(order)]
    return found


# ------------------------------------------------------------------------------------------------------------ the result


def _of(values: Tensor, templates: Sequence[Template], template: Template) -> Tensor:
    return values[torch.tensor([one == template for one in templates])]


def _means(values: Tensor, templates: Sequence[Template]) -> ByTemplate:
    return ByTemplate(**{one: short(float(_of(values, templates, one).double().mean())) for one in TEMPLATES})


def _changes(values: Tensor, templates: Sequence[Template]) -> Changes:
    def one(template: Template) -> Interval:
        found = interval(_of(values, templates, template).double())
        return Interval(**{name: None if value is None else short(value) for name, value in found.model_dump().items()})

    return Changes(ABBA=one("ABBA"), BABA=one("BABA"))


def _largest(change: Tensor, templates: Sequence[Template]) -> tuple[float, Template]:
    """The larger mean change of the two templates, and which it is."""
    sizes: list[tuple[float, Template]] = [(abs(float(_of(change, templates, one).mean())), one) for one in TEMPLATES]
    return max(sizes)


def _condition(name: str, says: str, example: str, found: Tensor, clean: Tensor, templates: Sequence[Template]) -> Condition:
    left = {one: short(float(_of(found, templates, one).mean() / _of(clean, templates, one).mean())) for one in TEMPLATES}
    return Condition(name=name, says=says, example=example, left=ByTemplate(**left), difference=_changes(found, templates))


def _notes(clean: Tensor, templates: Sequence[Template]) -> list[str]:
    weak = [one for one in TEMPLATES if float(_of(clean, templates, one).mean()) < 0.5]
    if not weak:
        return []
    return [
        f"The model hardly prefers the indirect object in {' and '.join(weak)} (a logit difference below 0.5 on average), so "
        "shares of it say little."
    ]


def _summary(
    clean: Tensor, features: Sequence[FeatureEffect], controls: Sequence[Control], conditions: Sequence[Condition]
) -> str:
    parts = [f"logit difference {float(clean.mean()):+.2f}, right in {float((clean > 0).double().mean()):.0%}"]
    if controls:
        first = controls[0]
        rare = "no random direction does as much" if not first.as_large.hits else (
            f"as much as {first.as_large.hits} of {first.as_large.n} random directions"
        )  # fmt: skip
        parts.append(f"ablating {first.index} changes it by {first.change:+.2f} in {first.template} ({rare})")
    elif not features:
        parts.append("no feature fires at the second subject")
    known = {one.name: one for one in conditions}
    told = [known[name] for name in ("names moved", "alongside") if name in known]
    parts += [f"z of “{one.name}” leaves {(one.left.ABBA + one.left.BABA) / 2:.0%}" for one in told]
    return "; ".join(parts)

"""Sparse probing: how much of a text's label a handful of features knows (SAEBench's measure, Gurnee et al. 2023).

For each label, its texts against as many texts of the other labels, drawn evenly from them:

    x_t    mean over a text's tokens of its features' activations (row start, sinks and padding left out)
    best   the k features with the largest |mean of x over the label - mean of x over the rest|, on the training half
    probe  logistic regression on these k, fitted on the training half; its accuracy on the other half is the result

beside it the share of the commoner answer (what knowing nothing gives) and the same probe on the mean of z itself (what
there is to know). Halves hold each label's texts in equal parts; a text that occurs twice counts once, so that no test text
is one that was trained on. All draws follow from a seed, and fitting is a convex problem solved to its end in fp64, so the
result is the same each time.

    loss   sum_t log(1 + exp(-y_t (w . x_t + b))) + |w|^2 / 2      y = +1, -1; x standardised on the training half

which is scikit-learn's default (C = 1); a dependency of that size for one convex function is not worth it.
"""

import json
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from sae_core.errors import EmptyCorpus, UnknownCorpus, UnreadableCorpus, UsageError
from sae_core.measures import AT_ONCE
from sae_core.saes import SAE, row_starts

if TYPE_CHECKING:
    from sae_core.lens import Lens

KS = (1, 2, 5)
LEAST = 10  # texts of a label; fewer tell nothing
TEXT_FILES = {".txt", ".text", ".md", ".rst"}
Z95 = 1.959964


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Accuracy(_Record):
    """A share of right answers on texts that the probe has not seen, with its 95 % interval."""

    mean: float
    low: float
    high: float


class SparseProbe(_Record):
    """The probe on k features."""

    k: int
    accuracy: Accuracy


class LabelProbe(_Record):
    """One label against the others."""

    label: str
    train: int
    """Texts fitted on."""
    test: int
    """Texts judged."""
    majority: float
    """Share of the commoner answer among those judged."""
    sparse: list[SparseProbe]
    z: Accuracy
    """The probe on z itself."""
    features: list[int]
    """The best features, best first."""


class Probe(_Record):
    """Sparse probing on one set of texts."""

    name: str
    """Of the file or folder."""
    texts: int
    """Texts used."""
    labels: list[LabelProbe]
    majority: float
    """Mean over labels."""
    sparse: list[SparseProbe]
    """Mean over labels; texts that serve several labels count once in the interval."""
    z: Accuracy
    """Mean over labels, of the probe on z itself."""
    note: str | None
    """What was left out."""


# ------------------------------------------------------------------------------------------------------------------ texts


@dataclass(frozen=True)
class ProbeTexts:
    """Labelled texts."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    """As many as texts."""

    def tokens(self, context: int) -> int:
        """At most so many tokens are read."""
        return len(self.texts) * context


def read_texts(path: Path, *, field: str = "text", label: str = "label", per_label: int = 200, seed: int = 0) -> ProbeTexts:
    """Labelled texts of a jsonl file of objects with the fields `field` and `label`, or of a folder with one folder of text
    files per label. Of each label at most `per_label` are drawn.

    Raises UnknownCorpus, UnreadableCorpus (file and line), EmptyCorpus where there are not two labels of ten texts.
    """
    if not path.exists():
        raise UnknownCorpus(f"There is no file or folder {path}.", field="probe")
    found = _of_folder(path) if path.is_dir() else _of_jsonl(path, field, label)
    by_label: dict[str, list[str]] = {}
    for text, name in dict.fromkeys(found):
        by_label.setdefault(name, []).append(text)
    common = sorted(name for name, texts in by_label.items() if len(texts) >= LEAST)
    if len(common) < 2:
        raise EmptyCorpus(
            f"{path} has {len(common)} label{'' if len(common) == 1 else 's'} with {LEAST} different texts or more; "
            "probing needs two at least.",
            field="probe",
        )
    chosen = []
    for index, name in enumerate(common):
        order = torch.randperm(len(by_label[name]), generator=torch.Generator().manual_seed(seed + index))
        chosen += [(by_label[name][i], name) for i in sorted(order[:per_label].tolist())]
    return ProbeTexts(path.name, tuple(text for text, _ in chosen), tuple(name for _, name in chosen))


def _of_jsonl(path: Path, field: str, label: str) -> list[tuple[str, str]]:
    found = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get(field), str) or label not in record:
                    raise UnreadableCorpus(
                        f"Line {number} of {path} is no object with a text in '{field}' and a label in '{label}'.", field="probe"
                    )
                found.append((record[field], str(record[label])))
    except (OSError, ValueError) as error:
        raise UnreadableCorpus(f"{path} cannot be read as jsonl ({error}).", field="probe") from error
    return found


def _of_folder(folder: Path) -> list[tuple[str, str]]:
    found = []
    for path in sorted(folder.glob("*/**/*")):
        if path.suffix.lower() in TEXT_FILES and path.is_file():
            try:
                found.append((path.read_text(encoding="utf-8"), path.relative_to(folder).parts[0]))
            except (OSError, ValueError) as error:
                raise UnreadableCorpus(f"{path} cannot be read as text ({error}).", field="probe") from error
    return found


# ---------------------------------------------------------------------------------------------------------------- probing


def probe(
    lens: "Lens",
    sae: SAE,
    texts: ProbeTexts,
    *,
    context: int = 128,
    batch_rows: int = 16,
    ks: Sequence[int] = KS,
    seed: int = 0,
) -> Generator[int, None, Probe]:
    """Probe `sae` on labelled texts, each cut to `context` tokens; yields tokens done.

    Raises EmptyCorpus where fewer than two labels are left once equal texts and those without a counted token are gone.
    """
    f, z, labels, dropped = yield from _means(lens, sae, texts, context, batch_rows)
    names = [name for name in sorted(set(labels)) if labels.count(name) >= LEAST]
    if len(names) < 2:
        raise EmptyCorpus(f"Of {texts.name} fewer than two labels have {LEAST} texts that differ in their first tokens.")
    found, right = [], []
    for index, name in enumerate(names):
        train, test = split(labels, name, names, seed + index)
        truth = torch.tensor([label == name for label in labels])
        best = best_features(f[train], truth[train], max(ks))
        answers = {k: _judge(f[:, best[:k]], truth, train, test) for k in ks}
        raw = _judge(z, truth, train, test)
        right.append((test, answers, raw))
        share = float(truth[test].double().mean())
        found.append(
            LabelProbe(
                label=name,
                train=len(train),
                test=len(test),
                majority=max(share, 1 - share),
                sparse=[SparseProbe(k=k, accuracy=wilson(int(answers[k].sum()), len(test))) for k in ks],
                z=wilson(int(raw.sum()), len(test)),
                features=best.tolist(),
            )
        )
    return Probe(
        name=texts.name,
        texts=len(labels),
        labels=found,
        majority=sum(one.majority for one in found) / len(found),
        sparse=[
            SparseProbe(k=k, accuracy=mean_accuracy([(test, answers[k]) for test, answers, _ in right], len(labels))) for k in ks
        ],
        z=mean_accuracy([(test, raw) for test, _, raw in right], len(labels)),
        note=f"{dropped} texts were left out: they begin like another, or have no token that counts" if dropped else None,
    )


def _means(
    lens: "Lens", sae: SAE, texts: ProbeTexts, context: int, batch_rows: int
) -> Generator[int, None, tuple[Tensor, Tensor, list[str], int]]:
    """Mean activations [n, d_sae] and mean z [n, d_in] of each text, its label, and how many texts were left out."""
    rows: dict[tuple[int, ...], str] = {}
    for ids, label in zip(lens.encode(list(texts.texts)), texts.labels, strict=True):
        rows.setdefault(tuple(ids[: context - 1]), label)
    # Sorted by length, so that rows of a pass differ little. Order within does not matter, but must not depend on the file's.
    items = sorted(((ids, label) for ids, label in rows.items() if ids), key=lambda item: (len(item[0]), item[0]))
    layer, f, z, labels = sae.cfg.site.layer, [], [], []
    for low in range(0, len(items), batch_rows):
        batch = items[low : low + batch_rows]
        width = 1 + max(len(ids) for ids, _ in batch)
        # Padding stands behind the text, and attention looks back only: what it is changes nothing.
        tokens = torch.tensor([[lens.row_start, *ids, *[lens.row_start] * (width - 1 - len(ids))] for ids, _ in batch])
        inside = torch.arange(width) <= torch.tensor([len(ids) for ids, _ in batch])[:, None]
        read = lens.read_z(tokens.to(lens.device), [layer])[layer]
        inside = inside.to(read.device) & ~sae.excluded(read, row_starts(tokens, lens.row_start))
        inside[:, 0] = False  # whatever training did with row starts: they are the same in every text
        for row, kept, (_, label) in zip(read, inside, batch, strict=True):
            if kept.any():
                parts = torch.split(row[kept], max(1, AT_ONCE // sae.cfg.d_sae))
                total = torch.stack([sae.encode(part).double().sum(0) for part in parts]).sum(0)
                f.append((total / int(kept.sum())).float().cpu())
                z.append(row[kept].double().mean(0).float().cpu())
                labels.append(label)
        yield sum(len(ids) for ids, _ in batch)
    if not labels:
        raise EmptyCorpus(f"{texts.name} has no token that counts.")
    return torch.stack(f), torch.stack(z), labels, len(texts.texts) - len(labels)


def split(labels: Sequence[str], name: str, names: Sequence[str], seed: int) -> tuple[Tensor, Tensor]:
    """Indices of texts to fit on and to judge: those of `name`, and as many of the other names, drawn evenly from these.

    Each label's texts are halved by themselves, so both halves hold it in equal parts.
    """
    generator = torch.Generator().manual_seed(seed)
    of = {one: [i for i, label in enumerate(labels) if label == one] for one in names}
    ours, others = len(of[name]), [one for one in names if one != name]
    # Even shares; what a small label cannot give the others do.
    taken = dict.fromkeys(others, 0)
    while sum(taken.values()) < ours and any(taken[one] < len(of[one]) for one in others):
        for one in others:
            if taken[one] < len(of[one]) and sum(taken.values()) < ours:
                taken[one] += 1
    train: list[int] = []
    test: list[int] = []
    odd = False  # which half gets the odd one: they take turns
    for one, n in {name: ours, **taken}.items():
        order = [of[one][i] for i in torch.randperm(len(of[one]), generator=generator)[:n].tolist()]
        half = n // 2 + (n % 2 if odd else 0)
        odd = odd != bool(n % 2)
        train, test = train + order[:half], test + order[half:]
    return torch.tensor(sorted(train)), torch.tensor(sorted(test))


def best_features(x: Tensor, truth: Tensor, k: int) -> Tensor:
    """The k columns of x [n, F] whose means differ most between the two answers, most first; ties to the lower index."""
    gap = (x[truth].double().mean(0) - x[~truth].double().mean(0)).abs()
    return gap.sort(descending=True, stable=True).indices[: min(k, x.shape[1])]


def _judge(x: Tensor, truth: Tensor, train: Tensor, test: Tensor) -> Tensor:
    """Whether the probe fitted on `train` is right, for each of `test`."""
    x = x.double()
    mean, std = x[train].mean(0), x[train].std(0, correction=0)
    x = (x - mean) / torch.where(std > 0, std, 1.0)
    w, b = logistic(x[train], truth[train])
    return (x[test] @ w + b > 0) == truth[test]


def logistic(x: Tensor, truth: Tensor, *, steps: int = 500) -> tuple[Tensor, float]:
    """Weights [d] and bias of the logistic regression of `truth` [n] on x [n, d], float64; the loss stands above."""
    y = truth.double() * 2 - 1
    weights = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    solver: Any = torch.optim.LBFGS(
        [weights], max_iter=steps, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = torch.nn.functional.softplus(-y * (x @ weights[:-1] + weights[-1])).sum() + weights[:-1].square().sum() / 2
        torch.autograd.backward(value)
        return value

    solver.step(loss)
    found = weights.detach()
    return found[:-1], float(found[-1])


def wilson(right: int, n: int) -> Accuracy:
    """Share of right answers with Wilson's 95 % interval, which stays within 0 and 1 for few texts too."""
    if n == 0:
        raise UsageError("There is no text to judge the probe by.")
    p, z2 = right / n, Z95**2
    centre, half = (p + z2 / (2 * n)) / (1 + z2 / n), Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Accuracy(mean=p, low=max(0.0, centre - half), high=min(1.0, centre + half))


def mean_accuracy(judged: Sequence[tuple[Tensor, Tensor]], n_texts: int) -> Accuracy:
    """Mean over labels of the accuracy, from (texts judged, right or not) of each; the interval is over texts, since one text
    may have been judged for several labels and its answers hang together."""
    shares = [float(right.double().mean()) for _, right in judged]
    mean = sum(shares) / len(shares)
    by_text = torch.zeros(n_texts, dtype=torch.float64)
    for (test, right), share in zip(judged, shares, strict=True):
        by_text[test] += (right.double() - share) / (len(test) * len(judged))
    half = Z95 * math.sqrt(float(by_text.square().sum()))
    return Accuracy(mean=mean, low=max(0.0, mean - half), high=min(1.0, mean + half))

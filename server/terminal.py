"""A job in the terminal: a progress bar where there is a terminal, a line now and then where there is none; and what studies and
searches found, as lines. No torch."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from server.db import Database
from server.store import jobs as store
from server.store.jobs import JobRecord
from server.store.search import Found, Overall

LINE_SECONDS = 30.0


def watch(
    db: Database, job_id: str, console: Console, stop: threading.Event, *, look: Callable[[], None] = lambda: None
) -> list[JobRecord]:
    """Show a job and those that follow from it until they have ended, or `stop`; the jobs as they are then.

    `look` is called between two looks at the database.
    """
    show = _bar if console.is_terminal else _lines
    return show(db, job_id, console, stop, look)


def family(db: Database, job_id: str) -> list[JobRecord]:
    """The job and those that follow from it."""
    with db.read() as session:
        return [store.get(session, job_id), *store.children(session, job_id)]


def current(jobs: list[JobRecord]) -> JobRecord | None:
    """The one to look at: the one that runs, else the next in the queue."""
    return next((job for job in jobs if job.status == store.RUNNING), next((job for job in jobs if not job.ended), None))


def duration(seconds: float | None) -> str:
    """`1 h 05 min`, `3 min 20 s`, `12 s`; empty while unknown."""
    if seconds is None:
        return ""
    whole = int(seconds + 0.5)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def describe(job: JobRecord, values: dict[str, float]) -> str:
    """What the job does now, in a few words."""
    if job.status == store.QUEUED:
        return "queued"
    parts = [f"{job.rate:,.0f} {job.unit}/s"] if job.rate else []
    parts += [f"{name} {values[name]:.3g}" for name in ("fvu", "l0", "dead") if name in values and job.phase == "train"]
    if job.seconds_left is not None:
        parts.append(f"{duration(job.seconds_left)} left")
    return ", ".join(parts)


def _newest_values(db: Database, job: JobRecord) -> dict[str, float]:
    if job.phase != "train":
        return {}
    with db.read() as session:
        return store.last_point(session, job.id)


def _bar(db: Database, job_id: str, console: Console, stop: threading.Event, look: Callable[[], None]) -> list[JobRecord]:
    columns = (TextColumn("{task.description:<30}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[said]}"))
    with Progress(*columns, console=console, transient=False) as bar:
        task, shown = None, None
        while True:
            found = family(db, job_id)
            job = current(found)
            if job is None or stop.is_set():
                if task is not None:
                    bar.update(task, completed=1.0 if job is None else None, said="")
                return found
            if (job.id, job.phase) != shown:
                if task is not None:
                    bar.update(task, completed=1.0, said="")
                task, shown = bar.add_task(f"{job.kind}: {job.phase or 'waiting'}", total=1.0, said=""), (job.id, job.phase)
            assert task is not None
            bar.update(task, completed=job.share, said=describe(job, _newest_values(db, job)))
            look()
            stop.wait(0.5)


def _lines(db: Database, job_id: str, console: Console, stop: threading.Event, look: Callable[[], None]) -> list[JobRecord]:
    shown, at = None, 0.0
    while True:
        found = family(db, job_id)
        job = current(found)
        if job is None or stop.is_set():
            return found
        if (job.id, job.phase) != shown or time.monotonic() - at > LINE_SECONDS:
            shown, at = (job.id, job.phase), time.monotonic()
            said = describe(job, _newest_values(db, job))
            line = f"{job.kind}: {job.phase or 'waiting'} {job.share:.0%}{f', {said}' if said else ''}"
            console.print(line, highlight=False, soft_wrap=True)
        look()
        stop.wait(0.5)


def study(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The main numbers of a study, as lines."""
    kinds = {
        "specificity": _of_specificity,
        "induction": _of_induction,
        "heads": _of_heads,
        "ioi": _of_ioi,
        "prefix": _of_prefix,
    }
    return list(kinds[result["kind"]](result))


def _of_specificity(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "proxy", result["proxy"]
    yield "tokens", f"{result['tokens']:,}"
    for key, words in (
        ("precision", "precision: proxy holds where it fires"),
        ("recall", "recall: it fires where the proxy holds"),
        ("specificity", "specificity: silent where the proxy does not hold"),
        ("base", "share of tokens on which the proxy holds"),
        ("density", "share of tokens on which it fires"),
    ):
        share = result[key]
        bounds = f" ({_number(share['low'], '.2%')} to {_number(share['high'], '.2%')}), {share['hits']:,} of {share['n']:,}"
        yield words, _number(share["value"], ".2%") + (bounds if share["n"] else "")
    yield "share of its activation where the proxy holds", _number(result["mass"], ".2%")
    for part in reversed(result["ranges"]):
        share = part["precision"]
        yield f"precision from {part['low']:.3g} to {part['high']:.3g}", f"{_number(share['value'], '.1%')} of {share['n']:,}"
    for note in result["notes"]:
        yield "note", note


def _of_induction(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    last = len(result["prefixes"]) - 1
    yield "heads", result["summary"]
    for head in (head for head in result["heads"] if head["role"] != "not induction"):
        score = ", ".join(f"p = {result['prefixes'][i]}: {head['score'][i]:.2f}" for i in sorted({0, 1, last}))
        cut = head["cut"]
        text = f"; in text {cut['before']['mean']:.2f}, prefix cut {cut['after']['mean']:.2f}" if cut else ""
        yield f"{head['layer']}.{head['head']} {head['role']}", score + text
    for note in result["notes"]:
        yield "note", note


STRONGEST = 6
"""Heads named for each role."""


def _of_heads(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "heads", result["summary"]
    for role, (score, least) in result["thresholds"].items():
        sign = 1 if least > 0 else -1
        known = [
            (sign * value, f"{head['layer']}.{head['head']}")
            for head in result["heads"]
            if (value := (head["random"] | head)[score]) is not None
        ]
        yield f"{role}: {score}", ", ".join(f"{name} {sign * value:.2f}" for value, name in sorted(known)[: -STRONGEST - 1 : -1])
    for note in result["notes"]:
        yield "note", note


def _interval(found: dict[str, Any], form: str) -> str:
    bounds = "" if found["low"] is None else f" ({found['low']:{form}} to {found['high']:{form}})"
    return _number(found["mean"], form) + bounds


def _of_ioi(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "prompts", f"{result['samples']:,}, such as: {result['example']}"
    right = result["right"]
    yield "the indirect object is likelier", f"{_number(right['value'], '.1%')} of {right['n']}"
    for template in ("ABBA", "BABA"):
        yield f"logit difference, {template}", _interval(result["difference"][template], "+.2f")
        yield f"its change without the SAE's error, {template}", _interval(result["error"][template], "+.3f")
        yield f"its change without any feature, {template}", _interval(result["every"][template], "+.3f")
    for one in result["features"][:8]:
        said = "; ".join(f"{template} {_interval(one['change'][template], '+.3f')}" for template in ("ABBA", "BABA"))
        yield f"without feature {one['index']}", said
    for one in result["controls"]:
        chance = one["as_large"]
        yield (
            f"random directions for {one['index']}, {one['template']}",
            f"{one['random_mean']:+.3f} with a spread of {one['random_spread']:.3f}, where it is {one['change']:+.3f}; "
            f"{chance['hits']} of {chance['n']} do as much",
        )
    for one in result["conditions"]:
        yield f"left with z of: {one['says']}", f"ABBA {one['left']['ABBA']:.0%}, BABA {one['left']['BABA']:.0%}"
    for note in result["notes"]:
        yield "note", note


def _of_prefix(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    first, last = result["prefixes"][0], result["prefixes"][-1]
    for role, n in result["n_features"].items():
        yield f"{role} features", str(n)
    for one in result["features"][:12]:
        source = f", {one['from_source']:.0%} from the right source" if one["from_source"] is not None else ""
        rise = f"p = {first}: {one['rise'][0]:+.2f}, p = {last}: {one['rise'][-1]:+.2f}, rises by {one['best']:.2f}{source}"
        yield f"{one['index']} {one['role']}", rise
    for one in result["losses"]:
        yield f"loss {one['name']}, p = {last}", _interval(one["values"][-1], ".3f")
    for one in result["changes"]:
        of = f" ({one['features']})" if one["features"] else ""
        yield f"its change, {one['name']}{of}", _interval(one["values"][-1], "+.3f")
    for note in result["notes"]:
        yield "note", note


def found(page: Found) -> Iterator[tuple[str, ...]]:
    """What a search within an SAE found, a line each."""
    for hit in page.hits:
        strength = "" if hit.weight is None else f"{hit.weight:.3g}"
        yield str(hit.index), hit.label or "", hit.token or "", strength, hit.family or "unclear"


def found_in_all(page: Overall) -> Iterator[tuple[str, ...]]:
    """What a search over everything found, a line each."""
    yield from (("model", name, "") for name in page.models)
    yield from (("SAE", sae.name, f"layer {sae.layer} of {sae.model}") for sae in page.saes)
    yield from (("feature", f"{hit.sae} {hit.index}", f"fires on {hit.token!r}, {hit.weight:.3g}") for hit in page.tokens)
    yield from (("label", f"{line.sae} {line.index}", line.text or "") for line in page.labels)
    yield from (("text", name, f"{rows} row{'' if rows == 1 else 's'}") for name, rows in page.texts)


def measures(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """The main numbers of an evaluation, as lines; what could not be measured is a dash."""
    return list(_measures(metrics))


def _measures(metrics: dict[str, Any]) -> Iterator[tuple[str, str]]:
    fit = metrics.get("reconstruction") or {}
    for key, words, form in (
        ("fvu", "unexplained variance (FVU)", ".4f"),
        ("l0", "active features per token (L0)", ".2f"),
        ("dead", "share of dead features", ".4f"),
        ("gamma", "gamma (1: no shrinkage)", ".4f"),
        ("cosine", "cosine of z and reconstruction", ".4f"),
        ("mse", "squared error per token", ".4g"),
        ("dense_10", "share of features on more than 10 % of tokens", ".4f"),
        ("decoder_cosine", "cosine of nearest decoder direction", ".4f"),
        ("encoder_decoder_cosine", "cosine of encoder and decoder direction", ".4f"),
    ):
        yield words, _number(fit.get(key), form)
    for key, words in (("prose", "held-out text"), ("repeated", "random tokens said twice")):
        losses = metrics.get(key)
        if losses:
            change = losses["sae_minus_clean"]
            bounds = f" ({_number(change['low'], '+.4f')} to {_number(change['high'], '+.4f')})"
            yield f"{words}: loss, clean", _number(losses["clean"], ".4f")
            yield f"{words}: change with the SAE", _number(change["mean"], "+.4f") + bounds
            for ablation in ("mean", "zero"):
                yield f"{words}: kept of {ablation} ablation", _number(losses[f"recovered_{ablation}"], ".1%")
                yield f"{words}: the same of KL", _number(losses.get(f"kl_recovered_{ablation}"), ".1%")
    for one in metrics.get("probes") or []:
        known = ", ".join(f"{k['k']}: {k['accuracy']['mean']:.1%}" for k in one["sparse"])
        yield f"{one['name']}: right by so many features", f"{known}; z {one['z']['mean']:.1%}, guess {one['majority']:.1%}"
    for one in metrics.get("stability") or []:
        yield f"found again in {one['against']} (cosine > 0.7)", _number(one["above_07"], ".1%")
    for note in metrics.get("notes") or []:
        yield "note", note


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)

"""Live questions on typed text: a small internal ASGI app on 127.0.0.1 that keeps a model and its SAEs warm.

`POST /attribute` answers with the full DFA matrix [head][source] of one feature at one destination, in fp32, with the
identity gap of that very answer; `POST /components` with the same DFA by component: what embedding and earlier blocks put
into each source; `POST /firings` with the features that fire most on a text, `POST /codes` with all that fire, `POST /sources`
with what source tokens gave to many features; `POST /prompt` with what fires in many SAEs, and what one feature writes to the
next token's logits; `POST /steer` with what becomes of a text when features are changed; `POST /circuit` with what made a
feature or a logit (`engine_circuits.py`).
The web asks it with a shared secret; nobody else can. One question at a time, in the order in which they came (`line.py`): with
`/line/{ticket}` a question's place can be asked for, and it can be cancelled.
"""

import hmac
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import torch
from fastapi import Body, Depends, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from torch import Tensor

from sae_core import attribution, machine
from sae_core.components import by_component
from sae_core.errors import HeadscopeError, NotFound, UsageError
from sae_core.interventions import Ablation, Edit, FeatureEdit, mean_z, measure, write
from sae_core.lens import AttentionRead, Lens, load_lens
from sae_core.saes import SAE, SparseActs, row_starts
from sae_core.transcoders import Transcoder, load_transcoder
from server.circuits.asked import CircuitQuestion, FeatureRoot, LiveCircuit
from server.db import Database
from server.engine_circuits import Kept, answer_circuit
from server.gpus import gpus
from server.line import Line
from server.live import (
    SECRET_HEADER,
    ActivationChange,
    ChangedFeature,
    ComponentsQuestion,
    FeatureActivations,
    FeatureAt,
    Firing,
    FiringQuestion,
    InLine,
    LiveAttribution,
    LiveCodes,
    LiveComponents,
    LiveFirings,
    LivePrompt,
    LiveQuestion,
    LiveSources,
    LiveSteered,
    LiveWritten,
    NextChange,
    NextToken,
    PromptQuestion,
    PromptSae,
    PromptText,
    SourcesQuestion,
    SteerQuestion,
    TextQuestion,
    Ticket,
    WrittenText,
)
from server.settings import Settings
from server.store import interventions, registry
from server.store.transcoders import of_model as transcoders_of
from server.watch import FORMAT, Watch, Watched
from server.work.opening import open_sae

log = logging.getLogger("headscope.engine")

Wait = Annotated[float, Query(ge=0, le=60)]


@dataclass
class Warm:
    """A model with the SAEs on it that were asked for, the last asked for last."""

    model: registry.ModelRecord
    lens: Lens
    saes: OrderedDict[str, SAE]
    """By name and sha256."""
    means: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """[d_in]: means of z by harvest and layer, once they were asked for."""
    transcoders: OrderedDict[str, Transcoder] = field(default_factory=OrderedDict)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        held = [_sae_bytes(sae) for sae in self.saes.values()] + [one.nbytes for one in self.transcoders.values()]
        return self.lens.nbytes + sum(held)


def _sae_bytes(sae: SAE) -> int:
    return sum(tensor.nbytes for tensor in sae.buffers())


class Engine:
    """Loads on the first question, answers one at a time, keeps within its memory, lets go when nobody has asked for a while."""

    def __init__(self, settings: Settings, db: Database) -> None:
        self.settings, self.db = settings, db
        self.line = Line()
        self._warm: OrderedDict[str, Warm] = OrderedDict()  # the model last asked last
        self._sizes: dict[str, int] = {}
        self._circuits = Kept()
        self._asked = time.monotonic()

    @property
    def loaded(self) -> str | None:
        """Name of the model that was asked last, of those that are warm."""
        return next((warm.model.name for warm in reversed(self._warm.values())), None)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that are warm."""
        return sum(warm.nbytes for warm in self._warm.values())

    def attribute(self, question: LiveQuestion) -> LiveAttribution:
        """Answer a question."""
        return self.line.ask(lambda: answer(*self._asked_for(question), question))

    def components(self, question: ComponentsQuestion) -> LiveComponents:
        """Answer a question for components."""
        return self.line.ask(lambda: answer_components(*self._asked_for(question), question))

    def firings(self, question: FiringQuestion) -> LiveFirings:
        """Answer a question for what fires."""

        def found() -> LiveFirings:
            lens, sae, tokens = self._opened(question)
            for index in question.features:
                _check_feature(sae, question.sae, index, "features")
            return answer_firings(lens, sae, tokens, question)

        return self.line.ask(found)

    def codes(self, question: TextQuestion) -> LiveCodes:
        """Answer a question for all that fires."""
        return self.line.ask(lambda: answer_codes(*self._opened(question), question))

    def sources(self, question: SourcesQuestion) -> LiveSources:
        """Answer a question for the sources of some features."""

        def found() -> LiveSources:
            lens, sae, tokens = self._opened(question)
            for index, dest in zip(question.features, question.dests, strict=True):
                _check_feature(sae, question.sae, index, "features")
                _check_dest(dest, len(tokens), "dests")
            return answer_sources(lens, sae, tokens, question)

        return self.line.ask(found)

    def prompt(self, question: PromptQuestion) -> LivePrompt:
        """Answer a prompt."""
        return self.line.ask(lambda: self._prompt(question))

    def steer(self, question: SteerQuestion) -> LiveSteered:
        """Answer a question for what becomes of a text when features are changed."""
        return self.line.ask(lambda: self._steer(question))

    def circuit(self, question: CircuitQuestion) -> LiveCircuit:
        """Answer a question for a circuit."""
        return self.line.ask(lambda: self._circuit(question))

    def leave(self, ticket: str, question: PromptQuestion, wait: float) -> InLine:
        """Put a prompt in the line, and wait so long for its answer."""
        self.line.leave(ticket, lambda: self._prompt(question))
        return self.look(ticket, wait)

    def leave_steer(self, ticket: str, question: SteerQuestion, wait: float) -> InLine:
        """The same of a question for what becomes of a text."""
        self.line.leave(ticket, lambda: self._steer(question))
        return self.look(ticket, wait)

    def leave_circuit(self, ticket: str, question: CircuitQuestion, wait: float) -> InLine:
        """The same of a circuit."""
        self.line.leave(ticket, lambda: self._circuit(question))
        return self.look(ticket, wait)

    def look(self, ticket: str, wait: float = 0.0) -> InLine:
        """Where a question is, or its answer."""
        place, found = self.line.look(ticket, wait)
        if isinstance(found, LiveSteered):
            return InLine(ticket=ticket, place=place, answer=None, steered=found)
        if isinstance(found, LiveCircuit):
            return InLine(ticket=ticket, place=place, answer=None, circuit=found)
        return InLine(ticket=ticket, place=place, answer=found)

    def warm(self, sae: str) -> None:
        """Load the SAE and its model, after what is waiting; nobody waits for it."""

        def load() -> None:
            self._open(sae)

        self.line.leave(f"warm-{sae}", load)

    def rest(self) -> bool:
        """Give the memory back if nobody has asked for a while; whether it did."""
        self.line.sweep()
        if not self._warm or time.monotonic() - self._asked < self.settings.engine_idle_seconds:
            return False

        def let_go() -> bool:
            if time.monotonic() - self._asked < self.settings.engine_idle_seconds:
                return False  # somebody asked meanwhile
            log.info("Nobody has asked for a while; %s unloaded", ", ".join(self._names()))
            self._let_go(0)
            self._circuits.clear()
            return True

        return self.line.ask(let_go)

    def _prompt(self, question: PromptQuestion) -> LivePrompt:
        self._asked = time.monotonic()
        model = self._model_of(question.saes)
        saes: list[SAE] = []
        for name in question.saes:
            self.line.check()
            lens, sae = self._open(name, beside=len(saes))
            saes.append(sae)
        tokens = self._tokens(lens, question.text, question.tokens, "text")
        prompt = answer_prompt(lens, saes, tokens, question, question.at, self.line.check)
        against, attributed, written = None, None, None
        if question.against is not None:
            other = self._tokens(lens, question.against, None, "against")
            against = answer_prompt(lens, saes, other, question, question.against_at, self.line.check)
        if question.feature is not None:
            at, sae = question.feature, saes[question.saes.index(question.feature.sae)]
            _check_feature(sae, at.sae, at.index, "index")
            self.line.check()
            attributed = answer(lens, sae, tokens, LiveQuestion(sae=at.sae, index=at.index, tokens=tokens, dest=at.dest))
            self.line.check()
            written = answer_written(lens, sae, tokens, at, attributed.activations[at.dest])
        return LivePrompt(model=model, prompt=prompt, against=against, attribution=attributed, written=written)

    def _steer(self, question: SteerQuestion) -> LiveSteered:
        self._asked = time.monotonic()
        names = list(dict.fromkeys([*(one.sae for one in question.features), *question.watch]))
        model = self._model_of(names)
        lens, saes = self._one_of_each_layer(names, "features")
        tokens = self._tokens(lens, question.text, question.tokens, "text")
        for one in question.features:
            _check_feature(saes[one.sae], one.sae, one.index, "features")
        for position in (at for one in question.changes for at in one.at or ()):
            _check_dest(position, len(tokens), "at")
        if question.look is not None:
            _check_dest(question.look, len(tokens), "look")
        n = question.new_tokens
        if not lens.keeps_past and n * (len(tokens) + n) > WRITTEN_AT_ONCE:
            most = max(m for m in range(n) if m * (len(tokens) + m) <= WRITTEN_AT_ONCE)
            raise UsageError(
                f"After {len(tokens)} tokens at most {most} are written at once, not {n}: each reads the whole text again.",
                field="new_tokens",
            )
        edits = self._edits(lens, saes, tokens, question, names)
        self.line.check()
        return answer_steered(lens, saes, tokens, question, edits, model, self.line.check)

    def _edits(
        self, lens: Lens, saes: dict[str, SAE], tokens: list[int], question: SteerQuestion, names: Sequence[str]
    ) -> list[Edit]:
        """What the question changes; z of the other text and means are read here."""
        layers = {one.layer for one in question.ablations}
        resampled = {one.layer for one in question.ablations if one.how == "resample"}
        resampled |= {saes[one.sae].cfg.site.layer for one in question.features if one.how == "resample"}
        zs, other = dict[int, Tensor](), list[int]()
        for layer in layers:
            lens.check_layer(layer)
        if resampled:
            other = self._tokens(lens, question.other, None, "other")
            _check_long_enough(question, len(other), len(tokens))
            zs = lens.read_z(torch.tensor([other], device=lens.device), sorted(resampled))
        means = self._means(lens, names, [one.layer for one in question.ablations if one.how == "mean"])
        made: list[Edit] = []
        for ablated in question.ablations:
            given = {"zero": None, "mean": means.get(ablated.layer), "resample": zs.get(ablated.layer)}[ablated.how]
            if given is not None and ablated.how == "resample":
                given = _as_long(given[0], len(tokens))
            at, heads = (None if some is None else tuple(some) for some in (ablated.at, ablated.heads))
            made.append(Ablation(ablated.layer, given, at, heads))
        for one in question.features:
            layer, at = saes[one.sae].cfg.site.layer, None if one.at is None else tuple(one.at)
            if one.how == "resample":
                acts = _activations(saes[one.sae], zs[layer], row_starts(torch.tensor([other]), lens.row_start), one.index)
                acts += [0.0] * (len(tokens) - len(acts))  # where nobody reads them
                made.append(FeatureEdit(layer, one.index, "set", tuple(acts[: len(tokens)]), at))
            elif one.how == "mean":
                with self.db.read() as session:
                    mean = interventions.mean_activations(session, one.sae, [one.index])[one.index]
                made.append(FeatureEdit(layer, one.index, "set", mean, at))
            else:
                made.append(FeatureEdit(layer, one.index, one.how, one.value, at))
        return made

    def _means(self, lens: Lens, names: Sequence[str], layers: Sequence[int]) -> dict[int, Tensor]:
        """[d_in] by layer: the mean of z over rows that a harvest kept."""
        if not layers:
            return {}
        with self.db.read() as session:
            harvest, rows = interventions.sample_rows(session, names, MEAN_ROWS)
        warm = self._warm_of(lens)
        if missing := [layer for layer in dict.fromkeys(layers) if (harvest, layer) not in warm.means]:
            width = min(map(len, rows))
            tokens = torch.tensor([row[:width] for row in rows], device=lens.device)
            warm.means |= {(harvest, layer): mean for layer, mean in mean_z(lens, tokens, missing).items()}
        return {layer: warm.means[harvest, layer] for layer in layers}

    def _circuit(self, question: CircuitQuestion) -> LiveCircuit:
        self._asked = time.monotonic()
        model = self._model_of(question.saes)
        lens, saes = self._one_of_each_layer(question.saes, "saes")
        tokens = self._tokens(lens, question.text, question.tokens, "text")
        warm = self._warm_of(lens)
        transcoders, keys = self._transcoders(warm, model, saes, question) if question.transcoders else ({}, [])
        of = {id(sae): version for version, sae in warm.saes.items()}
        versions = [*(of[id(sae)] for sae in saes.values()), *keys]
        return answer_circuit(lens, saes, transcoders, tokens, question, model, versions, self._circuits, self.line.check)

    def _transcoders(
        self, warm: Warm, model: str, saes: dict[str, SAE], question: CircuitQuestion
    ) -> tuple[dict[int, Transcoder], list[str]]:
        """The model's transcoders as far as they lie below the root, by layer; and what tells them from others."""
        top = saes[question.root.sae].cfg.site.layer if isinstance(question.root, FeatureRoot) else warm.lens.info.n_layers
        with self.db.read() as session:
            records = [one for one in transcoders_of(session, model) if one.layer < top]
        found: dict[int, Transcoder] = {}
        keys = [f"{one.layer}@{one.sha256}" for one in records]
        for record, key in zip(records, keys, strict=True):
            self.line.check()
            if key not in warm.transcoders:
                for other in [held for held in warm.transcoders if held.startswith(f"{record.layer}@")]:
                    del warm.transcoders[other]
                warm.transcoders[key] = load_transcoder(self.settings.data / record.file, warm.lens.device)
            warm.transcoders.move_to_end(key)
            found[record.layer] = warm.transcoders[key]
            self._let_go(int(self.settings.engine_memory_gb * 1e9), beside=len(saes), transcoders=len(found))
        return found, keys

    def _one_of_each_layer(self, names: Sequence[str], field: str) -> tuple[Lens, dict[str, SAE]]:
        """The SAEs, and their model; UsageError where two read one layer."""
        by_layer = dict[int, tuple[str, SAE]]()
        for name in names:
            self.line.check()
            lens, sae = self._open(name, beside=len(by_layer))
            other, _ = by_layer.setdefault(sae.cfg.site.layer, (name, sae))
            if other != name:
                raise UsageError(
                    f"{other} and {name} both read layer {sae.cfg.site.layer}; name one SAE of each layer.", field=field
                )
        return lens, dict(by_layer.values())

    def _model_of(self, names: Sequence[str]) -> str:
        """The model that all these SAEs are of; UsageError where there are two."""
        with self.db.read() as session:
            ids = {registry.sae(session, name).model_id for name in names}
            models = [registry.model_by_id(session, one).name for one in sorted(ids)]
        if len(models) > 1:
            raise UsageError(
                f"These SAEs are of {' and '.join(models)}; a text runs through one model, so choose SAEs of one.", field="saes"
            )
        return models[0]

    def _asked_for(self, question: LiveQuestion) -> tuple[Lens, SAE, list[int]]:
        lens, sae, tokens = self._opened(question)
        _check_feature(sae, question.sae, question.index, "index")
        return lens, sae, tokens

    def _opened(self, question: TextQuestion) -> tuple[Lens, SAE, list[int]]:
        self._asked = time.monotonic()
        lens, sae = self._open(question.sae)
        return lens, sae, self._tokens(lens, question.text, question.tokens, "text")

    def _warm_of(self, lens: Lens) -> Warm:
        return next(one for one in self._warm.values() if one.lens is lens)

    def _names(self) -> list[str]:
        return [warm.model.name for warm in self._warm.values()]

    def _let_go(self, room: int, *, beside: int = 0, transcoders: int = 0) -> None:
        """Unload what was asked for longest ago until no more than `room` bytes are held; with `beside` the model asked last and
        so many of its SAEs stay, whatever they need, and so many transcoders."""
        while self._warm and self.nbytes > room and (len(self._warm) > 1 or not beside):
            _, warm = self._warm.popitem(last=False)
            log.info("%s unloaded", warm.model.name)
        for warm in self._warm.values():
            while len(warm.transcoders) > transcoders and self.nbytes > room:
                warm.transcoders.popitem(last=False)
            while len(warm.saes) > beside and self.nbytes > room:
                warm.saes.popitem(last=False)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _open(self, name: str, *, beside: int = 0) -> tuple[Lens, SAE]:
        """The SAE and its model, loaded where they are not; `beside` says how many SAEs of the same question are open already."""
        budget = int(self.settings.engine_memory_gb * 1e9)
        with self.db.read() as session:
            record = registry.sae(session, name)
            model = registry.model_by_id(session, record.model_id)
        source = model.source.model_dump_json()
        if source not in self._warm:
            self._let_go(max(0, budget - self._needs(source, model, budget)))
            self._warm[source] = Warm(model, self._load(model), OrderedDict())
            self._sizes[source] = self._warm[source].nbytes
        self._warm.move_to_end(source)
        warm = self._warm[source]
        key = f"{name}@{record.sha256}"
        if key not in warm.saes:
            warm.saes[key] = open_sae(self.settings.data, record, warm.lens)
        warm.saes.move_to_end(key)
        self._let_go(budget, beside=beside + 1)
        return warm.lens, warm.saes[key]

    def _needs(self, source: str, model: registry.ModelRecord, budget: int) -> int:
        """Bytes of a model's weights: known once it has been loaded, estimated where its shape is known; else all there is."""
        if source in self._sizes:
            return self._sizes[source]
        if model.d_model is None or model.n_layers is None or model.d_vocab is None:
            return budget
        return 4 * (12 * model.n_layers * model.d_model**2 + 2 * model.d_vocab * model.d_model)  # as GPT-2 has them, in fp32

    def _load(self, model: registry.ModelRecord) -> Lens:
        device = machine.pick_device(self.settings.device)
        try:
            return load_lens(model.source, name=model.name, device=device, cache=self.settings.cache)
        except torch.OutOfMemoryError:
            if device == "cpu":
                raise
            log.warning("%s is full; %s runs on the CPU", device, model.name)  # a training run has the GPU: be slow, not away
            self._let_go(0)
            return load_lens(model.source, name=model.name, device="cpu", cache=self.settings.cache)

    def _tokens(self, lens: Lens, text: str | None, given: Sequence[int] | None, field: str) -> list[int]:
        """Token ids, row start first, as in training."""
        tokens = list(given) if given is not None else [lens.row_start, *lens.encode([text or ""])[0]]
        most = min(self.settings.engine_max_tokens, lens.info.max_context)
        if len(tokens) < 2:
            raise UsageError("There is no text; type at least one word.", field=field)
        if len(tokens) > most:
            raise UsageError(f"The text has {len(tokens)} tokens; at most {most} are taken, so shorten it.", field=field)
        if not all(0 <= token < lens.info.d_vocab for token in tokens):
            raise UsageError(f"{lens.info.name} has the tokens 0 to {lens.info.d_vocab - 1} only.", field="tokens")
        return tokens


def _check_feature(sae: SAE, name: str, index: int, field: str) -> None:
    if not 0 <= index < sae.cfg.d_sae:
        raise NotFound(f"{name} has the features 0 to {sae.cfg.d_sae - 1}; there is no {index}.", field=field)


def _check_dest(dest: int, n: int, field: str) -> None:
    if not 0 <= dest < n:
        raise UsageError(f"The text has the positions 0 to {n - 1}; there is no {dest}.", field=field)


def _check_long_enough(question: SteerQuestion, other: int, n: int) -> None:
    """The other text has a position for each that is resampled."""
    resampled = [one.at for one in question.changes if one.how == "resample"]
    last = max(n - 1 if at is None else max(at, default=0) for at in resampled)
    if last >= other:
        raise UsageError(
            f"The text to resample from has {other} tokens, the row start included, and position {last} of it is wanted; give a "
            "longer one, or name the positions.",
            field="other",
        )


def _as_long(z: Tensor, n: int) -> Tensor:
    """z [pos, d_in] cut to n positions, or filled with zeros that nobody reads."""
    return z[:n] if len(z) >= n else torch.cat([z, z.new_zeros(n - len(z), z.shape[1])])


def _activations(sae: SAE, z: Tensor, starts: Tensor, index: int) -> list[float]:
    """A feature's activation at each position of z [1, pos, d_in]; 0 where the SAE has no features."""
    feature = torch.tensor([index], device=z.device)
    w, c = sae.affine(feature)
    acts = sae.activate(sae.scaled(z[0]) @ w.T + c, feature, sae.least(z[0]))[:, 0]
    found: list[float] = acts.masked_fill(sae.excluded(z, starts)[0], 0.0).tolist()
    return found


class _Place(NamedTuple):
    """One feature on one row, and the destination that was asked for."""

    activations: Tensor
    """[pos]"""
    preacts: Tensor
    """[pos], from z alone."""
    excluded: Tensor
    """bool [pos]"""
    dest: int
    w: Tensor
    """[n_heads, d_head]: the feature's direction on raw z at `dest`, with the token's scale where the SAE norms tokens."""
    bias: Tensor
    """[1]"""


def _placed(lens: Lens, read: AttentionRead, sae: SAE, tokens: list[int], question: LiveQuestion) -> _Place:
    feature = torch.tensor([question.index], device=read.z.device)
    w, bias = sae.affine(feature)
    z, scale = read.z[0], sae.token_scale(read.z[0])
    excluded = sae.excluded(read.z, row_starts(torch.tensor([tokens]), lens.row_start))[0]
    preacts = sae.scaled(z) @ w[0] + bias[0]
    acts = sae.activate(preacts[:, None], feature, sae.least(z))[:, 0].masked_fill(excluded, 0.0)
    dest = question.dest
    if dest is None:
        dest = int(preacts.masked_fill(excluded, -torch.inf).argmax()) if not excluded.all() else len(z) - 1
    else:
        _check_dest(dest, len(z), "dest")
    at_dest = w[0] if scale is None else w[0] * scale[dest]
    return _Place(acts, preacts, excluded, dest, at_dest.view(sae.cfg.n_heads, sae.cfg.d_head), bias)


@torch.no_grad()
def answer(lens: Lens, sae: SAE, tokens: list[int], question: LiveQuestion) -> LiveAttribution:
    """The feature on these tokens, and what each (head, source) gave to it at one destination.

    The pre-activation comes from z alone, the DFA from v and pattern alone; that they agree is the gap given back.
    """
    layer = sae.cfg.site.layer
    read = lens.read_attention(torch.tensor([tokens], device=lens.device), layer)
    at = _placed(lens, read, sae, tokens, question)
    v, pattern, constant = read.v[0], read.pattern[0][:, at.dest][None], None
    if question.split_bias:
        v_bias = lens.v_bias(layer)
        none = torch.zeros_like(v[0])
        dfa, constant = attribution.split_value_bias(v, pattern, at.w[None], none if v_bias is None else v_bias)
    else:
        dfa = attribution.dfa(v, pattern, at.w[None])
    terms = dfa if constant is None else torch.cat([dfa, constant[..., None]], dim=2)
    gap = attribution.identity_gap(terms, at.bias, at.preacts[at.dest : at.dest + 1])
    return LiveAttribution(
        sae=question.sae,
        index=question.index,
        tokens=tokens,
        texts=lens.token_texts(tokens),
        activations=at.activations.tolist(),
        preacts=at.preacts.tolist(),
        excluded=at.excluded.tolist(),
        dest=at.dest,
        dfa=dfa[0].tolist(),
        value_bias=None if constant is None else constant[0].tolist(),
        bias=float(at.bias[0]),
        gap=float(gap[0]),
    )


@torch.no_grad()
def answer_components(lens: Lens, sae: SAE, tokens: list[int], question: ComponentsQuestion) -> LiveComponents:
    """What each earlier part of the model put into the sources of the feature at one destination. The pre-activation comes
    from z alone; that the components add up to it is the gap given back."""
    head = question.head
    if head is not None and not 0 <= head < sae.cfg.n_heads:
        raise UsageError(f"{question.sae} has the heads 0 to {sae.cfg.n_heads - 1}; there is no {head}.", field="head")
    layer = sae.cfg.site.layer
    stream = lens.read_stream(torch.tensor([tokens], device=lens.device), layer)
    at = _placed(lens, stream.attention, sae, tokens, question)
    found = by_component(stream, lens.value_map(layer), at.w, at.dest)
    gap = attribution.identity_gap(found.given[None], at.bias, at.preacts[at.dest : at.dest + 1])
    return LiveComponents(
        sae=question.sae,
        index=question.index,
        tokens=tokens,
        texts=lens.token_texts(tokens),
        dest=at.dest,
        head=head,
        names=list(found.names),
        given=(found.given.sum(1) if head is None else found.given[:, head]).tolist(),
        by_head=found.given.sum(2).tolist(),
        dfa=(found.dfa.sum(0) if head is None else found.dfa[head]).tolist(),
        bias=float(at.bias[0]),
        preact=float(at.preacts[at.dest]),
        gap=float(gap[0]),
    )


def _codes(lens: Lens, sae: SAE, tokens: list[int]) -> tuple[Tensor, SparseActs]:
    """Which positions are no destinations, bool [pos], and what fires at the others."""
    row = torch.tensor([tokens], device=lens.device)
    layer = sae.cfg.site.layer
    z = lens.read_z(row, [layer])[layer].view(1, len(tokens), -1)
    excluded = sae.excluded(z, row_starts(row.cpu(), lens.row_start))[0]
    return excluded, _fired(sae, z, excluded)


def _fired(sae: SAE, z: Tensor, excluded: Tensor) -> SparseActs:
    """What fires on z [1, pos, d_in] at positions that are destinations."""
    found = sae.encode_sparse(z[0])
    counts = ~excluded[found.token]
    return SparseActs(*(part[counts] for part in found))


@torch.no_grad()
def answer_codes(lens: Lens, sae: SAE, tokens: list[int], question: TextQuestion) -> LiveCodes:
    """Every feature that fires on these tokens, wherever it does."""
    excluded, found = _codes(lens, sae, tokens)
    return LiveCodes(
        sae=question.sae,
        tokens=tokens,
        texts=lens.token_texts(tokens),
        excluded=excluded.tolist(),
        positions=found.token.tolist(),
        features=found.feature.tolist(),
        activations=found.value.tolist(),
    )


@torch.no_grad()
def answer_sources(lens: Lens, sae: SAE, tokens: list[int], question: SourcesQuestion) -> LiveSources:
    """What each source gave to each feature at its destination, from v and pattern alone: one pass for all of them."""
    read = lens.read_attention(torch.tensor([tokens], device=lens.device), sae.cfg.site.layer)
    index, dest = torch.tensor([question.features, question.dests], device=read.z.device)
    w, _ = sae.affine(index)
    scale = sae.token_scale(read.z[0])
    at_dest = w if scale is None else w * scale[dest]
    pattern = read.pattern[0][:, dest].transpose(0, 1)  # [n, head, src]
    given = attribution.dfa(read.v[0], pattern, at_dest.view(len(index), sae.cfg.n_heads, sae.cfg.d_head))
    return LiveSources(sae=question.sae, given=given.sum(1).tolist())


@torch.no_grad()
def answer_firings(lens: Lens, sae: SAE, tokens: list[int], question: FiringQuestion) -> LiveFirings:
    """Every feature on these tokens: the strongest of each position and of all, and those that were asked for."""
    excluded, found = _codes(lens, sae, tokens)
    # By size, so that what comes first of a position or of a feature is its strongest.
    value, order = found.value.sort(descending=True, stable=True)
    fired = [
        Firing(index=index, position=position, activation=activation)
        for index, position, activation in zip(
            found.feature[order].tolist(), found.token[order].tolist(), value.tolist(), strict=True
        )
    ]
    by_position: list[list[Firing]] = [[] for _ in tokens]
    strongest: dict[int, Firing] = {}
    chosen = {index: [0.0] * len(tokens) for index in question.features}
    for one in fired:
        if len(by_position[one.position]) < question.top:
            by_position[one.position].append(one)
        if len(strongest) < question.top:
            strongest.setdefault(one.index, one)
        if one.index in chosen:
            chosen[one.index][one.position] = one.activation
    return LiveFirings(
        sae=question.sae,
        tokens=tokens,
        texts=lens.token_texts(tokens),
        excluded=excluded.tolist(),
        strongest=list(strongest.values()),
        by_position=by_position,
        features=[FeatureActivations(index=index, activations=activations) for index, activations in chosen.items()],
    )


def failed(_: Request, error: Exception) -> Response:
    """A fault of ours; the log says which."""
    del error
    return JSONResponse(
        {"error": {"code": "internal_error", "message": "The engine failed; its log says why.", "field": None}}, 500
    )


@torch.no_grad()
def answer_prompt(
    lens: Lens, saes: Sequence[SAE], tokens: list[int], question: PromptQuestion, at: int | None, check: Callable[[], None]
) -> PromptText:
    """What fires in each SAE on these tokens, from one pass; `check` is called before each SAE is read."""
    if at is not None:
        _check_dest(at, len(tokens), "at")
    row = torch.tensor([tokens], device=lens.device)
    starts = row_starts(row.cpu(), lens.row_start)
    zs = lens.read_z(row, sorted({sae.cfg.site.layer for sae in saes}))
    found = []
    for name, sae in zip(question.saes, saes, strict=True):
        check()
        z = zs[sae.cfg.site.layer].view(1, len(tokens), -1)
        excluded = sae.excluded(z, starts)[0]
        fired = _fired(sae, z, excluded)
        counts = torch.bincount(fired.token, minlength=len(tokens)).tolist()
        by_position: list[list[Firing]] = [[] for _ in tokens]
        value, order = fired.value.sort(descending=True, stable=True)
        for position, index, activation in zip(
            fired.token[order].tolist(), fired.feature[order].tolist(), value.tolist(), strict=True
        ):
            if len(by_position[position]) < question.top or position == at:
                by_position[position].append(Firing(index=index, position=position, activation=activation))
        found.append(
            PromptSae(sae=name, layer=sae.cfg.site.layer, excluded=excluded.tolist(), counts=counts, by_position=by_position)
        )
    return PromptText(tokens=tokens, texts=lens.token_texts(tokens), saes=found)


NEXT = 8
"""Tokens of each kind that an answer names."""


@torch.no_grad()
def answer_written(lens: Lens, sae: SAE, tokens: list[int], at: FeatureAt, activation: float) -> LiveWritten:
    """What the feature writes straight to the logits at its destination, where its activation is this."""
    ending = lens.read_ending(torch.tensor([tokens], device=lens.device), sae.cfg.site.layer)
    z, final, logits = ending.z[0, at.dest][None], ending.final[0, at.dest][None], ending.logits[0, at.dest]
    scale = sae.token_scale(z)
    vector = activation * sae.W_dec[at.index]
    written = lens.direct_logits(vector[None] if scale is None else vector[None] / scale, sae.cfg.site.layer, z, final)[0]
    probabilities = logits.softmax(-1)
    if at.next_text is not None:
        chosen = _first_token(lens, at.next_text)
    elif at.next is not None:
        if at.next >= len(logits):
            raise UsageError(f"{lens.info.name} has the tokens 0 to {len(logits) - 1} only.", field="next")
        chosen = at.next
    else:
        chosen = tokens[at.dest + 1] if at.dest + 1 < len(tokens) else int(logits.argmax())

    def named(ids: list[int]) -> list[NextToken]:
        return [
            NextToken(id=one, text=text, probability=float(probabilities[one]), written=float(written[one]))
            for one, text in zip(ids, lens.token_texts(ids), strict=True)
        ]

    return LiveWritten(
        activation=activation,
        chosen=named([chosen])[0],
        rank=int((written > written[chosen]).sum()),
        likely=named(logits.topk(NEXT).indices.tolist()),
        raised=named(written.topk(NEXT).indices.tolist()),
        lowered=named(written.topk(NEXT, largest=False).indices.tolist()),
    )


WRITTEN_AT_ONCE = 40_000
"""Tokens that are read in all, each text, while a model writes that reads the whole text again for each token: half a minute on
two cores with SmolLM2."""
MEAN_ROWS = 16
"""Rows of harvested text that a mean of z is taken over."""


def answer_steered(
    lens: Lens,
    saes: dict[str, SAE],
    tokens: list[int],
    question: SteerQuestion,
    edits: Sequence[Edit],
    model: str,
    check: Callable[[], None],
) -> LiveSteered:
    """The text as it is and with the edits; `saes` by name."""
    by_layer = {sae.cfg.site.layer: sae for sae in saes.values()}
    names = {sae.cfg.site.layer: name for name, sae in saes.items()}
    keep, look = question.keep_error, len(tokens) - 1 if question.look is None else question.look
    found = measure(lens, tokens, by_layer, edits, keep_error=keep, at=[look], most=question.most)
    check()
    texts = write(
        lens,
        tokens,
        by_layer,
        edits,
        question.new_tokens,
        keep_error=keep,
        temperature=question.temperature,
        seed=question.seed,
        check=check,
    )
    logits = found.logits[0], found.changed_logits[0]
    before, after = (one.softmax(-1) for one in logits)
    likely = list(dict.fromkeys([*before.topk(NEXT).indices.tolist(), *after.topk(NEXT).indices.tolist()]))
    likely.sort(key=lambda one: -abs(float(after[one] - before[one])))

    def named(ids: Sequence[int]) -> list[NextChange]:
        return [
            NextChange(
                id=one, text=text, probability=float(before[one]), changed=float(after[one]), logit=float(logits[0][one]),
                changed_logit=float(logits[1][one]),
            )
            for one, text in zip(ids, lens.token_texts(ids), strict=True)
        ]  # fmt: skip

    return LiveSteered(
        model=model,
        tokens=tokens,
        texts=lens.token_texts(tokens),
        losses=found.losses.tolist(),
        changed_losses=found.changed_losses.tolist(),
        kl=found.kl.tolist(),
        look=look,
        likely=named(likely),
        asked=named([_first_token(lens, text) for text in question.next_texts]),
        features=_changed_features(lens, saes, tokens, question),
        reached=[
            ActivationChange(
                sae=names[one.layer], index=one.index, position=one.position, activation=one.before, changed=one.after
            )
            for one in found.features
        ],
        n_reached=found.n_changed,
        plain=WrittenText(tokens=texts.plain, text=lens.decode(texts.plain)),
        changed=WrittenText(tokens=texts.changed, text=lens.decode(texts.changed)),
    )


def _first_token(lens: Lens, text: str) -> int:
    typed = lens.encode([text])[0]
    if not typed:
        raise UsageError(f"'{text}' makes no token.", field="next")
    return typed[0]


def _changed_features(lens: Lens, saes: dict[str, SAE], tokens: list[int], question: SteerQuestion) -> list[ChangedFeature]:
    """The activations, in the plain pass, of the features that the question changes."""
    row, layers = torch.tensor([tokens], device=lens.device), {saes[one.sae].cfg.site.layer for one in question.features}
    starts, zs = row_starts(row.cpu(), lens.row_start), lens.read_z(row, sorted(layers))
    return [
        ChangedFeature(
            sae=one.sae,
            index=one.index,
            activations=_activations(saes[one.sae], zs[saes[one.sae].cfg.site.layer], starts, one.index),
        )
        for one in question.features
    ]


def create_engine(settings: Settings, db: Database) -> FastAPI:
    """The engine's ASGI app."""
    engine = Engine(settings, db)
    stop = threading.Event()

    def idle() -> None:
        while not stop.wait(min(settings.engine_idle_seconds / 4, 30.0)):
            engine.rest()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        threading.Thread(target=idle, name="idle", daemon=True).start()
        yield
        stop.set()
        engine.line.close()

    def secret(given: Annotated[str, Header(alias=SECRET_HEADER)] = "") -> None:
        if not hmac.compare_digest(given.encode(), settings.secret.encode()):
            refused = HeadscopeError("The engine answers only the web process of the same installation.")
            refused.status = 403
            raise refused

    app = FastAPI(
        title="Headscope engine",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        dependencies=[Depends(secret)],
        lifespan=lifespan,
    )
    app.state.engine = engine
    watch = Watch(settings, db, "engine", gpus=gpus)
    app.add_middleware(Watched, watch=watch, on_fault=failed)

    @app.exception_handler(HeadscopeError)
    def refused(_: Request, error: HeadscopeError) -> Response:
        return JSONResponse({"error": {"code": error.code, "message": str(error), "field": error.field}}, error.status)

    @app.exception_handler(RequestValidationError)
    def misasked(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return refused(request, UsageError(f"{first['loc'][-1]}: {first['msg']}.", field=str(first["loc"][-1])))

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(watch.page(), media_type=FORMAT)

    @app.get("/health")
    def health() -> dict[str, str | None]:
        return {"model": engine.loaded, "waiting": str(engine.line.length), "bytes": str(engine.nbytes)}

    for question in (
        engine.attribute,
        engine.components,
        engine.firings,
        engine.codes,
        engine.sources,
        engine.prompt,
        engine.steer,
        engine.circuit,
    ):
        app.post(f"/{question.__name__}")(question)

    @app.post("/line/{ticket}")
    def leave(ticket: Ticket, question: PromptQuestion, wait: Wait = 0.0) -> InLine:
        return engine.leave(ticket, question, wait)

    @app.post("/line/{ticket}/steer")
    def leave_steer(ticket: Ticket, question: SteerQuestion, wait: Wait = 0.0) -> InLine:
        return engine.leave_steer(ticket, question, wait)

    @app.post("/line/{ticket}/circuit")
    def leave_circuit(ticket: Ticket, question: CircuitQuestion, wait: Wait = 0.0) -> InLine:
        return engine.leave_circuit(ticket, question, wait)

    @app.get("/line/{ticket}")
    def look(ticket: Ticket, wait: Wait = 0.0) -> InLine:
        return engine.look(ticket, wait)

    @app.delete("/line/{ticket}")
    def cancel(ticket: Ticket) -> dict[str, str | None]:
        engine.line.cancel(ticket)
        return {}

    @app.post("/warm")
    def warm(sae: Annotated[str, Body(embed=True)]) -> dict[str, str | None]:
        engine.warm(sae)
        return {}

    return app

"""Live questions on typed text: a small internal ASGI app on 127.0.0.1 that keeps a model and its SAEs warm.

`POST /attribute` answers with the full DFA matrix [head][source] of one feature at one destination, in fp32, with the
identity gap of that very answer; `POST /components` with the same DFA by component: what embedding and earlier blocks put
into each source; `POST /firings` with the features that fire most on a text, `POST /codes` with all that fire, `POST /sources`
with what source tokens gave to many features. The web asks it with a shared secret; nobody else can. One question at a time.
"""

import hmac
import logging
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from torch import Tensor

from sae_core import attribution, machine
from sae_core.components import by_component
from sae_core.errors import HeadscopeError, NotFound, UsageError
from sae_core.lens import AttentionRead, Lens, load_lens
from sae_core.saes import SAE, SparseActs, row_starts
from server.db import Database
from server.live import (
    SECRET_HEADER,
    ComponentsQuestion,
    FeatureActivations,
    Firing,
    FiringQuestion,
    LiveAttribution,
    LiveCodes,
    LiveComponents,
    LiveFirings,
    LiveQuestion,
    LiveSources,
    SourcesQuestion,
    TextQuestion,
)
from server.settings import Settings
from server.store import registry
from server.watch import FORMAT, Watch, Watched
from server.worker import gpus, open_sae

log = logging.getLogger("headscope.engine")


@dataclass
class Warm:
    """A model with the SAEs on it that were asked for."""

    model: registry.ModelRecord
    lens: Lens
    saes: dict[str, SAE]


class Engine:
    """Loads on the first question, answers one at a time, lets go when nobody has asked for a while."""

    def __init__(self, settings: Settings, db: Database) -> None:
        self.settings, self.db = settings, db
        self._turn = threading.Lock()
        self._warm: Warm | None = None
        self._asked = time.monotonic()

    @property
    def loaded(self) -> str | None:
        """Name of the model that is warm."""
        return self._warm.model.name if self._warm else None

    def attribute(self, question: LiveQuestion) -> LiveAttribution:
        """Answer a question."""
        with self._turn:
            return answer(*self._asked_for(question), question)

    def components(self, question: ComponentsQuestion) -> LiveComponents:
        """Answer a question for components."""
        with self._turn:
            return answer_components(*self._asked_for(question), question)

    def firings(self, question: FiringQuestion) -> LiveFirings:
        """Answer a question for what fires."""
        with self._turn:
            lens, sae, tokens = self._opened(question)
            for index in question.features:
                _check_feature(sae, question.sae, index, "features")
            return answer_firings(lens, sae, tokens, question)

    def codes(self, question: TextQuestion) -> LiveCodes:
        """Answer a question for all that fires."""
        with self._turn:
            return answer_codes(*self._opened(question), question)

    def sources(self, question: SourcesQuestion) -> LiveSources:
        """Answer a question for the sources of some features."""
        with self._turn:
            lens, sae, tokens = self._opened(question)
            for index, dest in zip(question.features, question.dests, strict=True):
                _check_feature(sae, question.sae, index, "features")
                _check_dest(dest, len(tokens), "dests")
            return answer_sources(lens, sae, tokens, question)

    def _asked_for(self, question: LiveQuestion) -> tuple[Lens, SAE, list[int]]:
        lens, sae, tokens = self._opened(question)
        _check_feature(sae, question.sae, question.index, "index")
        return lens, sae, tokens

    def _opened(self, question: TextQuestion) -> tuple[Lens, SAE, list[int]]:
        self._asked = time.monotonic()
        lens, sae = self._open(question.sae)
        return lens, sae, self._row(lens, question)

    def rest(self) -> bool:
        """Give the memory back if nobody has asked for a while; whether it did."""
        with self._turn:
            if self._warm is None or time.monotonic() - self._asked < self.settings.engine_idle_seconds:
                return False
            log.info("%s has not been asked for a while; unloaded", self._warm.model.name)
            self._let_go()
            return True

    def _let_go(self) -> None:
        self._warm = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _open(self, name: str) -> tuple[Lens, SAE]:
        with self.db.read() as session:
            record = registry.sae(session, name)
            model = registry.model_by_id(session, record.model_id)
        if self._warm is None or self._warm.model.source != model.source:
            self._let_go()
            self._warm = Warm(model, self._load(model), {})
        key = f"{name}@{record.sha256}"
        if key not in self._warm.saes:
            self._warm.saes[key] = open_sae(self.settings.data, record, self._warm.lens)
        return self._warm.lens, self._warm.saes[key]

    def _load(self, model: registry.ModelRecord) -> Lens:
        device = machine.pick_device(self.settings.device)
        try:
            return load_lens(model.source, name=model.name, device=device, cache=self.settings.cache)
        except torch.OutOfMemoryError:
            if device == "cpu":
                raise
            log.warning("%s is full; %s runs on the CPU", device, model.name)  # a training run has the GPU: be slow, not away
            self._let_go()
            return load_lens(model.source, name=model.name, device="cpu", cache=self.settings.cache)

    def _row(self, lens: Lens, question: TextQuestion) -> list[int]:
        """Token ids, row start first, as in training."""
        if question.tokens is not None:
            tokens = list(question.tokens)
        else:
            tokens = [lens.row_start, *lens.encode([question.text or ""])[0]]
        most = min(self.settings.engine_max_tokens, lens.info.max_context)
        if len(tokens) < 2:
            raise UsageError("There is no text; type at least one word.", field="text")
        if len(tokens) > most:
            raise UsageError(f"The text has {len(tokens)} tokens; at most {most} are taken, so shorten it.", field="text")
        if not all(0 <= token < lens.info.d_vocab for token in tokens):
            raise UsageError(f"{lens.info.name} has the tokens 0 to {lens.info.d_vocab - 1} only.", field="tokens")
        return tokens


def _check_feature(sae: SAE, name: str, index: int, field: str) -> None:
    if not 0 <= index < sae.cfg.d_sae:
        raise NotFound(f"{name} has the features 0 to {sae.cfg.d_sae - 1}; there is no {index}.", field=field)


def _check_dest(dest: int, n: int, field: str) -> None:
    if not 0 <= dest < n:
        raise UsageError(f"The text has the positions 0 to {n - 1}; there is no {dest}.", field=field)


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
    found = sae.encode_sparse(z[0])
    counts = ~excluded[found.token]
    return excluded, SparseActs(*(part[counts] for part in found))


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
        return {"model": engine.loaded}

    for question in (engine.attribute, engine.components, engine.firings, engine.codes, engine.sources):
        app.post(f"/{question.__name__}")(question)
    return app

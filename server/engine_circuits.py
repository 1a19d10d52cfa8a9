"""The engine's part of circuits: from a question to `sae_core.circuits` and `sae_core.scores`, and back to an answer."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from sae_core import circuits, scores
from sae_core.circuits import Circuit, Place
from sae_core.errors import NotFound, UsageError
from sae_core.lens import Lens
from sae_core.saes import SAE
from sae_core.transcoders import Transcoder
from server.circuits.asked import (
    CircuitEdge,
    CircuitNode,
    CircuitPlace,
    CircuitQuestion,
    CircuitSae,
    CircuitTranscoder,
    FeatureRoot,
    LikelyToken,
    LiveCircuit,
    LiveScore,
    LogitRoot,
    ScoreAt,
    ScorePair,
    ScorePart,
    place_id,
)

LARGEST = 2e9
"""Bytes that one circuit may need."""
KEPT = 4
"""Answers that are kept for a moment: each step on the page asks about the same graph again."""
LIKELY = 8
FIRE = 64
"""Features a token of a transcoder that does not say how many, about."""


class Kept:
    """The last answers, without their scores, each of the very weights that it was asked of. Emptied when the engine rests: no
    text stays."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, LiveCircuit] = OrderedDict()

    def clear(self) -> None:
        """Forget all."""
        self._answers.clear()

    def get(self, key: str, make: Callable[[], LiveCircuit]) -> LiveCircuit:
        """The answer of that key, made if it is not there."""
        if key not in self._answers:
            self._answers[key] = make()
            while len(self._answers) > KEPT:
                self._answers.popitem(last=False)
        self._answers.move_to_end(key)
        return self._answers[key]


def needs(
    lens: Lens,
    n_tokens: int,
    saes: Mapping[int, SAE],
    score: int | None = None,
    transcoders: Mapping[int, Transcoder] = MappingProxyType({}),
) -> int:
    """Bytes of a circuit's tensors, about: every part of the stream twice; of each SAE pattern, features and error; of each
    transcoder features, error and skip. For a score of the layer `score` the SAEs are read again, beside the stream's parts
    before it and what its scores are made of."""
    info = lens.info
    stream = 2 * (2 * info.n_layers + 1) * n_tokens * info.d_model
    each = info.n_heads * n_tokens**2 + 6 * n_tokens * max(info.d_in, info.d_model)
    fires = sum(min(sae.cfg.d_sae, 2 * sae.cfg.k * n_tokens) * info.d_model + n_tokens * sae.cfg.d_sae for sae in saes.values())
    beside = 0
    if score is not None:
        parts = (2 * min(score, info.n_layers) + 3) * info.d_model
        beside = n_tokens * (parts + 4 * info.d_in + info.d_head**2 + 3 * info.n_heads * n_tokens)
    of_mlps = 0
    for one in transcoders.values():
        fire = min(one.n_features, 2 * (one.cfg.k or FIRE) * n_tokens)
        of_mlps += (fire + 8 * n_tokens) * info.d_model + fire * n_tokens + (3 * info.d_model**2 if one.skip is not None else 0)
    return 4 * (stream + each * len(saes) + fires + beside + of_mlps)


@torch.no_grad()
def answer_circuit(
    lens: Lens,
    saes: Mapping[str, SAE],
    transcoders: Mapping[int, Transcoder],
    tokens: list[int],
    question: CircuitQuestion,
    model: str,
    versions: Sequence[str],
    kept: Kept,
    check: Callable[[], None],
) -> LiveCircuit:
    """The circuit on these tokens; `saes` by name, `transcoders` by layer, and `versions` what tells the weights of both from
    others. `check` is called between steps."""
    by_layer = {sae.cfg.site.layer: sae for sae in saes.values()}
    size = needs(lens, len(tokens), by_layer, None if question.score is None else question.score.layer, transcoders)
    if size > LARGEST:
        through = f"{len(saes)} SAEs" + (f" and {len(transcoders)} transcoders" if transcoders else "")
        raise UsageError(
            f"A circuit of {len(tokens)} tokens through {through} needs about {size / 1e9:.1f} GB; at most "
            f"{LARGEST / 1e9:.0f} are taken, so shorten the text or choose fewer SAEs.",
            field="text",
        )
    key = repr((question.model_dump_json(exclude={"score", "text"}), tokens, lens.info.fingerprint, versions))
    found = kept.get(key, lambda: _graph(lens, saes, by_layer, transcoders, tokens, question, model, check))
    if question.score is None:
        return found
    check()
    return found.model_copy(update={"score": _score(lens, by_layer, tokens, question.score, check)})


def _graph(
    lens: Lens,
    saes: Mapping[str, SAE],
    by_layer: Mapping[int, SAE],
    transcoders: Mapping[int, Transcoder],
    tokens: list[int],
    question: CircuitQuestion,
    model: str,
    check: Callable[[], None],
) -> LiveCircuit:
    asked = question.root
    likely: list[LikelyToken] = []
    root: circuits.FeatureRoot | circuits.LogitRoot
    if isinstance(asked, FeatureRoot):
        sae = saes[asked.sae]
        if not 0 <= asked.index < sae.cfg.d_sae:
            raise NotFound(f"{asked.sae} has the features 0 to {sae.cfg.d_sae - 1}; there is no {asked.index}.", field="root")
        root = circuits.FeatureRoot(sae.cfg.site.layer, asked.index, asked.dest)
    else:
        root, likely = _logit(lens, tokens, asked)
    found = circuits.trace(
        lens, tokens, by_layer, root, transcoders=transcoders, share=question.share, most=question.most, depth=question.depth,
        widest=question.widest, check=check,
    )  # fmt: skip
    return LiveCircuit(
        model=model,
        n_layers=lens.info.n_layers,
        tokens=tokens,
        texts=lens.token_texts(tokens),
        saes=[
            CircuitSae(sae=name, layer=layer) for layer, name in sorted((sae.cfg.site.layer, name) for name, sae in saes.items())
        ],
        transcoders=[CircuitTranscoder(layer=layer, n_features=one.n_features) for layer, one in sorted(transcoders.items())],
        root=_id(found.root),
        likely=likely,
        nodes=_nodes(found),
        edges=[
            CircuitEdge(
                source=_id(edge.source),
                target=_id(node.place),
                value=edge.value,
                share=_over(edge.value, node.value),
                effect=edge.value * _over(node.effect, node.value),
                heads=list(edge.heads),
            )
            for node in found.nodes.values()
            for edge in node.edges
        ],
        gap=found.gap,
        score=None,
    )


def _logit(lens: Lens, tokens: list[int], asked: LogitRoot) -> tuple[circuits.LogitRoot, list[LikelyToken]]:
    """The root, and the tokens that might come there."""
    dest = len(tokens) - 1 if asked.dest is None else asked.dest
    if not 0 <= dest < len(tokens):
        raise UsageError(f"The text has the positions 0 to {len(tokens) - 1}; there is no {dest}.", field="dest")
    probabilities = lens.next_logits(torch.tensor([tokens[: dest + 1]], device=lens.device))[0].softmax(-1)
    token = _token(lens, asked.token, asked.text)
    token = int(probabilities.argmax()) if token is None else token
    against = _token(lens, asked.against, asked.against_text)
    if token == against:
        raise UsageError("The two tokens are the same, so their difference is 0; name another one.", field="against")
    root = circuits.LogitRoot(token, dest, against)
    first = [token] if against is None else [token, against]
    ids = list(dict.fromkeys([*first, *probabilities.topk(LIKELY).indices.tolist()]))
    named = zip(ids, lens.token_texts(ids), strict=True)
    return root, [LikelyToken(id=one, text=text, probability=float(probabilities[one])) for one, text in named]


def _token(lens: Lens, token: int | None, text: str | None) -> int | None:
    if text is not None:
        typed = lens.encode([text])[0]
        if not typed:
            raise UsageError(f"'{text}' makes no token.", field="root")
        return typed[0]
    if token is not None and token >= lens.info.d_vocab:
        raise UsageError(f"{lens.info.name} has the tokens 0 to {lens.info.d_vocab - 1} only.", field="root")
    return token


def _nodes(found: Circuit) -> list[CircuitNode]:
    whole = found.nodes[found.root].value
    places = sorted(found.effects, key=lambda place: (place != found.root, -place.layer, -abs(found.effects[place])))
    nodes = []
    for place in places:
        node = found.nodes.get(place)
        nodes.append(
            CircuitNode(
                **_place(place).model_dump(),
                value=None if node is None else node.value,
                activation=found.activations.get(place),
                effect=found.effects[place],
                share=_over(found.effects[place], whole),
                followed=node is not None,
                rest=0.0 if node is None else node.rest,
                n_rest=0 if node is None else node.n_rest,
                gap=0.0 if node is None else node.gap,
            )
        )
    return nodes


def _score(lens: Lens, by_layer: Mapping[int, SAE], tokens: Sequence[int], at: ScoreAt, check: Callable[[], None]) -> LiveScore:
    why = scores.explain(
        lens, tokens, by_layer, layer=at.layer, head=at.head, dest=at.dest, src=at.src, against_mean=at.against_mean,
        most=at.most, check=check,
    )  # fmt: skip

    def parts(all_parts: Sequence[scores.Part]) -> list[ScorePart]:
        return [ScorePart(**_place(part.place).model_dump(), value=part.value) for part in all_parts[: at.most]]

    return LiveScore(
        layer=at.layer,
        head=why.head,
        dest=at.dest,
        src=at.src,
        against_mean=at.against_mean,
        value=why.value,
        scores=list(why.scores),
        means=list(why.means),
        patterns=list(why.patterns),
        cap=why.cap,
        queries=parts(why.queries),
        query_rest=sum(part.value for part in why.queries[at.most :]),
        keys=parts(why.keys),
        key_rest=sum(part.value for part in why.keys[at.most :]),
        pairs=[ScorePair(query=_place(pair.query), key=_place(pair.key), value=pair.value) for pair in why.pairs],
        rest=why.rest,
        n_rest=why.n_rest,
        gap=why.gap,
    )


def _place(place: Place) -> CircuitPlace:
    return CircuitPlace(
        id=_id(place), kind=place.kind, layer=place.layer, position=place.position, index=place.index, name=place.name
    )


def _id(place: Place) -> str:
    return place_id(place.kind, place.layer, place.position, place.index, place.name)


def _over(value: float, whole: float) -> float:
    return value / whole if whole else 0.0

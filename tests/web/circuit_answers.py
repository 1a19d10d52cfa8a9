"""A circuit by hand, small enough to add up in one's head; it stands for what the engine answers."""

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
    ScorePair,
    ScorePart,
)

TEXTS = ["<|endoftext|>", "The", " tide", " came", " back"]
ROOT, UPPER, LOWER, OF_MLP = "f17.3@3", "f11.5@1", "f8.2@0", "t2.4@2"


def place(id_: str) -> CircuitPlace:
    what, _, position = id_.partition("@")
    kinds = {
        "f": "feature", "e": "error", "t": "MLP feature", "u": "MLP error", "a": "attention", "m": "MLP", "x": "embedding",
        "l": "logit",
    }  # fmt: skip
    if id_.startswith("b:"):
        return CircuitPlace(id=id_, kind="bias", layer=-1, position=-1, index=-1, name=id_[2:].replace("-", " "))
    layer, _, index = what[1:].partition(".")
    if what[0] == "l":
        index, layer = layer, "30"
    return CircuitPlace(
        id=id_, kind=kinds[what[0]], layer=int(layer or -1), position=int(position), index=int(index or -1), name=""
    )  # fmt: skip


def node(id_: str, effect: float, value: float | None = None, rest: float = 0.0) -> CircuitNode:
    fires = {ROOT: 2.0, UPPER: 4.0, LOWER: 1.0, OF_MLP: 1.5}.get(id_)
    return CircuitNode(
        **place(id_).model_dump(), value=value, activation=fires, effect=effect, share=effect / 2, followed=value is not None,
        rest=rest, n_rest=7 if rest else 0, gap=0.0,
    )  # fmt: skip


def edge(source: str, target: str, value: float, whole: float, effect: float, heads: list[float] | None = None) -> CircuitEdge:
    return CircuitEdge(source=source, target=target, value=value, share=value / whole, effect=effect, heads=heads or [])


def circuit_of(question: CircuitQuestion) -> LiveCircuit:
    """The root 2.0 = 1.0 + 0.6 - 0.2 + a rest of 0.6; of that 1.0, three quarters come from the embedding."""
    score = None
    if question.score is not None:
        at, query, key = question.score, place("m2@3"), place("f8.2@1")
        score = LiveScore(
            layer=at.layer, head=at.head or 0, dest=at.dest, src=at.src, against_mean=at.against_mean, value=1.25,
            scores=[1.25, -0.5], means=[0.25, 0.0], patterns=[0.5, 0.125], cap=None,
            queries=[ScorePart(**query.model_dump(), value=1.0)], query_rest=0.25,
            keys=[ScorePart(**key.model_dump(), value=1.5)],
            key_rest=-0.25, pairs=[ScorePair(query=query, key=key, value=1.5)], rest=-0.25, n_rest=20, gap=0.0,
        )  # fmt: skip
    root = ROOT if isinstance(question.root, FeatureRoot) else "l7@4"
    return LiveCircuit(
        model="smollm2-135m", n_layers=30, tokens=[0, 504, 20120, 1354, 837], texts=TEXTS,
        saes=[CircuitSae(sae=question.saes[0], layer=layer) for layer in (8, 11, 17)], transcoders=[],
        root=root,
        likely=[] if root == ROOT else [LikelyToken(id=7, text=" in", probability=0.25)],
        nodes=[
            node(root, 2.0, 2.0, 0.6), node(UPPER, 1.0, 4.0, 0.5), node(LOWER, 0.1), node("m2@2", 0.6), node("e8@1", 0.025),
            node("x@1", 0.75), node("b:SAE-bias", -0.2),
        ],
        edges=[
            edge(UPPER, root, 1.0, 2.0, 1.0, [1.25, -0.25]), edge("m2@2", root, 0.6, 2.0, 0.6, [0.6, 0.0]),
            edge("b:SAE-bias", root, -0.2, 2.0, -0.2), edge("x@1", UPPER, 3.0, 4.0, 0.75, [3.0, 0.0]),
            edge(LOWER, UPPER, 0.4, 4.0, 0.1, [0.0, 0.4]), edge("e8@1", UPPER, 0.1, 4.0, 0.025, [0.1, 0.0]),
        ],
        gap=1e-8, score=score,
    )  # fmt: skip


def through_mlps(question: CircuitQuestion) -> LiveCircuit:
    """The same with a transcoder of layer 2: of the MLP's 0.6 a feature gave 0.5, four fifths of that from the embedding."""
    whole = circuit_of(question)
    return whole.model_copy(
        update={
            "transcoders": [CircuitTranscoder(layer=2, n_features=16)],
            "nodes": [
                *(one for one in whole.nodes if one.kind != "MLP"), node(OF_MLP, 0.5, 1.5, 0.3), node("u2@2", 0.1),
                node("x@2", 0.4),
            ],
            "edges": [
                *(one for one in whole.edges if one.source != "m2@2"), edge(OF_MLP, whole.root, 0.5, 2.0, 0.5, [0.5, 0.0]),
                edge("u2@2", whole.root, 0.1, 2.0, 0.1, [0.0, 0.1]), edge("x@2", OF_MLP, 1.2, 1.5, 0.4),
            ],
        }
    )  # fmt: skip

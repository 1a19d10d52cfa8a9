"""A circuit as the JSON that circuit-tracer's viewer reads (safety-research/circuit-tracer, its `graph_models.py`, schema 1).

Its viewer knows features of transcoders, their errors, token embeddings and logits; ours of MLPs are those. What it has no word
for keeps its numbers and gets a type of its own with a text (`clerp`): features of attention and what their SAEs leave, whole
attentions and MLPs, positions, and biases, which stand at position 0. `weight` is an edge's value in units of its target's, as
theirs; `influence` the share of the root, by size.
"""

from typing import Any

from server.circuits.asked import FEATURES, CircuitNode, LiveCircuit
from server.circuits.view import View, said, token_of

TYPES = {
    "feature": "attention feature",
    "error": "attention reconstruction error",
    "attention": "attention output",
    "MLP feature": "cross layer transcoder",
    "MLP error": "mlp reconstruction error",
    "MLP": "mlp output",
    "embedding": "embedding",
    "position": "position embedding",
    "bias": "bias",
    "logit": "logit",
}


def as_tracer(answer: LiveCircuit, view: View, *, slug: str, labels: dict[str, str]) -> dict[str, Any]:
    """The graph with what is pinned and grouped in it; `labels` by id of a feature's node."""
    ids = {node.id: _id(node, answer) for node in answer.nodes}
    return {
        "metadata": {
            "slug": slug,
            "scan": answer.model,
            "transcoder_list": [one.sae for one in answer.saes],
            "prompt_tokens": [_shown(text) for text in answer.texts],
            "prompt": "".join(answer.texts[1:]),
            "node_threshold": None,
            "schema_version": 1,
        },
        "qParams": {
            "pinnedIds": [ids[one] for one in view.pinned if one in ids],
            "supernodes": [
                [name, *(ids[one] for one in members if one in ids)]
                for name, members in view.grouped.items()
                if any(one in ids for one in members)
            ],
            "linkType": "both",
            "clickedId": ids[answer.root],
            "sg_pos": "",
        },
        "nodes": [_node(node, answer, ids[node.id], labels.get(node.id, "")) for node in answer.nodes],
        "links": [{"source": ids[edge.source], "target": ids[edge.target], "weight": edge.value} for edge in answer.edges],
    }


def _node(node: CircuitNode, answer: LiveCircuit, id_: str, label: str) -> dict[str, Any]:
    first = next(one.id for one in answer.nodes)
    probability = next((one.probability for one in answer.likely if one.id == node.index), 0.0) if node.kind == "logit" else 0.0
    words = said(node, answer)
    if node.kind == "logit":
        # The viewer reads the probability out of the text.
        against = f" - {_shown(token_of(int(node.name), answer))}" if node.name else ""
        words = f'Output "{_shown(token_of(node.index, answer))}{against}" (p={probability:.3f})'
    return {
        "node_id": id_,
        "feature": _cantor(node.layer, node.index)
        if node.kind in FEATURES
        else node.index
        if node.kind == "logit"
        else -1
        if node.kind != "embedding"
        else node.position,
        "layer": "E" if node.layer < 0 else str(node.layer + 1 if node.kind == "logit" else node.layer),
        "ctx_idx": max(0, node.position),
        "feature_type": TYPES[node.kind],
        "token_prob": probability,
        "is_target_logit": node.id == first and node.kind == "logit",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{id_}-0",
        "clerp": label or words,
        "influence": min(1.0, abs(node.share)),
        "activation": node.activation,
    }


def _id(node: CircuitNode, answer: LiveCircuit) -> str:
    """As theirs where they have one, but for errors: layer, feature, position. Where MLPs have features theirs are those, else
    attention's."""
    mlps = bool(answer.transcoders)
    if node.kind == ("MLP feature" if mlps else "feature"):
        return f"{node.layer}_{node.index}_{node.position}"
    if node.kind == ("MLP error" if mlps else "error"):
        # Theirs begins with 0_, as does that of a feature of layer 0, which the index may make the same.
        return f"error_{node.layer}_{node.position}"
    if node.kind == "embedding":
        return f"E_{answer.tokens[node.position]}_{node.position}"
    if node.kind == "logit":
        return f"{node.layer + 1}_{node.index}{'-' + node.name if node.name else ''}_{node.position}"
    return node.id


def _cantor(x: int, y: int) -> int:
    """One number of two, as their viewer takes them apart again."""
    return (x + y) * (x + y + 1) // 2 + y


def _shown(text: str) -> str:
    return text.replace("\n", "⏎").replace("\t", "→").replace("\r", "↵")

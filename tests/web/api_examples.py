"""Asks every route of the API once and writes what it answers, shortened, to the file that the document's examples come from:
`python -m tests.web.api_examples`."""

import json
import tempfile
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from server.api.common import EXAMPLES
from server.app import create_app
from server.circuits.asked import CircuitQuestion, LiveCircuit
from server.live import (
    ActivationChange,
    ChangedFeature,
    ComponentsQuestion,
    Firing,
    FiringQuestion,
    InLine,
    LiveAttribution,
    LiveComponents,
    LiveFirings,
    LivePrompt,
    LiveQuestion,
    LiveSteered,
    LiveWritten,
    NextChange,
    NextToken,
    PromptQuestion,
    PromptSae,
    PromptText,
    SteerQuestion,
    WrittenText,
)
from server.store import search
from tests.web.circuit_answers import through_mlps
from tests.web.conftest import at, database_of, put, queued
from tests.web.factory import Shape

SAE = "/saes/smollm2-l17"
OF = f"{SAE}/features/3"
KEY = {"sae": "smollm2-l17", "index": 3}
JOB = {"kind": "train", "name": "tides", "config": {"model": "smollm2-135m", "corpus": "demo", "site": {"layer": 17}}}
ASKED = {"saes": ["smollm2-l17"], "text": "The tide", "feature": {**KEY, "dest": 2}}
TRACED = {
    "saes": ["smollm2-l17"], "text": "The tide came back", "root": {"kind": "feature", **KEY, "dest": 3},
    "score": {"layer": 17, "dest": 3, "src": 1},
}  # fmt: skip
CALLS: tuple[tuple[str, str, str, Any], ...] = (
    ("list_models", "GET", "/models", None),
    ("read_model_heads", "GET", "/models/smollm2-135m/heads", None),
    ("read_model", "GET", "/models/smollm2-135m", None),
    ("list_saes", "GET", "/saes", None),
    ("read_sae", "GET", SAE, None),
    ("list_harvests", "GET", "/harvests", None),
    ("read_harvest", "GET", "/harvests/1", None),
    ("list_harvests_of", "GET", f"{SAE}/harvests", None),
    ("list_features", "GET", f"{SAE}/features?limit=1", None),
    ("read_feature", "GET", f"{OF}?include=logits,dfa", None),
    ("read_batch", "POST", "/features/batch", {"features": [KEY], "include": "heads"}),
    ("list_heads", "GET", f"{SAE}/heads", None),
    ("read_head", "GET", f"{SAE}/heads/4", None),
    ("list_families", "GET", f"{SAE}/families", None),
    ("search_everywhere", "GET", "/search?q=tide", None),
    ("search_within", "GET", f"{SAE}/search?q=tide&kind=token", None),
    ("create_list", "POST", "/lists", {"name": "Tides"}),
    ("add_entry", "POST", "/lists/1/entries", KEY),
    ("list_lists", "GET", "/lists", None),
    ("read_list", "GET", "/lists/1", None),
    ("describe_list", "PUT", "/lists/1", {"name": "Tides", "description": "What comes back."}),
    ("order_list", "PUT", "/lists/1/order", {"entries": [1]}),
    ("annotate_entry", "PUT", "/lists/1/entries/1", {"note": "the clearest"}),
    ("remove_entry", "DELETE", "/lists/1/entries/1", None),
    ("restore_entry", "POST", "/lists/1/entries/1/restore", None),
    ("delete_list", "DELETE", "/lists/1", None),
    ("restore_list", "POST", "/lists/1/restore", None),
    ("add_label", "POST", f"{OF}/labels", {"text": "tides"}),
    ("list_labels", "GET", "/labels", None),
    ("change_label", "PUT", f"{OF}/labels/1", {"text": "tide tables"}),
    ("read_labels", "GET", f"{OF}/labels", None),
    ("withdraw_label", "DELETE", f"{OF}/labels/2", None),
    ("add_note", "POST", f"{OF}/notes", {"text": "Comes back before dark."}),
    ("delete_note", "DELETE", f"{OF}/notes/1", None),
    ("add_star", "PUT", f"{OF}/star", None),
    ("remove_star", "DELETE", f"{OF}/star", None),
    ("list_jobs", "GET", "/jobs?limit=1", None),
    ("create_job", "POST", "/jobs", JOB),
    ("read_job", "GET", "/jobs/train-smollm2-l17-1", None),
    ("cancel_job", "POST", "/jobs/train-tides-1/cancel", None),
    ("retry_job", "POST", "/jobs/train-tides-1/retry", None),
    ("firings", "POST", "/live/firings", {"sae": "smollm2-l17", "text": "The tide", "features": [3], "top": 1}),
    ("attribution", "POST", "/live/attribution", {**KEY, "text": "The tide"}),
    ("components", "POST", "/live/components", {**KEY, "text": "The tide"}),
    ("prompt", "POST", "/live/prompt", ASKED),
    ("steer", "POST", "/live/steer", {"features": [{**KEY, "value": 8.0}], "text": "The tide", "new_tokens": 1}),
    ("circuit", "POST", "/live/circuit", TRACED),
    ("leave_circuit", "PUT", "/live/line/Xw2Lr7Tk3J_0aQ9z/circuit", TRACED),
    ("leave_prompt", "PUT", "/live/line/k3J_0aQ9zXw2Lr7T", ASKED),
    ("leave_steer", "PUT", "/live/line/k3J_0aQ9zXw2Lr7T/steer", {"features": [{**KEY, "value": 8.0}], "text": "The tide"}),
    ("look_for_prompt", "GET", "/live/line/k3J_0aQ9zXw2Lr7T", None),
    ("cancel_prompt", "DELETE", "/live/line/k3J_0aQ9zXw2Lr7T", None),
    ("share_prompt", "POST", "/prompts", {"text": "The tide", "saes": ["smollm2-l17"]}),
    ("read_prompt", "GET", "/prompts/{shared}", None),
    ("delete_prompt", "DELETE", "/prompts/{shared}", None),
)


class Answers:
    """Stands for the engine: two heads on three tokens, so small that one sees the sums."""

    texts = ["<|endoftext|>", "The", " tide"]
    at = {"sae": "smollm2-l17", "tokens": [0, 504, 20120], "texts": texts}

    def firings(self, question: FiringQuestion) -> LiveFirings:
        one = {"index": 3, "position": 2, "activation": 1.5}
        features = [{"index": index, "activations": [0.0, 0.0, 1.5]} for index in question.features]
        return LiveFirings.model_validate(
            {
                **self.at,
                "excluded": [True, False, False],
                "strongest": [one],
                "by_position": [[], [], [one]],
                "features": features,
            }
        )

    def attribute(self, _: LiveQuestion) -> LiveAttribution:
        return LiveAttribution(
            sae="smollm2-l17", index=3, tokens=self.at["tokens"], texts=self.texts, activations=[0.0, 0.0, 1.5],
            preacts=[-0.4, -0.1, 1.5], excluded=[True, False, False], dest=2, dfa=[[0.5, 1.0, 0.5], [0.0, -0.25, 0.0]],
            bias=-0.25, gap=0.0,
        )  # fmt: skip

    def components(self, _: ComponentsQuestion) -> LiveComponents:
        return LiveComponents(
            sae="smollm2-l17", index=3, tokens=self.at["tokens"], texts=self.texts, dest=2, head=None,
            names=["embedding", "MLP 0"], given=[[0.5, 0.5, 0.0], [0.0, 0.25, 0.5]], by_head=[[1.25, -0.25], [0.75, 0.0]],
            dfa=[0.5, 0.75, 0.5], bias=-0.25, preact=1.5, gap=0.0,
        )  # fmt: skip

    def prompt(self, question: PromptQuestion) -> LivePrompt:
        one = Firing(index=3, position=2, activation=1.5)
        sae = PromptSae(sae="smollm2-l17", layer=17, excluded=[True, False, False], counts=[0, 0, 1], by_position=[[], [], [one]])
        token = NextToken(id=1354, text=" came", probability=0.25, written=0.125)
        written = LiveWritten(activation=1.5, chosen=token, rank=12, likely=[token], raised=[token], lowered=[token])
        return LivePrompt(
            model="smollm2-135m", prompt=PromptText(tokens=self.at["tokens"], texts=self.texts, saes=[sae]), against=None,
            attribution=self.attribute(LiveQuestion(**KEY, text=question.text)), written=written,
        )  # fmt: skip

    def steer(self, _: SteerQuestion) -> LiveSteered:
        came = NextChange(id=1354, text=" came", probability=0.25, changed=0.5, logit=11.5, changed_logit=12.25)
        return LiveSteered(
            model="smollm2-135m", tokens=self.at["tokens"], texts=self.texts, losses=[5.5, 4.25], changed_losses=[5.5, 3.75],
            kl=[0.0, 0.0, 0.5], look=2, likely=[came], asked=[came],
            features=[ChangedFeature(sae="smollm2-l17", index=3, activations=[0.0, 0.0, 1.5])],
            reached=[ActivationChange(sae="smollm2-l20", index=12, position=2, activation=0.0, changed=1.25)], n_reached=1,
            plain=WrittenText(tokens=[314], text=" is"), changed=WrittenText(tokens=[1354], text=" came"),
        )  # fmt: skip

    def circuit(self, question: CircuitQuestion) -> LiveCircuit:
        return through_mlps(question)

    def leave_circuit(self, ticket: str, question: CircuitQuestion, wait: float) -> InLine:
        return InLine(ticket=ticket, place=2, answer=None, circuit=None if wait == 0 else self.circuit(question))

    def leave(self, ticket: str, _: PromptQuestion, wait: float) -> InLine:
        return InLine(ticket=ticket, place=2, answer=None if wait == 0 else self.prompt(_))

    def leave_steer(self, ticket: str, _: SteerQuestion, wait: float) -> InLine:
        return InLine(ticket=ticket, place=1, answer=None, steered=None if wait == 0 else self.steer(_))

    def look(self, ticket: str, _: float = 0.0) -> InLine:
        return InLine(ticket=ticket, place=0, answer=None)

    def cancel(self, _: str) -> None:
        pass

    def close(self) -> None:
        pass


def recorded(folder: Path) -> dict[str, Any]:
    """What every route answers, whole, by its operation's id."""
    settings = queued(put(at(folder), Shape(n_features=12, n_dead=1, running_job=False)))
    with database_of(settings) as database:
        search.write(database, 1, search.unfenced)
    app = create_app(settings)
    app.state.live = Answers()
    found = {}
    with TestClient(app, base_url="http://127.0.0.1:8000", headers={"X-Author": "Maren"}) as client:
        for name, method, path, body in CALLS:
            shared = found.get("share_prompt", {}).get("line", {}).get("id")
            answer = client.request(method, f"/api/v1{path}".replace("{shared}", str(shared)), json=body)
            assert answer.is_success, (name, answer.text)
            found[name] = answer.json()
    return found


def short(value: Any) -> Any:
    """The same with one item of each longer list, numbers in five digits, and little of what is free in form."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list):
        pair = len(value) <= 3 and not any(isinstance(one, list | dict) for one in value)
        return [short(one) for one in (value if pair else value[:1])]
    if isinstance(value, dict):
        return {name: {} if name in FREE else short(one) for name, one in value.items()}
    return value


FREE = ("config", "metrics", "detail", "evidence", "sample", "values")

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        examples = {name: short(answer) for name, answer in recorded(Path(folder)).items()}
    EXAMPLES.write_text(json.dumps(examples, ensure_ascii=False, indent=1, sort_keys=True) + "\n")

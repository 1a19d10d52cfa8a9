"""What a script for Neuronpedia does, with the published client in an environment of its own: `python -P
bench/_neuronpedia_client.py '<json>'` (see `main`). What it found is the last line, as JSON; the client says things before."""

import json
import sys
from dataclasses import asdict
from typing import Any

from neuronpedia import ActivationRequest, FeatureRequest, ListRequest, SAEFeatureRequest, SourceSetRequest, set_api_key
from neuronpedia.np_explanation import Explanation
from neuronpedia.np_feature import Feature
from neuronpedia.np_list import NPListItem
from neuronpedia.requests.base_request import NPRequest
from neuronpedia.requests.source_activation_request import SourceActivationRequest
from neuronpedia.requests.topk_by_token_request import TopKByTokenRequest


def stored(model: str, source: str, index: int) -> dict[str, Any]:
    """Reads a feature, its set, and works with a list."""
    feature = FeatureRequest().get(model, source, index)
    whole = SAEFeatureRequest().get(model, source, str(index))
    source_set = SourceSetRequest().get(model, source.split("-", 1)[1])
    made = ListRequest().new("From a script", "why")
    ListRequest().add_items(made, [NPListItem(model, source, str(index), "the first"), NPListItem(model, source, "5")])
    return {
        "feature": asdict(feature),
        "whole": json.loads(whole.jsonData),
        "set": asdict(source_set),
        "source": asdict(source_set.get_source_for_layer_number(int(source.split("-")[0]))),
        "made": asdict(made),
        "read": asdict(ListRequest().get(made.id)),
        "owned": [asdict(one) for one in ListRequest().get_owned()],
    }


def upload(model: str, source: str, index: int) -> dict[str, Any]:
    """Sends explanations, and a feature of its own, which is refused."""
    words = Explanation(model, source, index, "words that follow a number", "oai_attention-head", "gpt-4o-mini")
    sent = FeatureRequest().upload_batch(model, source, [Feature(model, source, index, explanations=[words])])
    try:
        refused = FeatureRequest().upload_batch(model, source, [Feature(model, source, index, density=0.5)])
    except Exception as error:
        refused = str(error)
    return {"sent": sent, "refused": refused, "feature": asdict(FeatureRequest().get(model, source, index))}


def live(model: str, source: str, index: int) -> dict[str, Any]:
    """Asks about typed text in each of the ways there are."""
    ask, top, by_token = ActivationRequest(), SourceActivationRequest(), TopKByTokenRequest()
    texts = ["Hello world", "One two three"]
    return {
        "one": asdict(ask.compute_activation_for_text(model, source, str(index), texts[0])),
        "many": [asdict(one) for one in ask.compute_activation_for_texts(model, source, str(index), texts)],
        "all": ask.compute_all_source_activations_for_text(model, source, texts),
        "top": [asdict(one) for one in top.compute_top_features_for_text(model, source, texts[0])],
        "tops": [[asdict(one) for one in text] for text in top.compute_top_features_for_texts(model, source, texts)],
        "by_token": [asdict(one) for one in by_token.compute_top_features_by_token_for_text(model, source, texts[0])],
        "by_tokens": [
            [asdict(one) for one in text] for text in by_token.compute_top_features_by_token_for_texts(model, source, texts)
        ],
    }


def missing(model: str, source: str, index: int) -> list[str]:
    """Asks for what is not there."""
    said = []
    for at in ((model, source, 10**6), (model, "3-nothing", index), ("no-model", source, index)):
        try:
            FeatureRequest().get(*at)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def main() -> None:
    """Do what is asked."""
    asked = json.loads(sys.argv[1])
    NPRequest.BASE_URL = asked["base"] + "/api"  # the one line that changes
    set_api_key("any")
    doing = {"stored": stored, "upload": upload, "live": live, "missing": missing}[asked["do"]]
    print(json.dumps(doing(asked["model"], asked["source"], asked["index"]), default=vars))


if __name__ == "__main__":
    main()

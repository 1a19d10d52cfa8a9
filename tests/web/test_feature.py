"""`/saes/{sae}/features/{index}`."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from sae_core.errors import EngineAway
from server.app import create_app
from server.db import Database
from server.live import Live, LiveAttribution, LiveQuestion
from server.pages.reply import to_json
from server.rendering import signed
from server.settings import Settings
from server.store.features import DfaColumns, DfaEntry, feature_page
from server.store.saes import find_sae
from server.tables import FeatureDetail
from tests.web.conftest import SAE, at, put
from tests.web.factory import SAMPLE, Shape
from tests.web.reading import PART, Reader, counted

FEATURE = f"{SAE}/features/3"


def test_every_example_adds_up_to_its_pre_activation(filled: Settings) -> None:
    database = Database(filled.url)
    with database.read() as session:
        page = feature_page(session, find_sae(session, "smollm2-l17"), 3)
    database.close()
    assert len(page.examples) == 12
    for example in page.examples:
        listed = sum(entry.value for entry in example.dfa)
        total = listed + sum(example.dropped) + sum(example.before)
        assert abs(total + example.bias - example.preact) < 1e-4 * (example.abs_dfa + abs(example.bias))
        assert example.gap < 1e-4
        assert sum(example.by_head) == pytest.approx(total)


def test_it_shows_the_sum_beside_the_pre_activation_and_the_gap(client: TestClient) -> None:
    example = client.get(f"{FEATURE}.json").json()["examples"][0]
    sign = "−" if example["bias"] < 0 else "+"
    said = f"{example['dfa_sum']:.2f} {sign} {abs(example['bias']):.2f} = {example['preact']:.2f}"
    assert said in Reader(client.get(FEATURE).text).text


def texts_of(html: str) -> list[tuple[dict[str, str], list[tuple[str, str]]]]:
    """The attributes of each example's text, and its marked tokens as (position, classes); the destination's begin with `b`."""
    found: list[tuple[dict[str, str], list[tuple[str, str]]]] = []
    for tag, attrs in Reader(html).elements:
        if tag == "p" and "data-at" in attrs:
            found.append((attrs, []))
        elif tag in ("u", "b") and found and len(found[-1][1]) < len(found[-1][0]["data-at"].split()):
            steps = found[-1][0]["data-at"].split()[: len(found[-1][1]) + 1]
            found[-1][1].append((str(sum(map(int, steps))), f"{tag} {attrs.get('class', '')}"))
    return found


def test_the_destination_is_marked_once_in_each_example(client: TestClient) -> None:
    examples = client.get(f"{FEATURE}.json").json()["examples"]
    shown = texts_of(client.get(FEATURE).text)
    assert [[at for at, what in marked if what[0] == "b"] for _, marked in shown] == [[str(e["dest"])] for e in examples]
    assert [attrs["data-dest"] for attrs, _ in shown] == [str(e["dest"]) for e in examples]


def test_every_token_with_a_number_is_marked_at_its_place(client: TestClient) -> None:
    examples = client.get(f"{FEATURE}.json").json()["examples"]
    shown = texts_of(client.get(f"{FEATURE}?context=full").text)
    for example, (_, marked) in zip(examples, shown, strict=True):
        numbered = {example["dest"], *(e["src"] for e in example["dfa"]), *map(int, example["acts"])}
        assert [int(at) for at, _ in marked] == sorted(numbered)


def test_an_examples_address_has_its_exact_numbers(client: TestClient) -> None:
    for example in client.get(f"{FEATURE}.json").json()["examples"]:
        page = client.get(f"{FEATURE}/examples/{example['band']}/{example['rank']}.json").json()
        assert page["example"] == example
        by_source: dict[int, float] = {}
        for entry in example["dfa"]:
            by_source[entry["src"]] = by_source.get(entry["src"], 0) + entry["value"]
        assert {s["position"]: s["value"] for s in page["sources"]} == pytest.approx(by_source)
        sizes = [abs(source["value"]) for source in page["sources"]]
        assert sizes == sorted(sizes, reverse=True)
        whole = sum(source["value"] for source in page["sources"]) + page["left_over"] + example["bias"]
        assert whole == pytest.approx(example["preact"], abs=1e-4 * (example["abs_dfa"] + abs(example["bias"])))


def test_a_source_is_split_by_head_with_its_numbers(client: TestClient) -> None:
    page = client.get(f"{FEATURE}/examples/0/1.json").json()
    for source in page["sources"][:3]:
        part = client.get(f"{FEATURE}/examples/0/1?source={source['position']}", headers=PART).text
        assert "<html" not in part
        text = " ".join(Reader(part).text.split())
        assert f"Together {signed(source['value'])} of" in text
        for one in source["heads"]:
            assert signed(one["value"]) in text
        links = [a["href"] for a in Reader(part).all("a") if "head=" in a["href"]]
        heads = sorted(one["head"] for one in source["heads"])
        assert links == [f"{FEATURE}?head={head}#example-0-1" for head in heads]
        assert part.strip() in client.get(f"{FEATURE}/examples/0/1?source={source['position']}").text


def test_a_token_without_an_entry_says_why_it_has_no_numbers(client: TestClient) -> None:
    page = client.get(f"{FEATURE}/examples/0/0.json").json()
    example, known = page["example"], {source["position"] for source in page["sources"]}
    address = f"{FEATURE}/examples/0/0?source="
    assert "It comes after the destination" in client.get(f"{address}{example['dest'] + 1}").text
    silent = next(at for at in range(example["dest"]) if at not in known)
    assert "too small to be kept" in client.get(f"{address}{silent}").text
    assert "shows no token at that position" in client.get(f"{address}999").text


@pytest.mark.parametrize(("place", "status"), [("examples/0/99", 404), ("examples/0/0?source=-1", 422), ("examples/a/0", 404)])
def test_an_example_that_is_not_there_gets_a_sentence(client: TestClient, place: str, status: int) -> None:
    assert client.get(f"{FEATURE}/{place}").status_code == status


def test_an_example_costs_two_queries_and_unchanged_one(client: TestClient) -> None:
    tag = client.get(f"{FEATURE}/examples/0/0").headers["etag"]
    with counted(client.app.state.db.engine) as statements:  # type: ignore[attr-defined]
        client.get(f"{FEATURE}/examples/0/0")
    assert len(statements) == 2
    assert client.get(f"{FEATURE}/examples/0/0", headers={"If-None-Match": tag}).status_code == 304


def test_related_features_are_a_block_of_their_own_and_there_when_all_is_asked_for(client: TestClient) -> None:
    address = f"{SAE}/features/5"
    part = client.get(f"{address}/related", headers=PART).text
    assert "Fires together" in part
    assert "Nearest decoders" in part
    assert part.strip() in client.get(f"{address}/related").text
    assert '<h2 id="near-title"' not in client.get(address).text
    assert [a["href"] for a in Reader(client.get(address).text).all("a") if a["href"].endswith("/related")] == [
        f"{address}/related"
    ]
    assert part.strip() in client.get(f"{address}?all=1").text


def test_the_verdict_stands_in_words_with_its_score_and_the_examples_that_show_it(client: TestClient) -> None:
    address = f"{SAE}/features/5"  # the factory makes every fifth feature one of induction
    page, shown = client.get(f"{address}.json").json(), client.get(address).text
    assert (page["family"], page["verdict"], page["family_score"]) == ("induction", "' board' is next by induction", 0.83)
    assert [found["family"] for found in page["families"]] == ["induction", "duplicate token"]
    text = Reader(shown).text
    assert "' board' is next by induction" in text
    assert "duplicate token" in text
    linked = set(re.findall(r'href="#(example-\d+-\d+)"', shown))
    assert linked == {"example-0-0", "example-0-2", "example-1-1", "example-0-1"}
    anchors = re.findall(r'id="(example-\d+-\d+)"', shown)
    assert linked <= set(anchors)
    assert len(anchors) == len(set(anchors)) == len(page["examples"])


def test_a_verdict_that_quotes_a_hostile_token_stays_text(tmp_path: Path) -> None:
    settings = put(at(tmp_path))
    database = Database(settings.url)
    with database.write() as session:
        for detail in session.scalars(sa.select(FeatureDetail)):
            detail.verdict = "'<script>\u202e\n' is next by induction"
    database.close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        for address in (FEATURE, SAE):
            shown = client.get(address).text
            assert "'<script>" not in shown
            assert "&#39;&lt;script&gt;⟨202E⟩" in shown


def test_heads_agree_as_far_as_their_shares_overlap(client: TestClient) -> None:
    page = client.get(f"{FEATURE}.json").json()
    overlap = sum(min(head["norm_share"], head["dfa_share"]) for head in page["heads"])
    assert page["agreement"] == pytest.approx(overlap, abs=1e-6)


def test_partners_are_told_with_what_they_do(client: TestClient) -> None:
    page = client.get(f"{SAE}/features/5.json").json()
    assert page["coactive_tokens"] == 65536
    assert [(p["index"], p["both"], p["correlation"]) for p in page["coactive"]] == [(8, 40, 0.61), (14, 12, 0.2)]
    other = client.get(f"{SAE}/features/8.json").json()
    assert page["coactive"][0]["family"] == other["family"]
    assert page["coactive"][0]["promoted"] == [token["text"] for token in other["promoted"][:3]]


def test_a_dead_feature_has_no_verdict_partners_or_positions(client: TestClient) -> None:
    page = client.get(f"{SAE}/features/7.json").json()
    assert page["n_fired"] == 0
    assert (page["verdict"], page["family_score"], page["agreement"]) == (None, None, None)
    assert page["families"] == page["positions"] == page["coactive"] == page["logit_counts"] == []


def test_histograms_and_positions_are_those_of_the_harvest(client: TestClient) -> None:
    page = client.get(f"{FEATURE}.json").json()
    assert len(page["logit_edges"]) == len(page["logit_counts"]) + 1 == 41
    assert page["positions"][1] == {"low": 2, "high": 3, "firings": 9, "tokens": 16384, "mean_act": 1.25}
    assert page["sample"] == SAMPLE


def test_positions_distances_partners_and_logits_are_shown_in_words_and_numbers(client: TestClient) -> None:
    text = Reader(client.get(f"{SAE}/features/5").text).text
    for said in (
        "Of 12 kept examples, a sample of the firings: 30\u202f% of |DFA| from the row's start",
        "as if from 2.5 heads and 6.1 sources alike",
        "Share of |DFA| by distance from the destination back to the source",
        "Number of tokens of the vocabulary by logit weight",
        "The two agree to",
    ):
        assert said in text, said
    assert "on 65\u202f536 sampled tokens" in Reader(client.get(f"{SAE}/features/5/related").text).text
    assert "Fires together" not in client.get(f"{SAE}/features/7/related").text, "a dead feature has none"


def test_painting_by_one_head_changes_the_bars_and_not_the_activations(client: TestClient) -> None:
    def painted(address: str, kind: str) -> list[list[str]]:
        shown = texts_of(client.get(address, headers=PART).text)
        return [[c for c in what.split() if re.fullmatch(kind + r"\d+", c)] for _, marked in shown for _, what in marked]

    # With the whole row shown, the same tokens are marked either way.
    everything, alone = f"{FEATURE}?context=full", f"{FEATURE}?context=full&head=0"
    assert painted(everything, "a") == painted(alone, "a")
    assert painted(everything, "[pn]") != painted(alone, "[pn]")


def test_a_short_context_keeps_far_sources_in_view(client: TestClient) -> None:
    example = max(client.get(f"{FEATURE}.json").json()["examples"], key=lambda e: e["act"])
    by_source: dict[int, float] = {}
    for entry in example["dfa"]:
        by_source[entry["src"]] = by_source.get(entry["src"], 0) + entry["value"]
    strongest = max(by_source, key=lambda src: by_source[src])
    assert example["dest"] - strongest > 5, "the factory's seed gives a far source here"
    page = client.get(f"{FEATURE}?context=5", headers=PART).text
    shown = next(marked for attrs, marked in texts_of(page) if attrs["data-dest"] == str(example["dest"]))
    assert str(strongest) in [at for at, _ in shown]
    assert 'class="gap"' in page
    whole = client.get(f"{FEATURE}?context=full", headers=PART).text
    assert 'class="gap"' not in whole


def test_bands_run_from_the_strongest_to_the_weakest(client: TestClient) -> None:
    text = client.get(FEATURE).text
    order = [int(band) for band in re.findall(r'id="band-(\d)"', text)]
    assert order == [0, 1, 2, 3]
    examples = client.get(f"{FEATURE}.json").json()["examples"]
    for before, after in pairwise(examples):
        assert (before["band"], before["rank"]) < (after["band"], after["rank"])


def test_it_is_one_block_for_htmx_and_whole_for_history_and_plain_get(client: TestClient) -> None:
    whole = client.get(FEATURE)
    part = client.get(FEATURE, headers=PART)
    back = client.get(FEATURE, headers={**PART, "HX-History-Restore-Request": "true"})
    full = client.get(FEATURE, headers={"HX-Request": "true", "HX-Request-Type": "full"})
    assert "<html" not in part.text
    assert part.text.strip() in whole.text
    assert whole.text == back.text == full.text
    for answer in (whole, part, back, full):
        assert answer.headers["vary"] == "HX-Request, HX-Request-Type, HX-History-Restore-Request, Accept-Encoding"


def test_the_json_is_the_same_dataclass(client: TestClient, filled: Settings) -> None:
    database = Database(filled.url)
    with database.read() as session:
        page = feature_page(session, find_sae(session, "smollm2-l17"), 3)
    database.close()
    assert client.get(f"{FEATURE}.json").content == to_json(page)


@pytest.mark.parametrize("address", [FEATURE, f"{FEATURE}.json", SAE, f"{SAE}.json"])
def test_a_page_that_the_browser_has_is_not_sent_again(client: TestClient, address: str) -> None:
    first = client.get(address)
    assert first.headers["cache-control"] == "private, no-cache"
    again = client.get(address, headers={"If-None-Match": f'"other", {first.headers["etag"]}'})
    assert again.status_code == 304
    assert again.content == b""
    assert again.headers["etag"] == first.headers["etag"]


def test_the_tag_tells_page_part_json_and_harvest_apart(client: TestClient, tmp_path: Path) -> None:
    tags = [client.get(FEATURE).headers["etag"], client.get(FEATURE, headers=PART).headers["etag"]]
    tags.append(client.get(f"{FEATURE}.json").headers["etag"])
    with TestClient(create_app(put(at(tmp_path), Shape(seed=1))), base_url="http://127.0.0.1:8000") as other:
        tags.append(other.get(FEATURE).headers["etag"])
    assert len(set(tags)) == 4


@pytest.mark.parametrize(
    "address",
    [
        SAE,
        f"{SAE}?head=2&sort=-dfa_share",
        FEATURE,
        "/",
        "/jobs",
        "/jobs/train-smollm2-l17-1",
    ],
)
def test_no_page_needs_more_than_five_queries(client: TestClient, address: str) -> None:
    client.get(address)  # the first request also checks the schema
    with counted(client.app.state.db.engine) as statements:  # type: ignore[attr-defined]
        assert client.get(address).status_code == 200
    assert 1 <= len(statements) <= 5, statements


def test_a_page_that_is_unchanged_costs_one_query(client: TestClient) -> None:
    tag = client.get(FEATURE).headers["etag"]
    with counted(client.app.state.db.engine) as statements:  # type: ignore[attr-defined]
        client.get(FEATURE, headers={"If-None-Match": tag})
    assert len(statements) == 1


def test_a_dead_feature_says_that_it_is_dead(client: TestClient) -> None:
    page = Reader(client.get(f"{SAE}/features/7").text)
    assert "it is dead" in page.text
    assert "No examples were kept" in page.text
    assert client.get(f"{SAE}/features/7.json").json()["n_fired"] == 0


def test_the_first_and_the_last_feature_have_one_neighbour_each(client: TestClient) -> None:
    first, last = client.get(f"{SAE}/features/0").text, client.get(f"{SAE}/features/59").text
    assert 'rel="prev"' not in first
    assert 'rel="next"' in first
    assert 'rel="prev"' in last
    assert 'rel="next"' not in last


def test_next_keeps_the_view(client: TestClient) -> None:
    links = Reader(client.get(f"{FEATURE}?head=4&context=full").text).all("a")
    assert next(a["href"] for a in links if a.get("rel") == "next") == f"{SAE}/features/4?context=full&head=4"


def test_random_leads_to_a_live_feature(client: TestClient) -> None:
    seen = set()
    for _ in range(30):
        answer = client.get(f"{SAE}/random")
        assert answer.status_code == 303
        seen.add(answer.headers["location"])
        assert client.get(f"{answer.headers['location']}.json").json()["n_fired"] > 0
    assert len(seen) > 5


def test_jump_leads_to_the_typed_feature(client: TestClient) -> None:
    assert client.get(f"{SAE}/jump?q=%2312").headers["location"] == f"{SAE}/features/12"
    assert client.get(f"{SAE}/jump?q=cats").status_code == 422


def answer_to(question: LiveQuestion) -> LiveAttribution:
    dfa = [[0.0, 1.0, 2.0, 0.5]] + [[0.0, -0.25, 0.0, 0.0]] * 8
    preact = sum(map(sum, dfa)) - 0.5
    return LiveAttribution(
        sae=question.sae, index=question.index, tokens=[0, 1, 2, 3], texts=["<s>", "the", " <b>cat</b>", " sat"],
        activations=[0, 0, 0, preact], preacts=[-1, -1, -1, preact], excluded=[True, False, False, False],
        dest=3, dfa=dfa, bias=-0.5, gap=0.0,
    )  # fmt: skip


def test_typed_text_is_taken_apart_by_the_engine(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[LiveQuestion] = []

    def attribute(_: Live, question: LiveQuestion) -> LiveAttribution:
        asked.append(question)
        return answer_to(question)

    monkeypatch.setattr(Live, "attribute", attribute)
    part = client.post(FEATURE, data={"text": "the cat sat"}, headers=PART)
    assert asked == [LiveQuestion(sae="smollm2-l17", index=3, text="the cat sat")]
    assert part.status_code == 200
    assert "<html" not in part.text
    assert "1.50 − 0.50 = <b>1.00</b>" in part.text
    ((attrs, _),) = texts_of(part.text)
    numbers = json.loads(attrs["data-numbers"])
    assert {e["head"]: e["value"] for e in numbers["dfa"] if e["src"] == 2} == {0: 2.0} | dict.fromkeys(range(1, 9), 0.0)
    assert numbers["acts"] == {"3": 1.0}
    assert "&lt;b&gt;cat&lt;/b&gt;" in part.text
    whole = client.post(FEATURE, data={"text": "the cat sat"})
    assert "<html" in whole.text
    assert part.text.strip() in whole.text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((0.125, -0.25, *[0.0] * 7), "The value bias gave −0.125, whatever the tokens were: head 0 +0.125, head 1 −0.250"),
        ((0.0,) * 9, "This model has no value bias: the sources are as they were."),
    ],
)
def test_the_value_bias_is_taken_out_of_the_sources_on_request(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, given: tuple[float, ...], says: str
) -> None:
    asked: list[LiveQuestion] = []

    def attribute(_: Live, question: LiveQuestion) -> LiveAttribution:
        asked.append(question)
        plain = answer_to(question)
        preacts = [*plain.preacts[:3], plain.preacts[3] + sum(given)]
        return plain.model_copy(update={"value_bias": list(given), "preacts": preacts} if question.split_bias else {})

    monkeypatch.setattr(Live, "attribute", attribute)
    box = Reader(client.get(FEATURE).text)
    (check,) = [one for one in box.all("input") if one.get("name") == "split_bias"]
    assert check["type"] == "checkbox"
    assert "checked" not in check
    part = client.post(FEATURE, data={"text": "the cat sat", "split_bias": "on"}, headers=PART).text
    assert asked[-1].split_bias
    assert says in " ".join(Reader(part).text.split())
    assert f"<b>{1 + sum(given):.2f}" in part, "with the bias' part it is the pre-activation still"
    assert [one for one in Reader(part).all("input") if one.get("name") == "split_bias" and "checked" in one] != []
    without = client.post(FEATURE, data={"text": "the cat sat"}, headers=PART).text
    assert not asked[-1].split_bias
    assert says not in " ".join(Reader(without).text.split())


def test_an_engine_that_is_away_costs_neither_page_nor_text(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> LiveAttribution:
        raise EngineAway("The engine does not answer; start `headscope engine`.")

    monkeypatch.setattr(Live, "attribute", away)
    page = client.post(FEATURE, data={"text": "my <own> words"})
    assert page.status_code == 200
    assert "The engine does not answer; start <code>headscope engine</code>." in page.text
    assert "my &lt;own&gt; words</textarea>" in page.text
    assert "Strongest" in page.text


@pytest.mark.parametrize(("form", "sentence"), [({"text": " "}, "Type some text first"), ({"text": "x" * 5000}, "at most 4000")])
def test_text_that_cannot_be_tried_gets_a_sentence(client: TestClient, form: dict[str, str], sentence: str) -> None:
    assert sentence in client.post(FEATURE, data=form, headers=PART).text


def test_a_page_begins_with_twenty_examples_of_every_band_and_shows_all_when_asked(tmp_path: Path) -> None:
    settings = put(at(tmp_path), Shape(n_features=4, n_dead=0, n_top=20, n_bands=4, per_band=3))
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        first = client.get(f"{FEATURE}.json").json()
        every = client.get(f"{FEATURE}.json?all=1").json()
        assert len(first["examples"]) == 20
        assert first["kept"] == len(every["examples"]) > 20
        assert every["kept"] is None
        assert {e["band"] for e in first["examples"]} == {e["band"] for e in every["examples"]}
        assert f"all {first['kept']} examples" in client.get(FEATURE).text
        assert client.get(f"{FEATURE}?all=1").text.count('<li class="example"') == first["kept"]


def test_a_token_that_was_looked_for_is_marked(client: TestClient) -> None:
    example = client.get(f"{FEATURE}.json").json()["examples"][0]
    token = example["texts"][example["dest"] - example["start"]]
    shown = client.get(FEATURE, params={"mark": token.strip().upper()}).text
    assert re.search(rf'<b class="[^"]*found">{re.escape(token.strip())}</b>', shown)
    assert "found" not in {c for _, marked in texts_of(client.get(FEATURE).text) for _, what in marked for c in what.split()}


def test_entries_in_columns_are_a_sequence_as_tuples_are() -> None:
    entries = (DfaEntry(5, 0, 1.5), DfaEntry(2, 3, -0.25), DfaEntry(5, 1, 0.5))
    kept = DfaColumns.of(entries)
    assert (len(kept), list(kept), kept[-1], kept[1:], kept[3:]) == (3, list(entries), entries[2], entries[1:], ())
    assert all(type(one) is DfaEntry for one in (*kept, kept[0]))
    with pytest.raises(IndexError):
        kept[3]
    assert (kept == entries, entries == kept, kept == DfaColumns.of(entries)) == (True, True, True)
    assert (kept == entries[:2], kept == list(entries), kept != entries) == (False, False, False)
    assert hash(kept) == hash(entries)
    assert repr(kept) == repr(entries)
    assert (tuple(DfaColumns.of(())), DfaColumns.of(()) == ()) == ((), True)

"""Studies as jobs: what is found is kept with the feature or the model, once; and from the command line."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_core.config import HeadsStudy, InductionStudy, IoiStudy, PrefixStudy, RegexProxy, SpecificityStudy, TokensProxy
from sae_core.corpus import Rows
from sae_core.errors import LayerOutOfRange, NotFound, UnknownCorpus, UnknownModel
from sae_core.lens import load_lens
from sae_core.saes import load_sae
from server.fields import split_texts
from server.store import registry, studies
from tests.jobs.conftest import Home, WorkerProcess, make_home, tiny_config, wait_for
from tests.jobs.test_worker import log_of, working
from tests.processes import Said
from tests.test_cli import environment, headscope, refused

__all__ = ["environment", "headscope"]  # fixtures

QUICK = tiny_config(harvests=())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_text: Path) -> Iterator[Home]:
    """A home with an SAE called x."""
    made = make_home(tmp_path_factory.mktemp("study"), tiny_folder, tiny_text)
    job_id = made.jobs.enqueue_train(QUICK, name="x")
    with working(made):
        assert made.wait(job_id) == "done", made.error(job_id)
    yield made
    made.jobs.close()
    made.db.close()


def specificity(**changed: object) -> SpecificityStudy:
    fields: dict[str, object] = {
        "sae": "x", "feature": 5, "corpus": "words", "rows": QUICK.rows, "proxies": (TokensProxy(texts=("cat",)),),
        "tokens_swept": 4096,
    }  # fmt: skip
    return SpecificityStudy.model_validate(fields | changed)


def induction(**changed: object) -> InductionStudy:
    fields: dict[str, object] = {
        "model": "tiny", "layers": (1, 3), "samples": 2, "prefixes": 3, "length": 32, "corpus": "words", "rows": QUICK.rows,
        "text_rows": 16,
    }  # fmt: skip
    return InductionStudy.model_validate(fields | changed)


def of_job(home: Home, job_id: str) -> studies.StudyRecord:
    with home.db.read() as session:
        made = studies.of_job(session, job_id)
        assert made is not None
        return studies.study(session, made)


def test_a_specificity_study_is_kept_with_its_feature(trained: Home) -> None:
    cfg = specificity()
    job_id = trained.jobs.enqueue_study(cfg)
    assert job_id == trained.jobs.enqueue_study(cfg) == f"study-x-5-{cfg.hash()}", "asked twice, it runs once"
    with working(trained):
        assert trained.wait(job_id) == "done", trained.error(job_id)
    record = of_job(trained, job_id)
    assert (record.kind, record.sae, record.feature, record.model) == ("specificity", "x", 5, "tiny")
    assert record.title == "Feature 5 of x against: the token is 'cat'"
    assert SpecificityStudy.model_validate(record.config) == cfg
    with trained.db.read() as session:
        sae = registry.sae(session, "x")
        lines = studies.studies(session, sae.name, 5)
        assert studies.studies(session, sae.name, 6) == ()
    assert [line.id for line in lines] == [record.id]
    assert lines[0].summary == record.result["summary"]
    assert any(
        line.startswith("See it at http://127.0.0.1:") and f"/studies/{record.id}." in line for line in log_of(trained, job_id)
    )

    # The same by another way: the whole dictionary on the rows that are on disk.
    lens = load_lens(registry_source(trained), name="tiny", cache=trained.settings.cache)
    weights = load_sae(trained.settings.data / sae.folder)
    rows = Rows.open(next((trained.settings.data / "rows").glob("*/rows.json")).parent)
    tokens = torch.from_numpy(rows.train[:128].astype("int64"))
    z = lens.read_z(tokens, [1])[1]
    starts = tokens == rows.row_start
    fires = (weights.encode(z)[..., 5] > 0) & ~weights.excluded(z, starts)
    cat = torch.tensor([[text == "cat" for text in lens.token_texts(row)] for row in tokens.tolist()])
    assert record.result["both"] == int((fires & cat).sum())
    assert record.result["feature_alone"] == int((fires & ~cat).sum())


def registry_source(home: Home) -> Any:
    with home.db.read() as session:
        return registry.model(session, "tiny").source


def test_an_induction_study_is_made_in_steps_and_kept_with_its_model(trained: Home) -> None:
    job_id = trained.jobs.enqueue_study(induction())
    with working(trained):
        assert trained.wait(job_id) == "done", trained.error(job_id)
    record = of_job(trained, job_id)
    assert (record.kind, record.sae, record.feature, record.model) == ("induction", None, None, "tiny")
    assert record.title == "Induction heads of tiny, layers 1, 3"
    assert {(head["layer"], head["head"]) for head in record.result["heads"]} == {(la, h) for la in (1, 3) for h in range(4)}
    assert (record.result["text_rows"], record.result["corpus"]) == (16, "words")
    steps = [step["function_name"] for step in trained.jobs.client.list_workflow_steps(job_id)]
    assert steps == ["synthetic", "text", "sum up", "store"]
    assert {"Reading random tokens with a prefix copied.", "Looking for induction in real text."} <= set(log_of(trained, job_id))
    with trained.db.read() as session:
        newest = studies.studies(session)[0]
    assert (newest.id, newest.kind) == (record.id, "induction")


def test_a_study_of_prefixes_is_kept_with_its_sae(trained: Home) -> None:
    cfg = PrefixStudy(sae="x", samples=8, prefixes=2, length=24, random=1)
    job_id = trained.jobs.enqueue_study(cfg)
    assert job_id == f"study-x-{cfg.hash()}"
    with working(trained):
        assert trained.wait(job_id) == "done", trained.error(job_id)
    record = of_job(trained, job_id)
    assert (record.kind, record.sae, record.feature, record.model) == ("prefix", "x", None, "tiny")
    assert record.title == "Induction features and their prefixes: x"
    assert len(record.result["losses"][0]["values"]) == 2
    # The tiny tokenizer has no names, which is a sentence, not a fault.
    failed = trained.jobs.enqueue_study(IoiStudy(sae="x", samples=8))
    with working(trained):
        assert trained.wait(failed) == "failed"
    assert "names only 0 are single tokens of tiny" in str(trained.error(failed))


def test_a_study_of_every_head_is_made_in_steps_and_kept_with_its_model(trained: Home) -> None:
    cfg = HeadsStudy(model="tiny", layers=(1, 3), samples=2, length=32, corpus="words", rows=QUICK.rows, text_rows=16)
    job_id = trained.jobs.enqueue_study(cfg)
    with working(trained):
        assert trained.wait(job_id) == "done", trained.error(job_id)
    record = of_job(trained, job_id)
    assert (record.kind, record.sae, record.model) == ("heads", None, "tiny")
    assert record.title == "What heads do: those of tiny, layers 1, 3"
    assert [(head["layer"], head["head"]) for head in record.result["heads"]] == [(la, h) for la in (1, 3) for h in range(4)]
    assert (record.result["text_rows"], record.result["corpus"]) == (16, "words")
    steps = [step["function_name"] for step in trained.jobs.client.list_workflow_steps(job_id)]
    assert steps == ["random", "text", "weights", "sum up", "store"]
    assert all(-1 <= head["copying"] <= 1 for head in record.result["heads"])


def test_a_study_without_text_says_so(trained: Home) -> None:
    job_id = trained.jobs.enqueue_study(induction(corpus=None, layers=(0,)))
    with working(trained):
        assert trained.wait(job_id) == "done", trained.error(job_id)
    assert "No text was given" in of_job(trained, job_id).result["notes"][0]


def test_what_cannot_be_studied_is_refused_in_words(trained: Home) -> None:
    enqueue = trained.jobs.enqueue_study
    with pytest.raises(NotFound, match="x has 128 features, counted from 0, so there is no feature 128"):
        enqueue(specificity(feature=128))
    with pytest.raises(NotFound, match="There is no SAE nobody"):
        enqueue(specificity(sae="nobody"))
    with pytest.raises(UnknownCorpus):
        enqueue(specificity(corpus="none"))
    with pytest.raises(UnknownModel):
        enqueue(induction(model="nobody"))
    with pytest.raises(LayerOutOfRange, match="tiny has layers 0 to 3; there is no layer 7"):
        enqueue(induction(layers=(1, 7)))
    split = enqueue(specificity(proxies=(TokensProxy(texts=("mats",)),)))
    long = enqueue(induction(length=200, layers=(2,)))
    with working(trained):
        assert [trained.wait(split), trained.wait(long)] == ["failed", "failed"]
    assert re.search(
        r"'mats' is no single token of tiny: it is split into '.*', '.*'; name single tokens", trained.error(split) or ""
    )
    assert "tiny takes at most 64 tokens at once, not 200" in (trained.error(long) or "")
    with trained.db.read() as session:
        assert studies.of_job(session, split) is None


def test_a_study_is_cancelled_between_two_batches(trained: Home) -> None:
    job_id = trained.jobs.enqueue_study(specificity(tokens_swept=16_384, batch_rows=1, proxies=(RegexProxy(pattern="t.*c"),)))
    with working(trained):
        wait_for(lambda: trained.jobs.get(job_id).phase == "scan")
        trained.jobs.cancel(job_id)
        assert trained.wait(job_id) == "cancelled"
    with trained.db.read() as session:
        assert studies.of_job(session, job_id) is None


def test_a_study_whose_worker_is_killed_is_gone_on_with_and_kept_once(
    trained: Home, worker_process: Callable[..., WorkerProcess]
) -> None:
    cfg = induction(samples=40, layers="all", text_rows=128, pass_tokens=64, seed=3)
    job_id = trained.jobs.enqueue_study(cfg)
    first = worker_process(trained.settings)
    wait_for(lambda: trained.jobs.get(job_id).phase == "text")
    first.kill()
    again = worker_process(trained.settings)
    assert trained.wait(job_id) == "done", trained.error(job_id)
    again.stop()
    assert log_of(trained, job_id).count("Reading random tokens with a prefix copied.") == 1, "that step was done"
    killed = of_job(trained, job_id)
    with trained.db.read() as session:
        assert [line.title for line in studies.studies(session)].count(killed.title) == 1
    other = trained.jobs.enqueue_study(cfg.model_copy(update={"pass_tokens": 65}))
    with working(trained):
        assert trained.wait(other) == "done", trained.error(other)
    assert of_job(trained, other).result == killed.result


# ---- the command line ----


def test_texts_are_parted_at_commas_with_their_spaces() -> None:
    assert split_texts(" board, Board") == (" board", " Board")
    assert split_texts(r"a\,b,\n,\\") == ("a,b", "\n", "\\")
    assert split_texts("a,") == ("a", "")


@pytest.fixture
def at_home(trained: Home, headscope: Callable[..., Said], environment: dict[str, str]) -> Callable[..., Said]:
    """`headscope` on the module's home."""
    environment.update(HEADSCOPE_DATA=str(trained.settings.data), HEADSCOPE_CACHE=str(trained.settings.cache))
    return headscope


def test_the_command_line_studies_a_feature_here_and_prints_json(at_home: Callable[..., Said]) -> None:
    asked = (
        "study",
        "specificity",
        "--sae",
        "x",
        "--feature",
        "3",
        "--token-regex",
        "^ ?t",
        "--not-tokens",
        "t",
        "--tokens-swept",
        2048,
    )
    said = at_home(*asked, "--json")
    assert said.returncode == 0, said
    found = json.loads(said.stdout)
    assert found["proxy"] == "the token matches /^ ?t/ and not (the token is 't')"
    assert found["tokens"] + found["excluded"] == 2048
    again = at_home(*asked)
    assert "is done already: the same question would get the same answer" in again.stdout
    assert re.search(r"precision: proxy holds where it fires +\d", again.stdout)
    assert re.search(r"Its plots are at /studies/\d+\.", again.stdout)


def test_the_command_line_studies_heads_on_the_text_of_the_newest_sae(at_home: Callable[..., Said]) -> None:
    said = at_home("study", "induction", "--model", "tiny", "--layers", "2", "--samples", 2, "--length", 32, "--text-rows", 8)
    assert said.returncode == 0, said
    assert re.search(r"heads +\d+ short-prefix heads?", said.stdout)
    said = at_home(
        "study", "induction", "--model", "tiny", "--layers", "2", "--samples", 2, "--length", 32, "--corpus", "none", "--json"
    )
    assert json.loads(said.stdout)["corpus"] is None


def test_the_command_line_scores_every_head(at_home: Callable[..., Said]) -> None:
    asked = ("study", "heads", "--model", "tiny", "--layers", "2", "--samples", 2, "--length", 32, "--text-rows", 8)
    said = at_home(*asked)
    assert said.returncode == 0, said
    assert re.search(r"previous token: previous +2\.\d \d\.\d\d, 2\.\d", said.stdout)
    found = json.loads(at_home(*asked, "--json").stdout)
    least = min(found["heads"], key=lambda head: head["copying"])
    first = re.search(r"copy suppression: copying +(2\.\d) (-?\d\.\d\d)", said.stdout)
    assert first is not None
    assert first.groups() == (f"2.{least['head']}", f"{least['copying']:.2f}"), "the one that copies least"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--feature", 3), "Say what the feature is held against: --tokens, --regex, --token-regex or --induction."),
        (("--feature", 3, "--tokens", ""), "--tokens is empty; name one token or more"),
        (("--feature", 3, "--regex", "a(b"), "'a(b' is no regular expression at character 2: missing )"),
        (("--feature", 999, "--tokens", "cat"), "x has 128 features, counted from 0, so there is no feature 999."),
        (("--feature", -1, "--tokens", "cat"), "--feature -1: "),
        (("--feature", 3, "--tokens", "cat", "--bins", 2), "--bins 2: "),
        (("--feature", 3, "--tokens", "cat", "--corpus", "nowhere.txt"), "No corpus is registered as nowhere.txt"),
    ],
)
def test_a_wrong_question_is_refused_in_a_sentence(at_home: Callable[..., Said], arguments: tuple[Any, ...], words: str) -> None:
    assert words in refused(at_home("study", "specificity", "--sae", "x", *arguments))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--layers", "1,9"), "tiny has layers 0 to 3; there is no layer 9."),
        (("--layers", "1,1"), "layers must name one layer or more, and none twice (--layers)."),
        (("--length", 16, "--prefixes", 9), "has no room for a prefix of 9 tokens twice"),
    ],
)
def test_a_wrong_question_to_heads_is_too(at_home: Callable[..., Said], arguments: tuple[Any, ...], words: str) -> None:
    assert words in refused(at_home("study", "induction", "--model", "tiny", *arguments))


@pytest.mark.parametrize(
    ("kind", "wrong", "words"),
    [
        ("ioi", ("--features", 0), "--features 0: "),
        ("prefix", ("--prefixes", 1), "--prefixes 1: "),
        ("ioi", (), "There is no SAE nobody"),
        ("prefix", (), "There is no SAE nobody"),
    ],
)
def test_a_wrong_question_to_an_sae_is_too(at_home: Callable[..., Said], kind: str, wrong: tuple[Any, ...], words: str) -> None:
    assert words in refused(at_home("study", kind, "--sae", "nobody", *wrong))


def test_a_text_that_is_no_token_fails_with_how_it_splits(at_home: Callable[..., Said]) -> None:
    said = at_home("study", "specificity", "--sae", "x", "--feature", "3", "--induction", "mats", "--tokens-swept", 1024)
    assert said.returncode == 2
    assert "'mats' is no single token of tiny: it is split into " in said.stderr

"""What people write, on SQLite and on PostgreSQL alike: the same calls, the same answers."""

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from sae_core.errors import Outdated
from server.db import Database
from server.settings import Settings
from server.store import labels, lists, manage, ratings, search
from server.store.features import FeatureQuery, feature_table
from server.store.saes import find_sae
from server.tables import SAE
from tests.web.factory import fill

NAME = "smollm2-l17"


@pytest.fixture(params=["sqlite", "postgresql"])
def db(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Database]:
    db = Database(settings.url if request.param == "sqlite" else request.getfixturevalue("postgres"))
    fill(db)
    yield db
    db.close()


def test_everything_is_written_found_and_deleted(db: Database, settings: Settings) -> None:
    with db.write() as session:
        door = find_sae(session, NAME)
        first = labels.add_label(session, door.id, 3, "Dates", "Maren")
        labels.add_label(session, door.id, 3, "made", "x", method="explain")
        labels.change_label(session, door.id, 3, first, "Years % of_all", "Ola")
        with pytest.raises(Outdated):
            labels.withdraw_label(session, door.id, 3, first, "Maren")
        labels.add_note(session, door.id, 3, "two\nlines", "Maren")
        for _ in range(2):
            labels.star(session, door.id, 3, "Maren", True)
        list_id = lists.create(session, "L", "", "Maren")
        for index in (3, 8, 9):
            lists.add(session, list_id, door.id, index, "", "Maren")
        last = lists.list_page(session, list_id).entries[-1]
        lists.move(session, list_id, last.id, "up")
        review = ratings.create(session, door, 4, 1, "Maren")
        for who in ("Maren", "Ola", "Ines"):
            for index in ratings.order_for(session, review, who):
                ratings.rate(session, review, index, who, "yes" if index % 2 else "no", "", "")
    with db.read() as session:
        door = find_sae(session, NAME)
        assert door.revision == 7
        found = labels.feature_labels(session, door.sae, door.id, 3)
        assert [one.text for one in found.labels] == ["Years % of_all", "made"]
        assert [(one.text, one.ended) for one in found.history] == [("Dates", "superseded")]
        assert (found.stars, found.notes[0].text) == (("Maren",), "two\nlines")
        for asked, n in (({"labelled": True}, 1), ({"labelled": False}, 59), ({"label": "years %"}, 1), ({"label": "ofxall"}, 0)):
            assert feature_table(session, door, FeatureQuery.model_validate(asked)).n_matching == n
        assert feature_table(session, door, FeatureQuery(labelled=True)).rows[0].label == "Years % of_all"
        assert [line.text for line in labels.labels_page(session, labels.LabelQuery(q="YEARS")).lines] == ["Years % of_all"]
        assert [line.text for line in labels.labels_page(session, labels.LabelQuery(starred=True)).lines] == ["Years % of_all"]
        assert [(one.idx, one.text) for one in labels.labels_containing(session, door.id, "OF_all", None, 9)] == [
            (3, "Years % of_all")
        ]
        assert labels.labels_containing(session, door.id, "years", first, 9) == []
        assert [hit.label for hit in search.search(session, door, "years", "label").hits] == ["Years % of_all"]
        assert [line.index for line in search.search_all(session, "years\0").labels] == [3]
        page = lists.list_page(session, list_id)
        assert [(one.index, one.label, len(one.card.examples) if one.card else 0) for one in page.entries] == [
            (3, "Years % of_all", 3), (9, None, 3), (8, None, 3),
        ]  # fmt: skip
        result = ratings.review_page(session, door, review)
        assert result.agreement is not None
        assert result.agreement.equal.hits == 4
    with db.write() as session:
        manage.describe(session, find_sae(session, NAME), "renamed", "text")
    with db.read() as session:
        door = find_sae(session, "renamed")
        assert manage.manage_page(session, door).belongings == manage.Belongings(3, 1, 1, 3, 1, 0)
    manage.delete_sae(db, door, settings.data)
    with db.read() as session:
        assert session.scalars(sa.select(SAE.id)).all() == []

"""Writes a harvest into a database at a set rate, as a worker does, until it is ended: `python -m bench._writing URL SAE RATE`.

The rows are those of the SAE's published harvest, written anew through the store's own functions, chunk by chunk in transactions
of the size that workers make. It prints how many examples a second it wrote, once a second.
"""

import sys
import time

import sqlalchemy as sa

from server.db import Database
from server.store.harvests import EXAMPLE, EXAMPLES_AT_ONCE, RUNNING, insert_examples
from server.tables import SAE, Context, Example, Feature, Harvest


def write(url: str, name: str, rate: int) -> None:
    """Copy the SAE's harvest again and again, `rate` examples a second."""
    db = Database(sa.make_url(url))
    with db.read() as session:
        sae = session.scalars(sa.select(SAE).where(SAE.name == name)).one()
        columns = [Example.__table__.c[column] for column in EXAMPLE]
        of = Feature.harvest_id == sae.harvest_id
        examples = session.execute(sa.select(*columns).join(Feature, Feature.id == Example.feature_id).where(of)).all()
        features = session.scalars(sa.select(Feature).where(of)).all()
        contexts = {one.id: one for one in session.scalars(sa.select(Context).where(Context.harvest_id == sae.harvest_id))}
        told = session.get_one(Harvest, sae.harvest_id)
    begun, written = time.monotonic(), 0
    while True:
        with db.write() as session:
            made = Harvest(
                sae_id=sae.id, corpus_id=told.corpus_id, job_id=f"bench-{time.time_ns()}", config=told.config, status=RUNNING,
                n_tokens=told.n_tokens, n_rows=told.n_rows, n_live=told.n_live, context=told.context,
            )  # fmt: skip
            session.add(made)
            session.flush()
            kept = [column.key for column in Feature.__table__.c if column.key not in ("id", "harvest_id")]
            rows = [{"harvest_id": made.id, **{name: getattr(one, name) for name in kept}} for one in features]
            new = session.execute(sa.insert(Feature).returning(Feature.id, Feature.idx), rows).all()
        by_idx = {idx: id for id, idx in new}
        feature_of = {one.id: by_idx[one.idx] for one in features}
        for low in range(0, len(examples), EXAMPLES_AT_ONCE):
            chunk = examples[low : low + EXAMPLES_AT_ONCE]
            with db.write() as session:
                visited = sorted({row.context_id for row in chunk})
                texts = [{"harvest_id": made.id, "row": low * 1000 + n, **_text(contexts[at])} for n, at in enumerate(visited)]
                ids = session.scalars(sa.insert(Context).returning(Context.id, sort_by_parameter_order=True), texts).all()
                context_of = dict(zip(visited, ids, strict=True))
                insert_examples(session, ((feature_of[row[0]], context_of[row[1]], *row[2:]) for row in chunk))
            written += len(chunk)
            print(round(written / (time.monotonic() - begun)), flush=True)
            time.sleep(max(0.0, begun + written / rate - time.monotonic()))


def _text(context: Context) -> dict[str, object]:
    return {"tokens": context.tokens, "texts": context.texts}


if __name__ == "__main__":
    write(sys.argv[1], sys.argv[2], int(sys.argv[3]))

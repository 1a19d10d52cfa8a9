"""`/api/feature/...`, `/api/activation/...`, `/api/list/...`: addresses and shapes of Neuronpedia, for scripts written for it.

`docs/neuronpedia.md` says what is there and what differs. The shapes are another project's, so they are not in our OpenAPI
description; `server/api` has our own under `/api/v1`.
"""

from fastapi import APIRouter

from server.api.neuronpedia.collections import router as lists_and_bookmarks
from server.api.neuronpedia.explanations import router as labels
from server.api.neuronpedia.features import router as stored
from server.api.neuronpedia.live import router as asked

router = APIRouter(prefix="/api")
for part in (stored, asked, labels, lists_and_bookmarks):
    router.include_router(part)

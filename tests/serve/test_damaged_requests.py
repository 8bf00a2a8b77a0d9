"""Damaged requests get an answer, or an error as OpenAI writes it."""

from __future__ import annotations

import random
from itertools import islice

from tests.damage import SEED, variants_or
from tests.damage.ending import outcome
from tests.damage.readers import check
from tests.damage.record import recorded
from tests.damage.requests import judged, variants
from tests.serve.conftest import Here

VARIANTS = variants_or(60)


def test_damaged_requests(here: Here) -> None:
    def asked(path: str, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        answer = here.client.post(path, content=body, headers=headers)
        return judged(answer.status_code, answer.text)

    told = {
        name: recorded(name, lambda path=path, body=body: outcome(lambda: asked(path, body)))  # type: ignore[misc]
        for name, path, body in islice(variants(random.Random(SEED)), VARIANTS)
    }
    check(told, {"done", "refused"})
    assert here.client.get("/health").status_code == 200

"""The explorer: what its page holds is the chapter's, and reviews are data, not markup."""

import json
import re

import torch

from experiments import explorer

REVIEWS = [
    {"number": n, "label": "positive", "text": text, "finished": 0.9, "early": 0.5}
    for n, text in enumerate(["<script>alert(1)</script>", "</script> & so on", "A film."])
]


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_a_page_keeps_the_scores_and_escapes_what_strangers_wrote():
    scores = torch.tensor([[1.23456, -2.0, 0.0], [10.0, 1e6, -1e-3]])
    page = explorer.page({"influence": scores}, REVIEWS, REVIEWS[:2])
    assert data_of(page)["scores"] == {"influence": [[1.235, -2.0, 0.0], [10.0, 1e6, -0.001]]}
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert" not in page


def test_the_committed_page_is_the_one_of_this_code_and_small():
    page = explorer.PAGE.read_text(encoding="utf-8")
    assert (explorer.PAGE.parent.parent / "experiments" / "explorer.js").read_text().strip() in page
    assert len(page.encode()) < 500_000
    data = data_of(page)
    assert [len(data[side]) for side in ("training", "test")] == [explorer.NUM_TRAIN, explorer.NUM_TEST]
    for scores in data["scores"].values():
        assert torch.tensor(scores).shape == (explorer.NUM_TEST, explorer.NUM_TRAIN)

"""`python -m experiments.ask_page`: what the page `notebooks/ask.md` asks, `docs/_static/ask-data.js`.

A thousand training reviews and some questions as an index keeps them, 1,020 numbers of a byte and a scale
each, ordered so that the first of them are the smaller index. Asked is the tail of the bank `main`, at 20 %
of its training, about the answer of the one that is trained. With every question go the first ten training
reviews by its exact influences. A few minutes on one thread.
"""

import json
from base64 import b64encode
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor

from experiments.bank_making import EXPERIMENTS, queries, retraining
from experiments.index import SHARE
from experiments.sketches import sorted_entries
from support.ekfac import EkfacInfluence
from support.ekfac.index import EkfacIndex, in_bytes
from support.imdb import ImdbDataset
from support.model import LABELS, load_tokenizer
from support.retraining import batches, read_for_the_tail

DATA = Path(__file__).parents[1] / "docs" / "_static" / "ask-data.js"
NUMBERS, TEST_REVIEWS, FIRST, LONGEST = 1020, 32, 10, 300
SENTENCES = (
    "I loved every minute of it.",
    "A film that is neither good nor bad.",
    "The acting is wonderful, but the story is a mess.",
    "Not as bad as everybody says.",
    "I fell asleep after half an hour.",
    "The special effects are great and nothing else is.",
    "My children laughed from beginning to end.",
    "I want my money back.",
)


def shortened(text: str) -> str:
    """The beginning of a review, to a whole word."""
    text = " ".join(text.replace("<br />", " ").split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rsplit(' ', 1)[0]} …"


def kept(sketches: Tensor) -> dict[str, str]:
    """As JavaScript reads them: bytes, and the scales as float32."""
    numbers, scales = in_bytes(sketches)
    return {
        "numbers": b64encode(numbers.numpy().tobytes()).decode(),
        "scales": b64encode(scales.numpy().tobytes()).decode(),
    }


def first_ten(scores: Tensor) -> list[int]:
    """The training reviews whose influence is largest, for or against."""
    return scores.abs().topk(FIRST).indices.tolist()


def data() -> dict:
    """All that the page knows."""
    run, asked = retraining(EXPERIMENTS["main"]), queries(EXPERIMENTS["main"])
    own = Dataset.from_dict({"text": list(SENTENCES), "label": [0] * len(SENTENCES)})
    sentences = read_for_the_tail(ImdbDataset(own, load_tokenizer()))
    vectors = torch.cat([sentences.vectors, asked.vectors[:TEST_REVIEWS]])
    texts = [*sentences.texts, *asked.texts[:TEST_REVIEWS]]
    early, trained = run.path(torch.arange(len(run.reviews)), seed=0, shares=[SHARE, 1.0])
    with torch.no_grad():
        said = trained.part(vectors).softmax(dim=1).max(dim=1)
    train = batches(run.reviews)
    engine = EkfacInfluence(early.model()).fit(train)
    index = EkfacIndex(engine, NUMBERS)
    order, _ = sorted_entries(index)
    question = [(vectors, said.indices)]
    exact, relative = (engine.score(question, train, normalisation=one) for one in ("plain", "relative"))
    labels = [None] * len(sentences) + [LABELS[label] for label in asked.labels[:TEST_REVIEWS].tolist()]
    questions = [
        {
            "text": shortened(text),
            "label": label,
            "answer": LABELS[answer],
            "probability": round(probability, 3),
            "plain": first_ten(plain),
            "relative": first_ten(divided),
        }
        for text, label, answer, probability, plain, divided in zip(
            texts, labels, said.indices.tolist(), said.values.tolist(), exact, relative, strict=True
        )
    ]
    return {
        "width": NUMBERS,
        "questions": questions,
        "asked": kept(index.sketched(question)[:, order]),
        "reviews": [
            {"text": shortened(text), "label": LABELS[label]}
            for text, label in zip(run.reviews.texts, run.reviews.labels.tolist(), strict=True)
        ],
        "training": kept(index.sketched(train)[:, order]),
    }


if __name__ == "__main__":
    DATA.write_text(f"const ASK = {json.dumps(data(), ensure_ascii=False, separators=(',', ':'))};\n")
    print(f"{DATA.name}: {DATA.stat().st_size:,} bytes")

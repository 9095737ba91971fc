"""`python -m experiments.explorer`: the page on which readers explore influences, `notebooks/explorer.html`.

Twenty test reviews and a hundred training reviews of chapter 04, every pair by influence, by relative
influence, and by the influence of the customary setting. The page needs nothing else and fetches nothing: it
forbids itself whatever is not its own, and reviews, data from strangers, are escaped.
"""

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader
from torch import Tensor

from support import EkfacInfluence, ImdbDataset
from support.cache import fit_or_load
from support.chapters.story import Story, begin, early_engine
from support.model import LABELS, ModelLogitsWrapper, class_probabilities
from support.text import paragraphs

PAGE = Path(__file__).parents[1] / "notebooks" / "explorer.html"
NUM_TRAIN, NUM_TEST = 100, 20
DIGITS = 4
"""Of a score, as it is kept."""


def scores_of(story: Story) -> dict[str, Tensor]:
    """Every kind of score the page offers, (test, train)."""
    loaders = story.test_loader, story.train_loader
    early = early_engine(story)
    customary = EkfacInfluence(story.model, hessian_regularization=1e-5, progress=True)
    customary = fit_or_load(customary, story.train_loader)
    return {
        "influence": early.score(*loaders),
        "relative influence": early.score(*loaders, normalisation="relative"),
        "influence as is the custom": customary.score(*loaders),
    }


def described(reviews: ImdbDataset, models: Mapping[str, ModelLogitsWrapper]) -> list[dict]:
    """Label and text of each review, and how likely each of the models finds its label."""
    sure = {name: class_probabilities(model, reviews) for name, model in models.items()}
    return [
        {
            "number": number,
            "label": LABELS[int(label)],
            "text": "\n\n".join(paragraphs(text)),
            **{name: round(found[number, int(label)].item(), 3) for name, found in sure.items()},
        }
        for number, (label, text) in enumerate(zip(reviews.labels, reviews.texts, strict=True))
    ]


def page(scores: Mapping[str, Tensor], train: list[dict], test: list[dict]) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    script, *_ = environment.loader.get_source(environment, "explorer.js")
    kept = {
        name: [[float(f"{score:.{DIGITS}g}") for score in row] for row in found.tolist()]
        for name, found in scores.items()
    }
    about = {
        side: [{name: value for name, value in review.items() if name != "text"} for review in reviews]
        for side, reviews in {"training": train, "test": test}.items()
    }
    return environment.get_template("explorer.html.jinja").render(
        data={"scores": kept} | about,
        sides={"test": test, "training": train},
        script=script,
        own=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def main() -> None:
    torch.manual_seed(0)
    story = begin("packaged", 0, NUM_TRAIN, NUM_TEST)
    models = {"finished": story.model, "early": story.early_model}
    sides = [described(reviews, models) for reviews in (story.train, story.test)]
    PAGE.write_text(page(scores_of(story), *sides), encoding="utf-8")
    print(f"{PAGE}: {PAGE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

"""What `benchmarks.language` times: a model that writes, reviews and queries, and each engine's jobs on them.

SmolLM2-135M-Instruct with the feed-forward layers of its last blocks tracked, in float32; reviews cut at
`TOKENS`, queries of a prompt with its completion. Damping is absolute. Ours and Kronfluence draw the same
labels for the Fisher; Bergson draws its own, and is asked about whole texts, prompt and completion, for it
puts prompts into the chat template.
"""

import json
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from support.ekfac import EkfacInfluence, NextToken
from support.ekfac.draws import drawn
from support.imdb import load_imdb
from support.language import (
    FEED_FORWARD,
    Batch,
    encoded,
    inputs_and_labels,
    load_language_model,
    loader,
    padded,
)
from support.model import require_gradients_only

TOKENS, BATCH_SIZE, RANK, DAMPING = 128, 8, 32, 0.1
BUDGET = 4e9
"""Bytes, for our curvature and what a fit keeps beside it."""

QUERIES = [
    ("Review: The movie was", " a complete waste of time."),
    ("Review: The movie was", " a wonderful surprise."),
    ("Question: What did you think of the acting? Answer:", " The acting was wooden and the plot was thin."),
    ("My favourite scene is", " the one where the two brothers meet again after the war."),
    ("Question: Was the ending any good? Answer:", " No, it came out of nowhere."),
    ("The director", " has made one of the best thrillers of the decade."),
    ("Review: I laughed", " once, and that was at the credits."),
    ("Review: As a fan of the book", ", I was disappointed by what they left out."),
    ("Question: Who should see it? Answer:", " Anyone who grew up with these cartoons."),
    ("The music", " fits every scene and stays with you for days."),
]
BARE, FIT, LOW, WHOLE = "bare pass", "fit", f"score, rank {RANK}", "score"

Jobs = dict[str, Callable[[], Tensor | None]]


class Work:
    """The model with the layers of its last blocks tracked, training reviews and queries. `whole` asks about
    every token of a query, not of its completion alone."""

    def __init__(self, reviews: int, blocks: int, whole: bool = False):
        self.model, self.tokenizer = load_language_model()
        last = self.model.config.num_hidden_layers
        names = require_gradients_only(self.model, FEED_FORWARD)
        kept = {f".{number}." for number in range(last - blocks, last)}
        for name in names:
            if not any(part in name for part in kept):
                self.model.get_submodule(name).requires_grad_(False)
        self.tracked = [name for name in names if any(part in name for part in kept)]
        texts = load_imdb()["train"].shuffle(seed=0)["text"][:reviews]
        self.train = [encoded(self.tokenizer, text, max_tokens=TOKENS) for text in texts]
        asked = [("".join(query),) for query in QUERIES] if whole else QUERIES
        self.queries = [encoded(self.tokenizer, *query) for query in asked]

    def bare_pass(self) -> None:
        """Forward, and back to the first tracked layer, with no gradient of a weight."""
        tracked = [part for part in self.model.parameters() if part.requires_grad]
        first = self.model.get_submodule(self.tracked[0])
        begin = first.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach().requires_grad_(),))
        for part in tracked:
            part.requires_grad_(False)
        for batch in loader(self.train, BATCH_SIZE):
            inputs, labels = inputs_and_labels(batch)
            NextToken().loss(self.model(**inputs).logits, labels).sum().backward()
        for part in tracked:
            part.requires_grad_(True)
        begin.remove()

    def engine(self, samples: int = 1, seed: int = 0) -> EkfacInfluence:
        # The peers' positions, so that all do the same work.
        settings = {"hessian_regularization": DAMPING, "seed": seed, "covariance_positions": "all"}
        settings |= {"memory_budget": BUDGET}
        return EkfacInfluence(self.model, likelihood=NextToken(samples), **settings)

    def fit(self, engine: EkfacInfluence) -> None:
        engine.fit(loader(self.train, BATCH_SIZE))

    def scores(self, engine: EkfacInfluence, rank: int | None = None) -> Tensor:
        engine.query_rank = rank
        return engine.score(loader(self.queries, BATCH_SIZE), loader(self.train, BATCH_SIZE))


def ours(work: Work) -> Jobs:
    engine = work.engine()
    return {
        BARE: work.bare_pass,
        FIT: lambda: work.fit(engine),
        LOW: lambda: work.scores(engine, RANK),
        WHOLE: lambda: work.scores(engine),
    }


class Sequences(Dataset):
    """As Kronfluence takes them."""

    def __init__(self, sequences: list[Batch]):
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, row: int) -> Batch:
        return self.sequences[row]


def kronfluence(work: Work) -> Jobs:
    fit, score = kronfluence_parts(work)
    return {FIT: fit, LOW: partial(score, RANK), WHOLE: partial(score, None)}


def kronfluence_parts(work: Work) -> tuple[Callable[[], None], Callable[..., Tensor]]:
    """Its fit, and its scores at a rank and a damping, None for its heuristic."""
    from kronfluence import Analyzer, Task, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.utils.dataset import DataLoaderKwargs

    class Writing(Task):
        draws = ""

        def get_influence_tracked_modules(self) -> list[str]:
            return work.tracked

        def get_attention_mask(self, batch: Batch) -> Tensor:
            return batch["attention_mask"]

        def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
            if not sample:
                return self.compute_measurement(batch, model)
            inputs = {name: part for name, part in batch.items() if name != "labels"}
            logits = model(**inputs).logits

            draws = partial(drawn, f"0 {self.draws}", inputs, inputs["attention_mask"].bool())
            directions = NextToken().fisher_directions(logits.detach(), draws, batch["labels"])
            return sum((logits * direction).sum() for direction in directions)

        def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            return nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
            )

    task, folder = Writing(), tempfile.mkdtemp()
    analyzer = Analyzer(
        analysis_name="kronfluence",
        model=prepare_model(work.model, task),
        task=task,
        cpu=True,
        log_level=logging.ERROR,
        disable_tqdm=True,
        output_dir=folder,
    )
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=padded))
    train, queries = Sequences(work.train), Sequences(work.queries)
    factors = {"factors_name": "ekfac", "factor_args": FactorArguments(strategy="ekfac")}

    def fit() -> None:
        data = {"dataset": train, "per_device_batch_size": BATCH_SIZE}
        task.draws = "CovarianceSums"
        analyzer.fit_covariance_matrices(**data, **factors)
        analyzer.perform_eigendecomposition(**factors)
        task.draws = "EigenvalueSums"
        analyzer.fit_lambda_matrices(**data, **factors)

    def score(rank: int | None, damping: float | None = DAMPING) -> Tensor:
        analyzer.compute_pairwise_scores(
            f"scores-{rank}",
            "ekfac",
            query_dataset=queries,
            train_dataset=train,
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=BATCH_SIZE,
            score_args=ScoreArguments(damping_factor=damping, query_gradient_low_rank=rank),
            overwrite_output_dir=True,
        )
        return analyzer.load_pairwise_scores(f"scores-{rank}")["all_modules"]

    return fit, score


def bergson(work: Work) -> Jobs:
    """No low rank."""
    fit, score = bergson_parts(work)
    return {FIT: fit, WHOLE: partial(score, "absolute_damped_inverse", DAMPING)}


def bergson_parts(work: Work) -> tuple[Callable[[], None], Callable[[str, float], Tensor]]:
    """Its own command's two halves, each of which loads the model from a folder anew: the fit, and scores by
    a way of damping, as it calls them, and how much."""
    from bergson.config.config import (
        DataConfig,
        HessianConfig,
        HessianPipelineConfig,
        IndexConfig,
        InversionConfig,
        PreprocessConfig,
        QuerySetConfig,
        ScoreConfig,
    )
    from bergson.data import load_scores
    from bergson.hessians.hessian_approximations import approximate_hessians
    from bergson.hessians.pipeline import hessian_pipeline

    folder = Path(tempfile.mkdtemp())
    work.model.save_pretrained(folder / "model")
    work.tokenizer.save_pretrained(folder / "model")
    for name, sequences in (("train", work.train), ("queries", work.queries)):
        texts = [work.tokenizer.decode(one["input_ids"][0]) for one in sequences]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{name}.json").write_text("\n".join(lines))
    tracked = {name.removeprefix("model.") for name in work.tracked}
    linear = {name for name, part in work.model.base_model.named_modules() if isinstance(part, nn.Linear)}
    index = partial(
        IndexConfig,
        model=str(folder / "model"),
        data=DataConfig(dataset=str(folder / "train.json")),
        token_batch_size=BATCH_SIZE * TOKENS,
        filter_modules=",".join(sorted(linear - tracked)),
    )
    curvature = HessianConfig(method="kfac", ev_correction=True)
    queries = QuerySetConfig(dataset=str(folder / "queries.json"))
    hessian = folder / "hessian"

    def fit() -> None:
        approximate_hessians(index(str(hessian / "kfac")), curvature)

    def score(inversion: str, damping: float) -> Tensor:
        run = folder / f"{inversion}-{damping:g}"
        run.mkdir()
        (run / "hessian").symlink_to(hessian)
        inverse = InversionConfig(inversion, damping)
        pipeline = HessianPipelineConfig(query=queries, inversion_cfg=inverse, resume=True)
        hessian_pipeline(index(str(run)), curvature, ScoreConfig(), PreprocessConfig(), pipeline)
        return torch.as_tensor(load_scores(run / "scores")[:]).float().T

    return fit, score


ENGINES = {"ours": ours, "kronfluence": kronfluence, "bergson": bergson}

"""A job put together: settings, model, examples, engine and store, as each command needs them."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from typing import TypeVar

import numpy as np

from support.ekfac import EkfacInfluence
from support.ekfac.errors import DamagedFile
from support.ekfac.memory import queries_at_a_time
from support.job.errors import StepMissing, StoreDamaged
from support.job.examples import Examples, tokenised
from support.job.fit import JobFit
from support.job.score import Scoring
from support.job.settings import (
    PACKAGED,
    Damping,
    Question,
    Settings,
    Subject,
    as_regularization,
    settled,
)
from support.job.sources import Classifier, chosen_rows, load_classifier, load_texts
from support.job.store import Store
from support.job.team import Team, device

Result = TypeVar("Result")

RECORDED = ("torch", "transformers", "datasets", "zarr", "support")
"""Packages whose versions a store remembers."""


@dataclass(frozen=True)
class Job:
    """One command's view of a job: the options that were given, the store, and the team.

    What is in the store holds; each part is made when it is first asked for. Raises the errors of
    `sources`, `settings` and `store`.
    """

    store: Store
    given: Mapping[str, object]
    team: Team

    @cached_property
    def stored(self) -> dict[str, object]:
        """What the store knows already; empty when there is none."""

        def read() -> dict[str, object]:
            try:
                return self.store.facts()
            except StepMissing:
                return {}

        return self.team.on_first(read)

    @cached_property
    def subject(self) -> Subject:
        model = self.given.get("model") or self.stored.get("subject", {}).get("model", PACKAGED)
        return self._settled(Subject, "subject", model == PACKAGED)

    @cached_property
    def question(self) -> Question:
        return self._settled(Question, "question", False)

    @cached_property
    def damping(self) -> Damping:
        return self._settled(Damping, "damping", self.subject.model == PACKAGED)

    def _settled(self, settings: type[Settings], name: str, for_packaged_model: bool) -> Settings:
        stored = self.stored.get(name)
        return self.team.on_first(lambda: settled(settings, self.given, stored, for_packaged_model))

    @cached_property
    def classifier(self) -> Classifier:
        return self._first_alone(lambda: load_classifier(self.subject, device()))

    @cached_property
    def engine(self) -> EkfacInfluence:
        return EkfacInfluence(
            self.classifier.model,
            hessian_regularization=as_regularization(self.damping.regularization),
            precision=self.subject.precision,
            seed=self.subject.seed,
        )

    @cached_property
    def training(self) -> Examples:
        return self._examples(
            self.subject.dataset,
            self.subject.training_split,
            self.subject.training_rows,
            "training-rows",
        )

    @cached_property
    def fitted_on(self) -> Examples:
        """The training examples that the curvature is fitted on."""
        option = "fit-rows"
        chosen = chosen_rows(self.subject.fit_rows, len(self.training), self.subject.seed, option)
        if len(chosen) == len(self.training):
            return self.training
        rows = ",".join(map(str, self.training.rows[chosen]))
        return self._examples(self.subject.dataset, self.subject.training_split, rows, option)

    @cached_property
    def queries(self) -> Examples:
        name = self.question.queries or self.subject.dataset
        return self._examples(
            name, self.question.query_split, self.question.query_rows, "query-rows"
        )

    def _examples(self, name: str, split: str, rows: str, option: str) -> Examples:
        def load() -> Examples:
            texts = load_texts(name, split, self.subject, self.classifier.class_names)
            chosen = chosen_rows(rows, len(texts), self.subject.seed, option)
            return tokenised(
                texts, chosen, self.classifier, self.subject.max_tokens, self.store.tokens
            )

        return self._first_alone(load)

    def _first_alone(self, work: Callable[[], Result]) -> Result:
        """Work that leaves something on the disk which the others then find."""
        kept: list[Result] = []
        self.team.on_first(lambda: kept.append(work()))
        return kept[0] if kept else work()

    def begin(self) -> None:
        """Make the store, or see that it is this job's. Raises `StoreMismatch`, by name."""
        training, fitted_on = self.training, self.fitted_on

        def settle() -> None:
            self.store.begin()
            self.store.settle("subject", asdict(self.subject))
            self.store.settle("model", self.engine.identity())
            self.store.settle("training", _about(training))
            self.store.settle("fitted_on", _about(fitted_on))
            self.store.keep_rows("training_rows", training.rows)
            if self.store.get("versions") is None:
                versions = {name: version(name) for name in RECORDED}
                self.store.settle("versions", {"python": platform.python_version(), **versions})

        self.team.on_first(settle)

    def fit(self, save_seconds: float | int, tell_seconds: float | int) -> bool:
        """The curvature into the store; whether there was anything left to do."""
        self.begin()
        if self.team.on_first(self.store.curvature.exists):
            return False
        JobFit(
            self.engine,
            self.fitted_on,
            self.subject.block,
            self.team,
            self.store,
            save_seconds,
            tell_seconds,
        ).run()
        return True

    def scoring(self, tell_seconds: float | int) -> Scoring:
        """The fitted engine, ready to score. Raises `StepMissing` without a fit."""
        self.begin()
        if not self.team.on_first(self.store.curvature.exists):
            raise StepMissing(f"{self.store.folder} has no curvature yet. Run: fit")
        try:
            self.engine.load_curvature(self.store.curvature)
        except DamagedFile as error:
            raise StoreDamaged(
                f"{error} Remove {self.store.curvature.name} and run: fit"
            ) from error
        self.team.on_first(lambda: self.store.settle("damping", asdict(self.damping)))
        return Scoring(
            self.engine, self.training, self.subject.block, self.team, self.store, tell_seconds
        )

    def score(self, tell_seconds: float | int) -> None:
        """Influences of all training examples on all queries, into the store."""
        scoring = self.scoring(tell_seconds)
        queries = self.queries

        def settle() -> int:
            self.store.settle("question", asdict(self.question))
            self.store.settle("queries", _about(queries))
            self.store.keep_rows("query_rows", queries.rows)
            if self.store.get("query_block") is None:
                self.store.settle("query_block", self.query_block())
            return self.store.get("query_block")

        scoring.score(queries, self.team.on_first(settle), self.question.by_layer)

    def query_block(self) -> int:
        """As asked, or as many as each process of this machine has room for."""
        fitting = queries_at_a_time(self.engine.layers, None) // self.team.neighbours
        return min(len(self.queries), self.question.query_block or max(1, fitting))

    @property
    def class_names(self) -> dict[int, str]:
        return {number: name for name, number in self.classifier.class_names.items()}


def _about(examples: Examples) -> dict[str, object]:
    tokens = int(np.sum(examples.lengths))
    return {"examples": len(examples), "tokens": tokens, "digest": examples.digest}

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
    refuse_unless_equal,
    settled,
)
from support.job.sources import (
    Classifier,
    chosen_rows,
    load_classifier,
    load_texts,
    refuse_single_split,
)
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
        subject = self.subject
        return self._first_alone(lambda: load_classifier(subject, device()))

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
        chosen = self.subject.training_rows, "training-rows"
        return self._examples(self.subject.dataset, self.subject.training_split, *chosen)

    @cached_property
    def fitted_on(self) -> Examples:
        """The training examples that the curvature is fitted on."""
        chosen = self.subject.fit_rows, len(self.training), self.subject.seed, "fit-rows"
        return self.training.select(chosen_rows(*chosen))

    @cached_property
    def queries(self) -> Examples:
        question, subject = self.question, self.subject
        if not question.queries and question.query_split != subject.training_split:
            self.team.on_first(lambda: refuse_single_split(subject.dataset))
        name = question.queries or subject.dataset
        return self._examples(name, question.query_split, question.query_rows, "query-rows")

    def _examples(self, name: str, split: str, rows: str, option: str) -> Examples:
        classifier, subject = self.classifier, self.subject

        def load() -> Examples:
            texts = load_texts(name, split, subject, classifier.class_names)
            chosen = chosen_rows(rows, len(texts), subject.seed, option)
            return tokenised(texts, chosen, classifier, subject.max_tokens, self.store.tokens)

        return self._first_alone(load)

    def _first_alone(self, work: Callable[[], Result]) -> Result:
        """Work that leaves something on the disk which the others then find."""
        kept: list[Result] = []
        self.team.on_first(lambda: kept.append(work()))
        return kept[0] if kept else work()

    def begin(self) -> None:
        """Make the store, or see that it is this job's. Raises `StoreMismatch`, by name."""
        facts = {
            "subject": asdict(self.subject),
            "model": self.engine.identity(),
            "config": self.classifier.config,
            "training": _about(self.training),
            "fitted_on": _about(self.fitted_on),
        }
        rows = self.training.rows

        def settle() -> None:
            self.store.begin()
            for name, fact in facts.items():
                self.store.settle(name, fact)
            self.store.keep_rows("training_rows", rows)
            if self.store.get("versions") is None:
                versions = {name: version(name) for name in RECORDED}
                self.store.settle("versions", {"python": platform.python_version(), **versions})

        self.team.on_first(settle)
        self._refuse_other_facts(facts)

    def _refuse_other_facts(self, facts: Mapping[str, object]) -> None:
        """Each process has read model and examples for itself, maybe on another machine."""
        for name, stored in self.team.on_first(lambda: facts).items():
            refuse_unless_equal(name, stored, facts[name])

    def fit(self, save_seconds: float | int, tell_seconds: float | int) -> bool:
        """The curvature into the store; whether there was anything left to do."""
        self.begin()
        if self.team.on_first(self.store.curvature.exists):
            self.team.on_first(self.store.forget_partial_fit)
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

    def ask(self) -> None:
        """Settle queries and λ, so that a run that is killed before it scores knows them.

        Nothing is settled unless all of it can be. Raises `StoreMismatch`, by name.
        """
        queries, question, damping = self.queries, self.question, self.damping
        about = {"queries": _about(queries)}

        def settle() -> None:
            self.store.settle("damping", asdict(damping))
            self.store.settle("question", asdict(question))
            self.store.settle("queries", about["queries"])
            self.store.keep_rows("query_rows", queries.rows)

        self.team.on_first(settle)
        self._refuse_other_facts(about)

    def score(self, tell_seconds: float | int) -> None:
        """Influences of all training examples on all queries, into the store."""
        scoring = self._scoring(tell_seconds)
        self.ask()
        queries, by_layer, query_block = self.queries, self.question.by_layer, self.query_block()

        def make_arrays() -> int:
            scoring.make_arrays(queries, query_block, by_layer)
            found = self.store.array("scores").chunks[0]
            if self.given.get("query_block"):
                refuse_unless_equal("--query-block", found, query_block)
            return found

        scoring.score(queries, self.team.on_first(make_arrays), by_layer)

    def self_influences(self, tell_seconds: float | int) -> None:
        """Influence of every training example on itself, into the store."""
        scoring, damping = self._scoring(tell_seconds), self.damping
        self.team.on_first(lambda: self.store.settle("damping", asdict(damping)))
        scoring.self_influences()

    def _scoring(self, tell_seconds: float | int) -> Scoring:
        """The fitted engine. Raises `StepMissing` without a fit."""
        self.begin()
        if not self.team.on_first(self.store.curvature.exists):
            raise StepMissing(f"{self.store.folder} has no curvature yet. Run: fit")
        try:
            self.engine.load_curvature(self.store.curvature)
        except DamagedFile as error:
            raise StoreDamaged(
                f"{error} Remove {self.store.curvature.name} and run: fit"
            ) from error
        return Scoring(
            self.engine, self.training, self.subject.block, self.team, self.store, tell_seconds
        )

    def query_block(self) -> int:
        """As asked, or as many as there is room for beside the other processes of this machine."""
        room = queries_at_a_time(self.engine.layers, None)
        if device().type == "cpu":
            room //= self.team.neighbours
        return min(len(self.queries), self.given.get("query_block") or max(1, room))

    def refuse_other_texts(self) -> None:
        """Raise `StoreMismatch` unless examples and queries are those that were scored."""
        for name, examples in (("training", self.training), ("queries", self.queries)):
            refuse_unless_equal(name, self.stored.get(name), _about(examples))

    @property
    def class_names(self) -> dict[int, str]:
        return {number: name for name, number in self.classifier.class_names.items()}


def _about(examples: Examples) -> dict[str, object]:
    tokens = int(np.sum(examples.lengths))
    return {"examples": len(examples), "tokens": tokens, "digest": examples.digest}

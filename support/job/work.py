"""A job put together: settings, model, examples, engine and store, as each command needs them."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from typing import TypeVar

from support.ekfac import EkfacInfluence
from support.ekfac.errors import DamagedFile
from support.ekfac.memory import queries_at_a_time
from support.job.errors import StepMissing, StoreDamaged
from support.job.examples import Examples, chosen_rows, tokenised
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
from support.job.sources import Classifier, load_classifier, load_texts, refuse_single_split
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
        return self.team.on_first(lambda: self.store.facts() if self.store.exists else {})

    @cached_property
    def subject(self) -> Subject:
        return self._settled(Subject, "subject")

    @cached_property
    def question(self) -> Question:
        return self._settled(Question, "question")

    @cached_property
    def damping(self) -> Damping:
        return self._settled(Damping, "damping")

    def _settled(self, settings: type[Settings], name: str) -> Settings:
        stored, subject = self.stored.get(name), self.stored.get("subject", {})
        model = self.given.get("model") or subject.get("model", PACKAGED)
        return self.team.on_first(lambda: settled(settings, self.given, stored, model == PACKAGED))

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
        subject = self.subject
        return self._examples(subject.dataset, subject.training_split, "training_rows", subject)

    @cached_property
    def fitted_on(self) -> Examples:
        """The training examples that the curvature is fitted on."""
        rows, seed = self.subject.fit_rows, self.subject.seed
        return self.training.select(chosen_rows(rows, len(self.training), seed, "fit-rows"))

    @cached_property
    def queries(self) -> Examples:
        question, subject = self.question, self.subject
        if not question.queries and question.query_split != subject.training_split:
            self.team.on_first(lambda: refuse_single_split(subject.dataset))
        name = question.queries or subject.dataset
        return self._examples(name, question.query_split, "query_rows", question)

    def _examples(self, name: str, split: str, rows: str, chosen: Subject | Question) -> Examples:
        classifier, subject = self.classifier, self.subject

        def load() -> Examples:
            texts = load_texts(name, split, subject, classifier.class_names)
            option = rows.replace("_", "-")
            numbers = chosen_rows(getattr(chosen, rows), len(texts), subject.seed, option)
            tokenizer, folder = classifier.tokenizer, self.store.tokens
            return tokenised(texts, numbers, tokenizer, subject.max_tokens, folder)

        return self._first_alone(load)

    def _first_alone(self, work: Callable[[], Result]) -> Result:
        """Work that leaves something on the disk which the others then find."""
        kept: list[Result] = []
        self.team.on_first(lambda: kept.append(work()))
        return kept[0] if kept else work()

    def begin(self) -> None:
        """Make the store, or see that it is this job's. Raises `StoreMismatch`, by name."""
        versions = self.stored.get("versions") or {
            "python": platform.python_version(),
            **{name: version(name) for name in RECORDED},
        }
        self._settle(
            {
                "subject": asdict(self.subject),
                "model": self.engine.identity(),
                "config": self.classifier.config,
                "training": self.training.about(),
                "fitted_on": self.fitted_on.about(),
                "versions": versions,
            },
            training_rows=self.training,
        )

    def ask(self) -> None:
        """Settle queries and λ, so that a run that is killed before it scores knows them.

        Nothing is settled unless all of it can be. Raises `StoreMismatch`, by name.
        """
        facts = {"queries": self.queries.about(), "damping": asdict(self.damping)}
        self._settle(facts | {"question": asdict(self.question)}, query_rows=self.queries)

    def _settle(self, facts: Mapping[str, dict], **rows: Examples) -> None:
        """Each process has read model and examples for itself, maybe on another machine."""

        def settle() -> Mapping[str, dict]:
            self.store.begin()
            for name, fact in facts.items():
                self.store.settle(name, fact)
            for name, examples in rows.items():
                self.store.keep_rows(name, examples.rows)
            return facts

        for name, first in self.team.on_first(settle).items():
            refuse_unless_equal(name, first, facts[name])

    def fit(self) -> str:
        """The curvature into the store."""
        self.begin()
        if self.team.on_first(self.store.curvature.exists):
            self.team.on_first(self.store.forget_partial_fit)
            return "It was fitted before."
        seconds = self.given["save_seconds"], self.given["tell_seconds"]
        block = self.subject.block
        JobFit(self.engine, self.fitted_on, block, self.team, self.store, *seconds).run()
        return f"Fitted on {len(self.fitted_on):,} examples."

    def score(self) -> str:
        """Influences of all training examples on all queries, into the store."""
        scoring = self._scoring()
        self.ask()
        queries, by_layer, query_group = self.queries, self.question.by_layer, self.query_group()

        def make_arrays() -> int:
            scoring.make_arrays(queries, query_group, by_layer)
            found = self.store.array("scores").chunks[0]
            if self.given.get("query_block"):
                refuse_unless_equal("--query-block", found, query_group)
            return found

        scoring.score(queries, self.team.on_first(make_arrays), by_layer)
        return f"Scored {len(self.training):,} training examples on {len(queries):,} queries."

    def self_influences(self) -> str:
        """Influence of every training example on itself, into the store."""
        scoring = self._scoring()
        self._settle({"damping": asdict(self.damping)})
        scoring.self_influences()
        return f"Self-influence of {len(self.training):,} training examples."

    def _scoring(self) -> Scoring:
        """The fitted engine. Raises `StepMissing` without a fit."""
        self.begin()
        curvature = self.store.curvature
        if not self.team.on_first(curvature.exists):
            raise StepMissing(f"{self.store.folder} has no curvature yet. Run: fit")
        try:
            self.engine.load_curvature(curvature)
        except DamagedFile as error:
            raise StoreDamaged(f"{error} Remove {curvature.name} and run: fit") from error
        block, seconds = self.subject.block, self.given["tell_seconds"]
        return Scoring(self.engine, self.training, block, self.team, self.store, seconds)

    def query_group(self) -> int:
        """As asked, or as many as there is room for beside the other processes of this machine."""
        room = queries_at_a_time(self.engine.layers, None)
        if device().type == "cpu":
            room //= self.team.neighbours
        return min(len(self.queries), self.given.get("query_block") or max(1, room))

    def refuse_other_texts(self) -> None:
        """Raise `StoreMismatch` unless examples and queries are those that were scored."""
        for name, examples in (("training", self.training), ("queries", self.queries)):
            refuse_unless_equal(name, self.stored.get(name), examples.about())

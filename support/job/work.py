"""A job put together: settings, model, examples, engine and store, as each command needs them."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from typing import TypeVar

from support.ekfac import EkfacInfluence
from support.ekfac.memory import queries_at_a_time
from support.job.examples import Examples, chosen_rows, tokenised
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
        return self._settled(Subject)

    @cached_property
    def question(self) -> Question:
        return self._settled(Question)

    @cached_property
    def damping(self) -> Damping:
        return self._settled(Damping)

    def _settled(self, settings: type[Settings]) -> Settings:
        stored = self.stored.get(settings.__name__.lower())
        subject = self.stored.get("subject", {})
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
        versions = self.stored.get("versions") or self.team.on_first(_versions)
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
        about = self.queries.about()
        facts = {"damping": asdict(self.damping), "question": asdict(self.question)}
        self._settle(facts | {"queries": about}, query_rows=self.queries)

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

    def settle_damping(self) -> None:
        """Settle λ alone. Raises `StoreMismatch`."""
        self._settle({"damping": asdict(self.damping)})

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


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in RECORDED}}

"""A job put together: settings, model, examples, engine and store, as each command needs them."""

import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from typing import TypeVar

import numpy as np

from support.ekfac import EkfacInfluence
from support.ekfac.memory import queries_at_a_time
from support.job.errors import refuse_all
from support.job.examples import Examples, chosen_rows
from support.job.models import DOUBTS, Task
from support.job.settings import Damping, Question, Subject, as_regularization, mismatch, refused, settled
from support.job.sources import load_split, refuse_single_split
from support.job.store import Store
from support.job.tasks import load_task
from support.job.team import Team, device
from support.text import visible

Result = TypeVar("Result")

RECORDED = ("torch", "transformers", "datasets", "zarr", "support")
COUNTING = ("torch", "transformers", "support")
"""Packages that have a say in the numbers."""


@dataclass(frozen=True)
class Job:
    """One command's view of a job: the options that were given, the store, and the team.

    Each part is made when it is first asked for. Raises the errors of `sources`, `settings` and `store`.
    """

    store: Store
    given: Mapping[str, object]
    team: Team

    subject = cached_property(lambda job: job.settings[Subject][0])
    question = cached_property(lambda job: job.settings[Question][0])
    damping = cached_property(lambda job: job.settings[Damping][0])

    @cached_property
    def settings(self) -> dict[type, tuple]:
        """Of each kind those that hold, and what is wrong with those that are given."""
        kinds, stored = {Subject: "subject", Question: "question", Damping: "damping"}, self.stored
        return self.team.on_first(
            lambda: {kind: settled(kind, self.given, stored.get(name)) for kind, name in kinds.items()}
        )

    def check(self) -> None:
        """Look at everything that can be set, and raise all that is refused at once, as an error of the
        first one's kind. Without a model, of the data sets only whether they can be read is known."""
        errors: list[Exception] = [*refused(self.given).values()]
        errors += [error for _, wrong in self.settings.values() for error in wrong]

        def holds(work: Callable[[], object]) -> bool:
            before = len(errors)
            try:
                work()
            except Exception as error:  # whatever it is, all processes go on to the end of this, and raise it
                errors.append(error)
            return len(errors) == before

        subject, question, usable = self.subject, self.question, holds(lambda: self.task)
        data = subject.dataset, subject.training_split
        if holds(lambda: self.training if usable else load_split(*data)) and usable:
            holds(lambda: self.fitted_on)
        if "query_rows" in self.given:  # of a command that asks
            asked = question.queries or subject.dataset, question.query_split
            holds(lambda: self.queries if usable else load_split(*asked))
        self.team.on_first(lambda: refuse_all(errors))
        refuse_all(errors)  # of one that the first process did not meet

    @cached_property
    def stored(self) -> dict[str, object]:
        """What the store knows already; empty when there is none."""

        def look() -> dict[str, object]:
            self.store.refuse_links()
            return self.store.facts() if self.store.exists else {}

        return self.team.on_first(look)

    @cached_property
    def task(self) -> Task:
        subject = self.subject
        return self._first_alone(lambda: load_task(subject, device()))

    @cached_property
    def engine(self) -> EkfacInfluence:
        inverted = {"hessian_regularization": as_regularization(self.damping.regularization)}
        fitted = {"precision": self.subject.precision, "seed": self.subject.seed}
        likelihood = self.task.likelihood(samples=self.subject.fisher_samples)
        return EkfacInfluence(self.task.model, likelihood=likelihood, **inverted, **fitted)

    @cached_property
    def training(self) -> Examples:
        subject = self.subject
        return self._examples(subject.dataset, subject.training_split, "training-rows", subject.training_rows)

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
        return self._examples(name, question.query_split, "query-rows", question.query_rows, question)

    def _examples(
        self, name: str, split: str, option: str, rows: str, question: Question | None = None
    ) -> Examples:
        found = self._first_alone(lambda: load_split(name, split))
        task, seed, tokens = self.task, self.subject.seed, self.store.tokens
        store = self.store if self.stored.get("queries") else None

        def choose() -> np.ndarray:
            if not question or rows.partition(":")[0] not in DOUBTS:
                return chosen_rows(rows, len(found), seed, option)
            kept = (range(store.facts()["queries"]["examples"]),) if store else ()
            if kept and store.has("query_rows", kept):  # the model was asked about all before
                return store.read("query_rows", kept)
            return task.doubted(task.texts(found, name, True), rows, tokens)

        numbers = self.team.on_first(choose)

        def load() -> Examples:
            texts = task.texts(found, name, asked=question is not None)
            return task.examples(texts, numbers, tokens, question)

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
            "config": self.task.config,
            "training": self.training.about(),
            "fitted_on": self.fitted_on.about(),
            "versions": self.versions,
        }
        self.settle(facts, training_rows=self.training)

    @cached_property
    def versions(self) -> dict[str, str]:
        """Those that the store was begun with. Others here are told: their last digits may differ."""
        here = {name: version(name) for name in RECORDED} | {"python": platform.python_version()}
        begun = self.stored.get("versions") or self.team.on_first(lambda: here)
        for name in COUNTING:
            if begun.get(name) != here[name] and self.team.rank == 0:
                told = visible(f"The store was begun with {name} {begun.get(name)}; here it is {here[name]}")
                print(f"{told}: last digits of what is added may differ.", file=sys.stderr, flush=True)
        return begun

    def ask(self) -> None:
        """Settle queries and λ, so that a run that is killed before it scores knows them. As `begin`."""
        settings = {"damping": asdict(self.damping), "question": asdict(self.question)}
        self.settle(settings | {"queries": self.queries.about()}, query_rows=self.queries)

    def settle(self, facts: Mapping[str, dict], **rows: Examples) -> None:
        """Raise `StoreMismatch`, by name, unless store and processes, maybe on many machines, agree."""

        def settle() -> Mapping[str, dict]:
            self.store.begin()
            self.store.settle(facts)
            for name, examples in rows.items():
                self.store.keep_rows(name, examples.rows)
            return facts

        refuse_all(mismatch(self.team.on_first(settle), facts))

    def query_group(self) -> int:
        """As asked, or as many as there is room for beside the other processes of this machine."""
        room = queries_at_a_time(self.engine.layers, None, self.question.query_rank or None)
        if device().type == "cpu":
            room //= self.team.neighbours
        return min(len(self.queries), self.given.get("query_block") or max(1, room))

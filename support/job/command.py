"""The command line of a job: what each command is told, which steps it takes, and how errors are told."""

import argparse
import os
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pandas as pd
import torch
from torch.distributed import DistError

from support.assets import AssetDamaged
from support.ekfac.errors import EkfacError, LayerNotSupported, NothingAsked, OutputsNotSupported
from support.job import fleet
from support.job.errors import BadSetting, JobError, StepMissing, ToldElsewhere, refuse_all
from support.job.fit import fit
from support.job.index import ask, index
from support.job.page import page
from support.job.plan import planned
from support.job.score import load_curvature, score, self_influences
from support.job.settings import ASKED, Damping, Question, Subject, add_options, mismatch, refused
from support.job.store import Store
from support.job.suspects import suspects
from support.job.team import Team, assembled
from support.job.tokens import by_token
from support.job.top import by_column, kept, own_columns, strongest, with_descriptions
from support.job.work import Job
from support.text import visible

GUIDE = """\
Which training examples made the model say that? Steps, each a command, each kept in the store:

  python -m support.job plan  --store results --query-rows 50     what it will cost
  python -m support.job fit   --store results                     the curvature of the model
  python -m support.job score --store results --query-rows 50     influence of all on 50 queries
  python -m support.job self  --store results                     of each training example on itself
  python -m support.job top   --store results                     table, parquet and a page to read
  python -m support.job suspects --store results                  labels that look wrong, as csv
  python -m support.job index --store results                     a short vector of each, for
  python -m support.job ask   --store results "a fine film"       who is behind the answer, at once
  python -m support.job show  --store results                     what the store knows, how far it is

  python -m support.job run   --store results --query-rows 50     fit, score and self in one go

Another question to the same fit, and its page:

  python -m support.job score --store results --question new --queries new.csv
  python -m support.job top   --store results --question new

Your own model and texts (a folder with train.csv and test.csv, or --queries beside a single file):

  python -m support.job fit --store results --model ./my-model --dataset ./reviews

Several processes, or machines, which share the store's disk:

  torchrun --nproc-per-node=4 -m support.job score --store results

Why a model that writes says what it says (queries.jsonl: a prompt a line, with its completion or without):

  python -m support.job run --store results --task language-model --queries queries.jsonl

A run that was killed goes on where it was when the same command is given again. What the store knows
need not be said again; what contradicts it is refused.
"""

EXPECTED = (
    JobError, EkfacError, AssetDamaged, OSError, MemoryError, torch.OutOfMemoryError, PackageNotFoundError
)  # fmt: skip
AGAIN = "The same command goes on from where it was."
CURES = {
    LayerNotSupported: "On the command line: choose other layers, with --layers.",
    OutputsNotSupported: "On the command line: name another --model, one that masks padding.",
    PackageNotFoundError: "A store tells versions: install what runs, pip install -e . in a checkout.",
    (MemoryError, torch.OutOfMemoryError): "Smaller --block, --query-block or --max-tokens need less memory.",
}
"""What to do on the command line about errors that don't know of it."""

OPTIONS = (
    ("question", "plan run score self top", str, "", "name of one among several questions to a store (none)"),
    ("query-block", "plan run score", int, None, "queries at a time (as many as fit)"),
    ("tell-seconds", "run fit score self index", float, 60.0, "between two lines of a log (60)"),
    ("save-seconds", "run fit", float, 60.0, "between two savings of the fit on its way (60)"),
    ("numbers", "index", int, 2048, "numbers of a byte that are kept of each example (2048)"),
    ("exact", "ask", int, 100, "how many of the first are computed exactly (100)"),
    ("count", "ask top", int, 10, "how many (10)"),
    ("count", "suspects", int, 100, "how many (100)"),
    ("relative", "top", bool, False, "scores over √self-influence; needs self"),
    ("by-token", "top", bool, False, "what each token, of queries and training texts, adds; takes passes"),
    ("keep", "top suspects", str, "", "your own columns that are to be shown, with commas between them"),
    ("by", "top", str, "", "one of these that influence is to be added up by"),
    ("output", "top suspects", Path, None, "folder for what is written (the store)"),
    ("shape", "fleet", str, "llama-3-8b", f"the model: {' or '.join(fleet.SHAPES)} (llama-3-8b)"),
    ("examples", "fleet", int, 1_000_000, "training examples (1,000,000)"),
    ("tokens", "fleet", int, 512, "tokens of each (512)"),
    ("fit-examples", "fleet", int, 100_000, "examples that the curvature is fitted on (100,000)"),
    ("queries", "fleet", int, 1000, "queries (1,000)"),
    ("query-rank", "fleet", int, 0, "rank at which each is kept, 0 for all of it (0)"),
    ("devices", "fleet", int, 64, "devices (64)"),
    ("teraflops", "fleet", float, 400.0, "10¹² operations a second that a device sustains (400)"),
    ("memory", "fleet", float, 80.0, "GB of a device (80)"),
)
"""Those that no store remembers: name, commands, type, default, meaning."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status. Whatever goes wrong is told before the team parts."""
    chosen = parser().parse_args(arguments)
    try:
        with assembled() as team, warnings.catch_warnings():
            warnings.simplefilter("ignore", NothingAsked)  # a job tells it once, of its data sets
            try:
                for said in chosen.run(chosen, team):
                    if said and team.rank == 0:
                        print(visible(said), flush=True)
            except (Exception, KeyboardInterrupt) as error:
                return _told(error, f"process {team.rank}: " if team.size > 1 else "")
    except (Exception, KeyboardInterrupt) as error:  # no team has come about
        return _told(error)
    return 0


def _told(error: BaseException, who: str = "") -> int:
    """Tell an error, whatever it is; with JOB_TRACEBACK set, raise it."""
    if isinstance(error, ToldElsewhere):
        return 1
    if os.environ.get("JOB_TRACEBACK"):
        raise error
    if "can't allocate memory" in str(error):  # of the CPU, a RuntimeError
        error = MemoryError(str(error))
    told = f"{type(error).__name__}: {str(error).strip()}"
    if isinstance(error, KeyboardInterrupt):
        told = f"Stopped. {AGAIN}"
    elif who and (isinstance(error, DistError) or "gloo" in told):
        told = f"Another process was lost, see what it said ({told.splitlines()[0]}). {AGAIN}"
    elif not isinstance(error, EXPECTED):
        told = f"{told.splitlines()[0]} (unexpected: with JOB_TRACEBACK=1 before the command, it says where)"
    cures = (cure for kind, cure in CURES.items() if isinstance(error, kind))
    print(visible(f"\n{who}{' '.join([told, *cures])}"), file=sys.stderr)
    return 1


def parser() -> ArgumentParser:
    """The commands and their options."""
    how = {"description": GUIDE, "formatter_class": argparse.RawDescriptionHelpFormatter}
    whole = ArgumentParser(prog="python -m support.job", **how)
    commands = whole.add_subparsers(required=True, metavar="command")
    everything = (Subject, Question, Damping)
    run_all = _steps(Job.begin, Job.ask, fit, score, self_influences)
    for name, run, meaning, settings in (
        ("plan", _steps(planned), "what the job will cost on this machine", everything[:2]),
        ("run", run_all, "fit, score and self in one go", everything),
        ("fit", _steps(fit), "the curvature of the model", (Subject,)),
        ("score", _steps(score), "influence of all training examples", everything),
        ("self", _steps(self_influences), "influence of each one on itself", everything[::2]),
        ("index", _steps(index), "a short vector of each training example, for ask", (Subject, Damping)),
        ("ask", _ask, "who is behind the model's answer to a text, at once", ()),
        ("top", _top, "the strongest training examples, to read", ()),
        ("suspects", _suspects, "training examples whose labels look wrong, as csv", (Subject,)),
        ("show", _show, "what a store knows, and how far it is", ()),
        ("fleet", _fleet, "what a job would cost on machines that you don't have", ()),
    ):
        command = commands.add_parser(name, help=meaning, description=f"{meaning.capitalize()}.")
        command.set_defaults(run=run)
        if name != "fleet":
            command.add_argument("--store", required=True, metavar="FOLDER", help="the job's results")
        if name == "ask":
            command.add_argument("texts", nargs="+", metavar="TEXT", help="what the model is to answer")
        for one in settings:
            add_options(command, one)
        for own, of, kind, default, explained in OPTIONS:
            choices = fleet.SHAPES if own == "shape" else None
            how = {"type": kind, "default": default, "metavar": "…", "choices": choices}
            how = {"action": "store_true"} if kind is bool else how
            if name in of.split():
                command.add_argument(f"--{own}", **how, help=explained)
    return whole


def _steps(*steps: Callable[[Job], str | None]) -> Callable[[Namespace, Team], Iterator[str | None]]:
    """A command of steps on a store, which is this team's meanwhile; gives what there is to say."""

    def run(chosen: Namespace, team: Team) -> Iterator[str | None]:
        job = Job(Store(chosen.store, vars(chosen).get("question", "")), vars(chosen), team)
        named = chosen.dataset not in (None, Subject.dataset)
        if named and Path(chosen.dataset).absolute() in job.store.folder.absolute().parents:
            raise BadSetting(f"--store {chosen.store} lies among the files of --dataset. Name one elsewhere.")
        with job.store.claimed(team):
            job.check()
            yield job.task.told
            yield job.training.told
            for step in steps:
                yield step(job)

    return run


def _top(chosen: Namespace, team: Team) -> Iterator[str]:
    refuse_all(refused(vars(chosen)).values())
    job = Job(Store(chosen.store, chosen.question), vars(chosen), team)
    # Before queries are looked for: only `score` says which they are.
    team.on_first(lambda: job.store.array("scores").shape)
    for name, examples in (("training", job.training), ("queries", job.queries)):
        refuse_all(mismatch(job.stored, {name: examples.about()}))
    if chosen.by_token:
        load_curvature(job)
    facts = ({"question": chosen.question} if chosen.question else {}) | {
        "model": job.subject.model,
        "data set": job.subject.dataset,
        "training examples": f"{len(job.training):,}, of split {job.subject.training_split}",
        "queries": f"{len(job.queries):,}, of {job.question.queries or f'split {job.question.query_split}'}",
        "regularization": job.damping.regularization,
    }
    if team.rank:  # from here on nothing may be asked of the team
        return
    about, keep = (job.store, job.training, job.queries, chosen.count), kept(chosen.keep)
    asked, other = ("relative", "plain") if chosen.relative else ("plain", "relative")
    lists = {asked: strongest(*about, chosen.relative)}
    with suppress(StepMissing):  # of self-influences that nobody asked for
        lists[other] = strongest(*about, not chosen.relative)
    facts["scores"] = " and ".join(lists)
    lists = with_descriptions(job, lists, keep)
    if chosen.by:
        subject, rows = job.subject, job.training.rows
        values = own_columns(subject.dataset, subject.training_split, rows, [chosen.by])[chosen.by]
        found = by_column(lists[asked].shares, chosen.by, values.tolist())
        lists[asked] = replace(lists[asked], by_column=found)
    if chosen.by_token:
        pairs = pd.concat([one.by_query[["query", "training_row"]] for one in lists.values()])
        lists[asked] = replace(lists[asked], by_token=by_token(job, pairs.drop_duplicates()))
    found, output = lists[asked], chosen.output
    output = output or job.store.folder / (f"questions/{chosen.question}" if chosen.question else "")
    found.write(output, page(lists, keep, facts))
    yield f"{found}\n\nTo read: {output / 'top.html'}; as data: {output / 'top.parquet'}"


def _suspects(chosen: Namespace, team: Team) -> Iterator[str | None]:
    if not chosen.model and not chosen.dataset:  # a store's name mistyped is no wish for the packaged ones
        team.on_first(Store(chosen.store).facts)
    yield from _steps(suspects)(chosen, team)


def _ask(chosen: Namespace, team: Team) -> Iterator[str]:
    refuse_all(refused(vars(chosen)).values())
    job = Job(Store(chosen.store), vars(chosen), team)
    refuse_all(mismatch(job.stored, {"training": job.training.about()}))
    yield from ask(job, chosen.texts)


def _show(chosen: Namespace, team: Team) -> Iterator[str]:
    yield team.on_first(lambda: shown(Store(chosen.store)))


def shown(store: Store) -> str:
    """Facts and progress of a store. Raises `StepMissing` when there is none, and `StoreDamaged`."""
    lines = [str(store.folder)]
    told = store.facts() | {"progress": store.progress()}
    for name in store.questions():
        own = Store(store.folder, name)
        asked = {key: value for kind in ASKED for key, value in own.facts().get(kind, {}).items()}
        told[f"question {name}"] = asked | {key: own.progress()[key] for key in ("score", "self")}
    for name, value in told.items():
        lines.append(f"{name}:" if isinstance(value, dict) else f"{name}: {value}")
        if isinstance(value, dict):
            lines += [f"  {key}: {one}" for key, one in value.items() if one != ""]
    return "\n".join(line if len(line) <= 100 else f"{line[:99]}…" for line in lines)


def _fleet(chosen: Namespace, team: Team) -> Iterator[str]:
    refuse_all(refused(vars(chosen)).values())
    sizes = chosen.examples, chosen.tokens, chosen.queries, chosen.fit_examples
    plan = fleet.on_paper(fleet.SHAPES[chosen.shape], *sizes, chosen.memory * 1e9, chosen.query_rank)
    yield (
        f"{chosen.shape}: {chosen.examples:,} examples of {chosen.tokens} tokens, {chosen.queries:,} "
        f"queries; {chosen.devices} devices of {chosen.teraflops:g} Tflop/s"
    )
    yield fleet.told(plan, chosen.devices * chosen.teraflops * 1e12)

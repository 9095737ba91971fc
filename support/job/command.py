"""The command line of a job: `plan`, `run`, `fit`, `score`, `self`, `top`, `show`, `fleet`."""

import argparse
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from support.ekfac.errors import EkfacError
from support.job import fleet, plan
from support.job.errors import BadSetting, JobError, ToldElsewhere
from support.job.page import as_text, page, write_top
from support.job.settings import Damping, Question, Subject, add_options
from support.job.show import shown
from support.job.store import Store
from support.job.team import Alone, Team, assembled
from support.job.top import strongest
from support.job.work import Job

GUIDE = """\
Which training examples made the model say that? Steps, each a command, each kept in the store:

  python -m support.job plan  --store results --query-rows 50     what it will cost
  python -m support.job fit   --store results                     the curvature of the model
  python -m support.job score --store results --query-rows 50     influence of all on 50 queries
  python -m support.job self  --store results                     of each training example on itself
  python -m support.job top   --store results                     table, parquet and a page to read
  python -m support.job show  --store results                     what the store knows, how far it is

  python -m support.job run   --store results --query-rows 50     fit, score and self in one go

Your own model and texts (a folder with train.csv and test.csv, or --queries beside a single file):

  python -m support.job fit --store results --model ./my-model --dataset ./reviews

Several processes, or machines, which share the store's disk:

  torchrun --nproc-per-node=4 -m support.job score --store results

A run that was killed goes on where it was when the same command is given again. What the store knows
need not be said again; what contradicts it is refused.
"""


Command = Callable[[Namespace, Team], None]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    chosen = parser().parse_args(arguments)
    try:
        with assembled() as team:
            return _told(chosen, team)
    except BadSetting as error:  # no team has come about
        _tell(error)
        return 1


def _told(chosen: Namespace, team: Team) -> int:
    """Run a command; what goes wrong on purpose is told before the team parts."""
    try:
        chosen.run(chosen, team)
    except ToldElsewhere:
        return 1
    except (JobError, EkfacError) as error:
        _tell(error, f"process {team.rank}: " if team.size > 1 else "")
        return 1
    return 0


def _tell(error: Exception, who: str = "") -> None:
    print(f"\n{who}{type(error).__name__}: {error}", file=sys.stderr)


def parser() -> ArgumentParser:
    """The commands and their options."""
    whole = ArgumentParser(
        prog="python -m support.job",
        description=GUIDE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(required=True, metavar="command")
    everything = (Subject, Question, Damping)
    for name, run, meaning, settings in (
        ("plan", _plan, "what the job will cost on this machine", (Subject, Question)),
        ("run", _steps(_ask, _fit, _score, _self), "fit, score and self in one go", everything),
        ("fit", _steps(_fit), "the curvature of the model", (Subject,)),
        ("score", _steps(_score), "influence of all training examples", everything),
        ("self", _steps(_self), "influence of each one on itself", (Subject, Damping)),
        ("top", _top, "the strongest training examples, to read", ()),
        ("show", _show, "what a store knows, and how far it is", ()),
    ):
        command = commands.add_parser(name, help=meaning, description=f"{meaning.capitalize()}.")
        command.set_defaults(run=run)
        command.add_argument("--store", required=True, metavar="FOLDER", help="the job's results")
        for one in settings:
            add_options(command, one)
        if Question in settings:
            command.add_argument(
                "--query-block", type=int, metavar="…", help="queries at a time (as many as fit)"
            )
        if name in ("run", "fit", "score", "self"):
            _add_seconds(command, saves=name in ("run", "fit"))
        if name == "top":
            _add_top(command)
    _add_fleet(commands)
    return whole


def _add_seconds(command: ArgumentParser, saves: bool) -> None:
    command.add_argument(
        "--tell-seconds",
        type=float,
        default=60.0,
        metavar="…",
        help="between two lines of a log (60)",
    )
    if saves:
        meaning = "between two savings of the fit on its way (60)"
        command.add_argument("--save-seconds", type=float, default=60.0, metavar="…", help=meaning)


def _add_top(command: ArgumentParser) -> None:
    command.add_argument("--count", type=int, default=10, metavar="…", help="how many (10)")
    command.add_argument(
        "--relative", action="store_true", help="scores over √self-influence; needs self"
    )
    command.add_argument(
        "--output", type=Path, metavar="…", help="folder for top.parquet and top.html (the store)"
    )


def _add_fleet(commands: argparse._SubParsersAction) -> None:
    meaning = "what a job would cost on machines that you don't have"
    command = commands.add_parser("fleet", help=meaning, description=f"{meaning.capitalize()}.")
    command.set_defaults(run=_fleet)
    shapes = f"the model: {' or '.join(fleet.SHAPES)} (llama-3-8b)"
    command.add_argument(
        "--shape", choices=fleet.SHAPES, default="llama-3-8b", metavar="…", help=shapes
    )
    for name, kind, default, unit in (
        ("examples", int, 1_000_000, "training examples"),
        ("tokens", int, 512, "tokens of each"),
        ("fit-examples", int, 100_000, "examples that the curvature is fitted on"),
        ("queries", int, 1000, "queries"),
        ("devices", int, 64, "devices"),
        ("teraflops", float, 400.0, "10¹² operations a second that a device sustains"),
        ("memory", float, 80.0, "GB of a device"),
    ):
        command.add_argument(
            f"--{name}", type=kind, default=default, metavar="…", help=f"{unit} ({default:,})"
        )


def _job(chosen: Namespace, team: Team) -> Job:
    for name, least in (("tell_seconds", 1), ("save_seconds", 0), ("query_block", 1)):
        value = getattr(chosen, name, None)
        if value is not None and value < least:
            raise BadSetting(f"--{name.replace('_', '-')} {value}: use {least} or more.")
    return Job(Store(chosen.store), vars(chosen), team)


def _plan(chosen: Namespace, team: Team) -> None:
    job = _job(chosen, team)
    with job.store.claimed(team):
        expected = plan.planned(job)
    if team.rank == 0:
        print(plan.told(job, expected))


Step = Callable[[Job, Namespace], None]


def _steps(*steps: Step) -> Command:
    """A command of steps that write to the store, which is this team's meanwhile."""

    def run(chosen: Namespace, team: Team) -> None:
        job = _job(chosen, team)
        with job.store.claimed(team):
            for step in steps:
                step(job, chosen)

    return run


def _ask(job: Job, chosen: Namespace) -> None:
    job.begin()
    job.ask()


def _fit(job: Job, chosen: Namespace) -> None:
    was_missing = job.fit(chosen.save_seconds, chosen.tell_seconds)
    fitted = f"Fitted on {len(job.fitted_on):,} examples."
    _say(job.team, fitted if was_missing else "It was fitted before.")


def _score(job: Job, chosen: Namespace) -> None:
    job.score(chosen.tell_seconds)
    examples, queries = len(job.training), len(job.queries)
    _say(job.team, f"Scored {examples:,} training examples on {queries:,} queries.")


def _self(job: Job, chosen: Namespace) -> None:
    job.self_influences(chosen.tell_seconds)
    _say(job.team, f"Self-influence of {len(job.training):,} training examples.")


def _say(team: Team, text: str) -> None:
    if team.rank == 0:
        print(text, flush=True)


def _top(chosen: Namespace, team: Team) -> None:
    if team.rank:
        return
    job = _job(chosen, Alone())
    job.store.array("scores")  # before queries are looked for: only `score` says which they are
    job.refuse_other_texts()
    found = strongest(job.store, job.training, job.queries, chosen.count, chosen.relative)
    told = {
        "model": job.subject.model,
        "training examples": f"{len(job.training):,}",
        "regularization": job.damping.regularization,
        "scores": "divided by √self-influence" if chosen.relative else "plain",
    }
    output = chosen.output or job.store.folder
    write_top(output, found, page(found, job.queries, job.class_names, told))
    print(as_text(found))
    print(f"\nTo read: {output / 'top.html'}; as data: {output / 'top.parquet'}")


def _show(chosen: Namespace, team: Team) -> None:
    if team.rank == 0:
        print(shown(Store(chosen.store)))


def _fleet(chosen: Namespace, team: Team) -> None:
    if team.rank:
        return
    shape = fleet.SHAPES[chosen.shape]
    machines = fleet.Fleet(chosen.devices, chosen.teraflops * 1e12, chosen.memory * 1e9)
    on_paper = fleet.on_paper(
        shape, machines, chosen.examples, chosen.tokens, chosen.queries, chosen.fit_examples
    )
    print(
        f"{chosen.shape}: {chosen.examples:,} examples of {chosen.tokens} tokens, {chosen.queries:,} "
        f"queries; {chosen.devices} devices of {chosen.teraflops:g} Tflop/s"
    )
    print(fleet.told(on_paper, shape, machines))

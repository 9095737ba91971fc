"""`python -m experiments`: everything the repository holds about fidelity, made again.

`banks` retrains, about half an hour on two cores for all; `judge` writes the table of scores against
the banks; `tables` writes what compares all banks; `remove` retrains without the reviews that scorers
name, and without single ones. All go on where they were when killed. Adapters have
`python -m experiments.finetune` and `python -m experiments.language_finetune`, the bank of whole models
`python -m experiments.whole_model` and its judge `python -m experiments.whole_judgement`, those of a model
that writes `python -m experiments.language_bank` and `python -m experiments.language_judgement`, the tail's
banks before the engine on the model `python -m experiments.tail_on_model`, λ by its scale
`python -m experiments.damping`, what an index keeps `python -m experiments.index`, the page to
explore influences `python -m experiments.explorer`, notebooks `python -m experiments.collection`, and
Kronfluence's scores `python -m benchmarks.fidelity`.
"""

import argparse

from experiments import judgement, removal, tables
from experiments.bank_making import EXPERIMENTS, make


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    banks = commands.add_parser("banks", help="make banks of retrainings")
    banks.add_argument("names", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; default: all")
    commands.add_parser("judge", help="write the table of scores")
    commands.add_parser("tables", help="write the tables that compare all banks")
    commands.add_parser("remove", help="write the tables of removals")
    chosen = parser.parse_args()
    if chosen.command == "judge":
        judgement.judge_all(progress=True).round(5).to_csv(judgement.JUDGEMENT, index=False)
    elif chosen.command == "tables":
        tables.write_all()
    elif chosen.command == "remove":
        removal.remove_all(progress=True).round(5).to_csv(removal.REMOVAL, index=False)
        removal.removed_one_by_one(progress=True).round(6).to_csv(removal.SINGLE, index=False)
    else:
        unknown = sorted(set(chosen.names) - EXPERIMENTS.keys())
        if unknown:
            parser.error(f"no experiment {unknown}; there are {list(EXPERIMENTS)}")
        for name in chosen.names or EXPERIMENTS:
            make(name, progress=True)


if __name__ == "__main__":
    main()

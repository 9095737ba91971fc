"""`python -m support.fidelity`: everything the repository holds about fidelity, made again.

`banks` retrains, about half an hour on two cores for all; `judge` writes the table of scores against
the banks; `remove` retrains without the reviews that scorers name. All of them go on where they were
when killed.
"""

import argparse

from support.fidelity import removal
from support.fidelity.experiments import COMMITTED, EXPERIMENTS, make
from support.fidelity.judgement import JUDGEMENT, judge_all


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m support.fidelity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    banks = commands.add_parser("banks", help="make banks of retrainings")
    banks.add_argument(
        "names", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; default: all that are committed"
    )
    commands.add_parser("judge", help="write the table of scores")
    commands.add_parser("remove", help="write the table of removals")
    chosen = parser.parse_args()
    if chosen.command == "judge":
        judge_all(progress=True).round(5).to_csv(JUDGEMENT, index=False)
    elif chosen.command == "remove":
        removal.remove_all(progress=True).round(5).to_csv(removal.REMOVAL, index=False)
    else:
        unknown = sorted(set(chosen.names) - EXPERIMENTS.keys())
        if unknown:
            parser.error(f"no experiment {unknown}; there are {list(EXPERIMENTS)}")
        for name in chosen.names or COMMITTED:
            make(name, progress=True)


if __name__ == "__main__":
    main()

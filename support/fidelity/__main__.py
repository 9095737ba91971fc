"""`python -m support.fidelity banks`: retrain for the judge. The committed banks are what it left."""

import argparse

import torch

from support.fidelity.experiments import EXPERIMENTS, make


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m support.fidelity", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    banks = commands.add_parser("banks", help="make banks of retrainings; a killed run goes on")
    banks.add_argument("names", nargs="*", choices=[[], *EXPERIMENTS], help="default: all")
    banks.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    for name in chosen.names or EXPERIMENTS:
        make(name, progress=True)


if __name__ == "__main__":
    main()

"""What is measured: jobs, settings, engines, sizes. Data, no work."""

from dataclasses import asdict, dataclass, replace

BARE, OURS, KRONFLUENCE, PYDVL = "bare", "ours", "kronfluence", "pydvl"
BATCH_SIZE = 8
REGULARIZATION = 1e-5
"""λ, the same for every engine."""

FORWARD, PASSES, FIT, SCORE = "forward", "passes", "fit", "score"
TRAINING_SIDE, SELF, NOTEBOOK, GROWTH = "training side", "self-influence", "5 x 7", "growth"
NEEDS_FIT = (SCORE, TRAINING_SIDE, SELF)
"""Jobs that start from the factors which a fit on `Setting.fitted` reviews left behind."""


@dataclass(frozen=True)
class Setting:
    """Model and reviews, `kept` of either split. `width` None is the packaged model, a number is a random
    DistilBERT of it.

    Reviews are cut at `tokens`; with `exactly`, only reviews that reach that length are taken. `precision` is
    our engine's; Kronfluence gets what says the same to it.
    """

    name: str
    tokens: int = 512
    width: int | None = None
    exactly: bool = False
    fitted: int = 50
    kept: int = 200
    precision: str = "full"


@dataclass(frozen=True)
class Cell:
    """One number to be known: an engine doing a job in a setting."""

    job: str
    setting: Setting
    engine: str
    reviews: int
    queries: int = 0
    repeats: int = 3

    @property
    def name(self) -> str:
        """The cell in words that also identify it: `score | real lengths | ours | 10 x 50`."""
        size = f"{self.queries} x {self.reviews}" if self.queries else f"{self.reviews}"
        return " | ".join([self.job, self.setting.name, self.engine, size])

    def as_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict) -> "Cell":
        return cls(**{**fields, "setting": Setting(**fields["setting"])})


@dataclass(frozen=True)
class Plan:
    """All cells, in the order of one round, and which of them show how cost grows along what."""

    name: str
    cells: list[Cell]
    growth: dict[str, list[Cell]]


def full() -> Plan:
    """Three settings at full size; about half an hour on two cores with nothing else to do."""
    real = Setting("real lengths")
    short = Setting("128 tokens", tokens=128)
    base = Setting("DistilBERT-base size", width=768, fitted=8)
    rough = replace(base, name="DistilBERT-base size, eigenproblems in float32", precision="float32")
    growth = growth_axes(
        reviews=(8, 16, 32, 64), tokens=(64, 128, 256, 512), queries=(4, 16, 64), widths=(192, 384, 768)
    )
    cells = [
        *side_by_side(real, reviews=50, queries=10),
        *side_by_side(short, reviews=50, queries=10, repeats=2),
        *pairwise(real, reviews=200, queries=50, repeats=2),
        *notebook(real, reviews=7, queries=5),
        *side_by_side(base, reviews=8, queries=4, repeats=2),
        *(Cell(FIT, rough, engine, reviews=8, repeats=2) for engine in (OURS, KRONFLUENCE)),
    ]
    return Plan("full", cells + distinct(growth), growth)


def quick() -> Plan:
    """The same jobs at toy size, once: shows that everything runs, not what anything costs."""
    tiny = Setting("96 tokens, width 96", tokens=96, width=96, fitted=4)
    growth = growth_axes(reviews=(2, 4), tokens=(16, 32), queries=(1, 2), widths=(48, 96), usual_width=96)
    cells = [
        *side_by_side(tiny, reviews=4, queries=2, repeats=1),
        # The packaged model and no fewer: from less, pyDVL's eigenproblems in float32 don't converge.
        *notebook(Setting("real lengths"), reviews=4, queries=2, repeats=1),
    ]
    return Plan("quick", cells + distinct(growth), growth)


def side_by_side(setting: Setting, reviews: int, queries: int, repeats: int = 3) -> list[Cell]:
    """Bare passes, then whole fit, pairwise scores and self-influence of ours and Kronfluence."""
    both = (OURS, KRONFLUENCE)
    return [
        Cell(FORWARD, setting, BARE, reviews, repeats=repeats),
        Cell(PASSES, setting, BARE, reviews, repeats=repeats),
        *(Cell(FIT, setting, engine, reviews, repeats=repeats) for engine in both),
        *pairwise(setting, reviews, queries, repeats),
        Cell(TRAINING_SIDE, setting, OURS, reviews, queries, repeats),
        *(Cell(SELF, setting, engine, reviews, repeats=repeats) for engine in both),
    ]


def pairwise(setting: Setting, reviews: int, queries: int, repeats: int) -> list[Cell]:
    """Every review scored for every query, by ours and by Kronfluence."""
    return [Cell(SCORE, setting, engine, reviews, queries, repeats) for engine in (OURS, KRONFLUENCE)]


def notebook(setting: Setting, reviews: int, queries: int, repeats: int = 2) -> list[Cell]:
    """The job of notebook 04 at its small size: fit on the reviews, then all their influences."""
    return [
        Cell(NOTEBOOK, setting, engine, reviews, queries, repeats) for engine in (OURS, KRONFLUENCE, PYDVL)
    ]


def growth_axes(
    reviews: tuple[int, ...],
    tokens: tuple[int, ...],
    queries: tuple[int, ...],
    widths: tuple[int, ...],
    usual_width: int | None = None,
) -> dict[str, list[Cell]]:
    """Cells that differ in one size each; the second size of each axis is the one the others have.

    `usual_width` is that of the axes other than width; None is the packaged model.
    """
    middle = {"reviews": reviews[1], "tokens": tokens[1], "queries": queries[1]}
    middle |= {"width": usual_width}
    return {
        "reviews": [growth_cell(**middle | {"reviews": size}) for size in reviews],
        "length": [growth_cell(**middle | {"tokens": size}) for size in tokens],
        "queries": [growth_cell(**middle | {"queries": size}) for size in queries],
        "width": [growth_cell(**middle | {"width": size}) for size in widths],
    }


def growth_cell(reviews: int, tokens: int, queries: int, width: int | None = None) -> Cell:
    model = f"width {width}, " if width else ""
    setting = Setting(f"{model}{tokens} tokens exactly", tokens, width, exactly=True)
    return Cell(GROWTH, setting, OURS, reviews, queries, repeats=1)


def axis_size(axis: str, cell: Cell) -> int:
    """Where a cell stands on its axis of growth."""
    sizes = {
        "reviews": cell.reviews,
        "length": cell.setting.tokens,
        "queries": cell.queries,
        "width": cell.setting.width,
    }
    return sizes[axis]


def distinct(growth: dict[str, list[Cell]]) -> list[Cell]:
    """The cells of all axes, each once."""
    return list(dict.fromkeys(cell for cells in growth.values() for cell in cells))

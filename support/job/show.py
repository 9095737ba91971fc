"""What a store knows of itself and how far it is."""

import numpy as np

from support.job.errors import StepMissing
from support.job.partial import blocks_in
from support.job.sharding import in_blocks
from support.job.store import Store


def shown(store: Store) -> str:
    """Facts and progress as lines. Raises `StepMissing` when there is no store, and `StoreDamaged`."""
    facts = store.facts()
    lines = [f"{store.folder}"]
    for name, value in facts.items():
        if isinstance(value, dict):
            lines.append(f"{name}:")
            lines += [f"  {key}: {_short(one)}" for key, one in value.items() if one != ""]
        else:
            lines.append(f"{name}: {_short(value)}")
    lines.append("progress:")
    lines += [f"  {name}: {how}" for name, how in progress(store).items()]
    return "\n".join(lines)


def progress(store: Store) -> dict[str, str]:
    """How far each step is, in words. Raises `StoreDamaged`."""
    return {
        "fit": _fitted(store),
        "score": _share(store, "scores"),
        "self": _share(store, "self_influences"),
    }


def _fitted(store: Store) -> str:
    if store.curvature.exists():
        return "done"
    for sums in ("eigenvalues", "covariances"):
        blocks = sum(map(blocks_in, store.partial_fit.glob(f"{sums}-*.safetensors")))
        if blocks:
            return f"{sums} of {blocks} block{'s' if blocks > 1 else ''}"
    return "begun" if store.partial_fit.exists() else "not yet"


def _share(store: Store, name: str) -> str:
    try:
        array = store.array(name)
    except StepMissing:
        return "not yet"
    grids = [in_blocks(size, chunk) for size, chunk in zip(array.shape, array.chunks, strict=True)]
    numbers = np.indices([len(grid) for grid in grids]).reshape(len(grids), -1).T
    places = [
        tuple(slice(grid[n].start, grid[n].stop) for grid, n in zip(grids, number, strict=True))
        for number in numbers
    ]
    done = sum(store.has(name, place) for place in places)
    return "done" if done == len(places) else f"{done} of {len(places)} blocks"


def _short(value: object, longest: int = 90) -> str:
    text = str(value)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"

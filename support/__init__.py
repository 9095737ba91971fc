"""An EK-FAC influence-function engine for any torch model, and what the notebooks are made of.

Names are imported when they are first asked for, so that the engine alone needs torch alone.
"""

import importlib

_HOMES = {
    "EkfacInfluence": "support.ekfac",
    "ImdbDataset": "support.imdb",
    "ModelLogitsWrapper": "support.model",
    "TextInfluence": "support.text_influence",
}
__all__ = ["EkfacInfluence", "ImdbDataset", "ModelLogitsWrapper", "TextInfluence"]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'support' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

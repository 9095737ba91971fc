"""What all figures share: sizes in inches, style, colours, and how they are shown.

Every figure has a white ground of its own, so that it reads the same on light and dark pages.
"""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes

NEGATIVE, POSITIVE, NEUTRAL = "#c44e52", "#4c72b0", "#8c8c8c"
STYLE = {"figure.dpi": 110, "axes.titleweight": "bold", "axes.titlelocation": "left"}


def new_axes(width: float | int, height: float | int, panels: int = 1) -> Axes | np.ndarray:
    """Axes of that size in inches, in the collection's style; an array of them for several panels."""
    sns.set_theme("paper", "ticks", rc=STYLE)
    _, axes = plt.subplots(1, panels, figsize=(width, height), layout="constrained")
    return axes


def show(axes: Axes | np.ndarray) -> None:
    """Show the figure, without the frames that say nothing."""
    for one in np.atleast_1d(axes):
        sns.despine(ax=one)
    plt.show()

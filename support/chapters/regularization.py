"""Appendix: how rankings at neighbouring λ agree, and where λ lies in the spectrum. Figures only."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn as sns

from support.chapters.figures import NEGATIVE, NEUTRAL, POSITIVE, name_beside, new_axes, show


def neighbour_correlations(table: pd.DataFrame, title: str) -> None:
    """Rank correlations of the influences at neighbouring λ: layers by pairs of λ."""
    axes = new_axes(7.6, 4.6)
    looks = {"annot": True, "fmt": ".2f", "annot_kws": {"fontsize": 7}, "cbar": False}
    sns.heatmap(table, ax=axes, linewidths=0.3, vmin=0, vmax=1, cmap="Blues", **looks)
    axes.tick_params(axis="x", rotation=45)
    show(axes, title=title, xlabel="a value of λ → the next", ylabel="layer, from input to output")


def spectra(eigenvalues: Mapping[str, np.ndarray], regularizations: Mapping[str, float], title: str) -> None:
    """Corrected eigenvalues of each layer from the largest to the smallest, and named λ across them."""
    axes = new_axes(7.6, 4.4)
    colors = sns.color_palette("turbo", -(-len(eigenvalues) // 2))
    for number, (name, values) in enumerate(eigenvalues.items()):
        ranked = np.sort(values.ravel())[::-1]
        places = np.unique(np.geomspace(1, len(ranked), 400).astype(int)) - 1
        pair = {"color": colors[number // 2], "linestyle": "-:"[number % 2]}  # two layers in each block
        axes.plot(places + 1, ranked[places], linewidth=1.2, label=name, **pair)
    for place, name in enumerate(sorted(regularizations, key=regularizations.get)):
        value, color = regularizations[name], (NEGATIVE, NEUTRAL, POSITIVE)[place % 3]
        axes.axhline(value, color=color, linestyle="--", linewidth=1)
        # The lowest name hangs below its line, so that the next has room above it.
        name_beside(axes, name, value, color=color, fontsize=8, va="bottom" if place else "top")
    axes.set(xscale="log", yscale="log", ylim=(1e-16, None))
    axes.figure.legend(fontsize=7, ncols=5, loc="outside lower center")
    show(axes, title=title, xlabel="eigenvalue, by rank", ylabel="corrected eigenvalue Λ")

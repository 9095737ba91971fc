"""03: what is asked of the model, in words and bars: predictions, layers, parameters, padding."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from support.chapters.figures import NEGATIVE, NEUTRAL, POSITIVE, new_axes, show
from support.model import LABELS, ModelLogitsWrapper


def print_sentiment_preds(model: ModelLogitsWrapper, model_input: Tensor, true_label: int | Tensor) -> None:
    """Print both probabilities and the true label of one review, `(tokens,)` or `(1, tokens)`, in words."""
    with torch.inference_mode():
        negative, positive = model(model_input.reshape(1, -1)).softmax(dim=1)[0].tolist()
    print(f"positive {positive:6.1%}   negative {negative:6.1%}   true label: {LABELS[int(true_label)]}")


def strip_layer_names(names: Iterable[str]) -> list[str]:
    """Layer or parameter names without the parts that all share, so that a plot has room for them."""
    return [name.removeprefix("model.").removeprefix("distilbert.transformer.") for name in names]


def parameter_shares(frozen: dict[str, int], tracked: dict[str, int], title: str) -> None:
    """Parameters of each part of the model in millions: those with gradients and those without."""
    axes = new_axes(7, 2.8)
    parts = list(dict.fromkeys([*frozen, *tracked]))
    below, above = ([counts.get(part, 0) / 1e6 for part in parts] for counts in (frozen, tracked))
    axes.bar(parts, below, color=NEUTRAL, label="frozen")
    bars = axes.bar(parts, above, bottom=below, color=POSITIVE, label="with gradients")
    axes.bar_label(bars, [f"{low + high:.2g}" for low, high in zip(below, above, strict=True)], padding=2)
    axes.set_ylim(0, 1.2 * max(low + high for low, high in zip(below, above, strict=True)))
    axes.legend()
    show(axes, title=title, ylabel="million parameters")


def padding(lengths: Sequence[int], batch_size: int, longest: int, title: str) -> None:
    """Tokens read with every review padded to `longest`, to its batch in two orders, or not at all."""
    axes = new_axes(7, 2.2)
    totals = {
        f"all padded to {longest}": longest * len(lengths),
        "per batch, random order": _tokens_read(lengths, batch_size),
        "per batch, similar lengths": _tokens_read(sorted(lengths), batch_size),
        "real tokens": sum(lengths),
    }
    bars = axes.barh(list(totals), totals.values(), color=[NEGATIVE, POSITIVE, POSITIVE, NEUTRAL])
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.12)
    show(axes, title=title, xlabel=f"tokens read for {len(lengths)} reviews")


def _tokens_read(lengths: Sequence[int], batch_size: int) -> int:
    return sum(len(batch) * batch.max().item() for batch in torch.tensor(lengths).split(batch_size))

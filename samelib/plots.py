"""The book's figures: few kinds, one style, readable in grey and by the colour-blind."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from sklearn.metrics import roc_curve
from torch import Tensor

from samelib.data.image_set import to_float
from samelib.metrics import mean_interval
from samelib.models.mae import patchify, unpatchify

# Okabe and Ito's colours, dark to light, each with a line and a hatch of its own so that grey print keeps them apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
HATCHES = ("", "///", "...", "xx", "\\\\\\", "++")


def use_style() -> None:
    """Sets matplotlib's defaults for the book."""
    plt.rcParams.update({
        "figure.dpi": 110, "figure.constrained_layout.use": True, "font.size": 11, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False,
        "axes.prop_cycle": plt.cycler(color=COLOURS) + plt.cycler(linestyle=LINES),
        "figure.facecolor": "white", "savefig.facecolor": "white",
    })  # fmt: skip


def array(values: ArrayLike | Tensor) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def picture(image: Tensor) -> np.ndarray:
    """uint8 [C, H, W] or float in [-1, 1] -> what imshow wants, [H, W] or [H, W, 3] in 0..1."""
    image = image.detach().cpu()
    image = image.float() / 255 if image.dtype == torch.uint8 else ((image.float() + 1) / 2).clamp(0, 1)
    return image[0].numpy() if image.shape[0] == 1 else image.permute(1, 2, 0).numpy()


def image_rows(rows: dict[str, Tensor], size: float = 0.75) -> Figure:
    """One labelled row of pictures [n, C, H, W] for each entry."""
    columns = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(len(rows), columns, figsize=(size * columns + 1.2, size * len(rows)), squeeze=False)
    for line, (title, images) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
        for axis, image in zip(line, images, strict=False):
            axis.imshow(picture(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=10)
    return figure


def histograms(
    axis: Axes,
    scores: dict[str, Tensor],
    bins: int = 50,
    log: bool = False,
    threshold: float | None = None,
    label: str = "anomaly score",
) -> None:
    """Overlaid densities of scores, one colour and hatch each; the outermost bins hold the last 0.2 % of each tail."""
    arrays = {name: array(s) for name, s in scores.items()}
    everything = np.concatenate(list(arrays.values()))
    low, high = np.quantile(everything[everything > 0] if log else everything, [0.002, 0.998])
    edges = np.geomspace(low, high, bins) if log else np.linspace(low, high, bins)
    for (name, values), colour, hatch in zip(arrays.items(), COLOURS, HATCHES, strict=False):
        weights = np.full(len(values), 1 / len(values))
        axis.hist(
            values.clip(edges[0], edges[-1]), edges, weights=weights, alpha=0.45, color=colour, hatch=hatch, label=name,
            edgecolor=colour, histtype="stepfilled",
        )  # fmt: skip
    if log:
        axis.set_xscale("log")
    if threshold is not None:
        axis.axvline(threshold, color="black", linestyle=":", label="threshold")
    axis.set(xlabel=label, ylabel="share of queries")
    axis.legend()


def roc_curves(axis: Axes, benign: Tensor, malicious: dict[str, Tensor]) -> None:
    """Step ROC curves of several attacks against the same benign queries."""
    for name, scores in malicious.items():
        labels = np.r_[np.zeros(len(benign)), np.ones(len(scores))]
        fpr, tpr, _ = roc_curve(labels, np.r_[array(benign), array(scores)], drop_intermediate=False)
        axis.step(fpr, tpr, where="post", label=name)
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="-")
    axis.set(xlabel="benign queries flagged", ylabel="malicious queries caught", xlim=(0, 1), ylim=(0, 1.01))
    axis.set_aspect("equal")
    axis.legend(loc="lower right")


def bars(axis: Axes, values: dict[str, float], errors: Sequence[float] | None = None, unit: str = "%") -> None:
    """Horizontal bars with their values written beside them."""
    names = list(values)
    axis.barh(names, list(values.values()), xerr=errors, color=COLOURS[0], alpha=0.8, height=0.6)
    for row, value in enumerate(values.values()):
        axis.text(value, row, f" {value:.1f}{unit}", va="center", fontsize=10)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)


def grouped_bars(
    axis: Axes, groups: dict[str, str], series: dict[str, Callable[[str], list[float]]], chance: float | None = 50
) -> None:
    """AUROC in percent, with 95 % intervals over seeds: for each group of bars (key: name), one bar of each series.

    `chance` is where a dotted line stands; None for none.
    """
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        means, halves = zip(*(mean_interval([100 * v for v in values(g)] or [np.nan]) for g in groups), strict=True)
        place = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        style = {"color": COLOURS[i], "hatch": HATCHES[i], "edgecolor": "white", "alpha": 0.85}
        axis.bar(place, means, width * 0.92, yerr=halves, capsize=2, label=name, **style)
    if chance is not None:
        axis.axhline(chance, color="black", linewidth=0.8, linestyle=":")
    axis.set_xticks(np.arange(len(groups)), list(groups.values()))
    axis.set(ylabel="AUROC (%)", ylim=(0, 105))
    axis.grid(axis="x", visible=False)


def legend_above(figure: Figure) -> Figure:
    """One legend above all panels, and one label for the axis that they share."""
    names = figure.axes[0].get_legend_handles_labels()
    figure.legend(*names, ncols=len(names[1]), loc="outside upper center")
    for axis in figure.axes:
        axis.label_outer()
    return figure


def detection_rows(detector, queries: dict[str, Tensor], count: int = 4) -> Figure:
    """How SAME sees queries: each as it came, half hidden, redrawn, where that went wrong, and its p-value.

    Args:
        detector: a fitted `SameDetector`.
        queries: images [N, C, H, W] of each kind, by name; the first `count` are shown, side by side.
    """
    mae = detector.mae
    noise = torch.rand(1, mae.tokens, generator=torch.Generator().manual_seed(0)).to(mae.mask_token.device)
    figure, axes = plt.subplots(4, count * len(queries), figsize=(0.8 * count * len(queries) + 1.2, 3.6), squeeze=False)
    for column, (name, images) in enumerate(queries.items()):
        x = to_float(images[:count]) if images.dtype == torch.uint8 else images[:count]
        x = x.to(noise.device)
        redrawn, mask = mae(x, noise.expand(len(x), -1))
        hidden = mask[:, :, None].expand(-1, -1, patchify(x, mae.settings.patch).shape[2])
        hidden = unpatchify(hidden, mae.settings.patch, mae.image_shape)
        stages = (x, torch.where(hidden > 0, 0.0, x), redrawn, (x - redrawn).abs() - 1)
        for row, pictures in enumerate(stages):
            for axis, image in zip(axes[row, column * count :], pictures, strict=False):
                axis.imshow(picture(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        for axis, p in zip(axes[0, column * count :], detector.p_value(x).tolist(), strict=False):
            axis.set_title(f"p = {p:.3f}", fontsize=8)
        axes[-1, column * count].set_xlabel(name, loc="left")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
    for axis, title in zip(axes[:, 0], ("query", "what is left visible", "redrawn", "error"), strict=True):
        axis.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=10)
    return figure


def flow(
    axis: Axes,
    boxes: dict[str, tuple[float, float, str, str]],
    arrows: Iterable[tuple[str, str]],
    compared: Iterable[tuple[str, str]] = (),
) -> None:
    """A flow diagram: boxes (column, row, text, colour) by name, arrows between them, dashed ones where two are compared."""
    frames = {}
    for name, (column, row, text, colour) in boxes.items():
        look = {"boxstyle": "round,pad=0.5", "facecolor": colour, "edgecolor": "black"}
        label = axis.text(column, row, text, ha="center", va="center", fontsize=10, bbox=look)
        frames[name] = label.get_bbox_patch()
    dashed = {"arrowstyle": "<->", "color": COLOURS[1], "linestyle": "--"}
    for pairs, look in ((arrows, {"arrowstyle": "-|>", "color": "black"}), (compared, dashed)):
        for start, end in pairs:
            arrow = look | {"patchA": frames[start], "patchB": frames[end]}
            axis.annotate("", xy=boxes[end][:2], xytext=boxes[start][:2], arrowprops=arrow)
    axis.axis("off")


class Slider:
    """Figures drawn beforehand, one for each position of a slider, each with its caption.

    What a notebook's cell ends with is shown by `_repr_html_`: there, in Colab and on a page that has no kernel.

    Args:
        name: what the slider moves.
        frames: (figure, caption) from left to right; the figures are drawn and closed.
        start: the position shown first.
    """

    def __init__(self, name: str, frames: Iterable[tuple[Figure, str]], start: int = 0):
        self.name, self.start = name, start
        self.frames = [(_png(figure), caption) for figure, caption in frames]

    def _repr_html_(self) -> str:
        show = "this.closest('div').querySelectorAll('figure').forEach((f, i) => f.style.display = i == this.value ? '' : 'none')"
        parts = [
            f'<label>{html.escape(self.name)} <input type="range" min="0" max="{len(self.frames) - 1}" '
            f'value="{self.start}" oninput="{html.escape(show)}" style="width: 60%"></label>'
        ]
        for i, (png, caption) in enumerate(self.frames):
            hidden = "" if i == self.start else ' style="display: none"'
            text = html.escape(caption)
            image = f'<img alt="{text}" src="data:image/png;base64,{png}">'
            parts.append(f"<figure{hidden}>{image}<figcaption>{text}</figcaption></figure>")
        return f"<div>{''.join(parts)}</div>"


def _png(figure: Figure) -> str:
    """A figure as base64 text."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    plt.close(figure)
    return base64.b64encode(file.getvalue()).decode()

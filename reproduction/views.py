"""SamePlus: what each of its views is worth, and how detection grows with the images that the autoencoder has seen."""

from collections.abc import Callable

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from reproduction.detection import LABELS, SHORT, detected, papers_table
from reproduction.plan import EVERY_VIEW, SAME, SAME_MASK_0, SAME_PLUS, VIT_TINY, DetectorVariant, image_shape_of
from reproduction.tables import markdown, select, spread
from samelib.detectors.same_plus import CHOSEN, picture_kind
from samelib.detectors.views import COMBINATIONS, VIEWS
from samelib.plots import COLOURS, LINES, legend_above

KINDS = (*LABELS[:2], "outliers")  # the rows hold the other readings too
SERIES = {  # of the scaling curve: a detector, and which of its scores
    "SAME, masked passes": (SAME, {}),
    "SAME, mask 0": (SAME_MASK_0, {}),
    "SamePlus": (SAME_PLUS, {}),
    "its view trace": (SAME_PLUS, {"view": "trace"}),
}


def views_table(frame: pd.DataFrame) -> str:
    """SAME, each view, and the three ways to combine those that were chosen: AUROC, and at a rate of 5 % set on
    calibration images the share caught; last the share of benign queries flagged then. In percent."""

    def line(name: str, rows: Callable[[str], pd.DataFrame]) -> list[str]:
        cells = [f"{spread(rows(kind)['auroc'])} / {spread(rows(kind)['tpr_at_5%'])}" for kind in KINDS]
        return [name, *cells, spread(rows(KINDS[-1])["fpr_at_5%"])]

    chosen = CHOSEN[picture_kind(image_shape_of(frame["group"].iloc[0]))]
    measured = set(frame["view"])  # of older rows some views are missing
    lines = [line("SAME", lambda kind: detected(frame, SAME, kind))]
    for view in (*(v for v in VIEWS if v in measured), *COMBINATIONS):
        words = f"{view} of the chosen" if view in COMBINATIONS else f"{view} (chosen)" if view in chosen else view
        lines.append(line(words, lambda kind, view=view: detected(frame, EVERY_VIEW, kind, view=view)))
    return markdown(["score", *KINDS, "benign flagged"], lines)


def scaled(frame: pd.DataFrame, detector: DetectorVariant, label: str, autoencoder: str | None = None, **how):
    """AUROC in percent over the images that the autoencoder has seen: a row a seed, a column a number of images."""
    points = {}
    for seen in sorted(select(frame, autoencoder=autoencoder)["seen"].dropna().unique()):
        variant = detector._replace(autoencoder=autoencoder, seen=seen)
        points[int(seen)] = 100 * detected(frame, variant, label, **how).set_index("seed")["auroc"]
    return pd.DataFrame(points)


def scaling_table(frame: pd.DataFrame) -> str:
    """AUROC of SAME and SamePlus by autoencoder and images seen, in percent, mean and 95 % interval over seeds."""
    lines = []
    for autoencoder in (None, *frame["autoencoder"].dropna().unique()):
        for seen in sorted(select(frame, autoencoder=autoencoder)["seen"].dropna().unique()):
            for name, (detector, how) in SERIES.items():
                variant = detector._replace(autoencoder=autoencoder, seen=seen)
                rows = [detected(frame, variant, label, **how)["auroc"] for label in LABELS[:-1]]
                lines.append([autoencoder or "the tier's", f"{seen:,.0f}", name, *map(spread, rows)])
    return markdown(["autoencoder", "images seen", "detector", *LABELS[:-1]], lines, 3)


def scaling_figure(frame: pd.DataFrame) -> Figure:
    """AUROC on Knockoff and both readings of JBDA over the images that the autoencoder has seen; a dot is a seed, a star
    one of SAME with a ViT-Tiny, the dotted line the paper's figure."""
    labels, table = LABELS[:-1], papers_table(frame)
    figure, axes = plt.subplots(1, len(labels), figsize=(9, 3.6), sharey=True)
    for axis, label in zip(axes, labels, strict=True):
        for number, (name, (detector, how)) in enumerate(SERIES.items()):
            points = scaled(frame, detector, label, **how)
            axis.plot(points.columns, points.mean(), color=COLOURS[number], linestyle=LINES[number], label=name)
            for seen, values in points.items():
                axis.plot([seen] * len(values), values, ".", color=COLOURS[number], markersize=4)
        tiny = scaled(frame, SAME, label, VIT_TINY).melt().dropna()
        if len(tiny):
            axis.plot(*tiny.to_numpy().T, "*", color="black", label="ViT-Tiny")
        if table is not None:
            names = {"method": "same", "attack": label.split(",")[0], "budget": 4_000}
            paper = select(table, **names)["auroc"]
            axis.axhline(float(paper.iloc[0]), color="black", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", title=SHORT[label].replace("\n", " "), xlabel="images seen in training", ylim=(40, 101))
    axes[0].set_ylabel("AUROC (%)")
    return legend_above(figure)

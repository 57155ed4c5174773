"""What parts of SAME are worth: the embedding size (Figure 7), the shared trunk, each fault of the released code."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from reproduction.author_code import ALL_FAULTS, FAULTS
from reproduction.cost import costs
from reproduction.detection import LABELS, METRICS, SHORT, aurocs, band, detected
from reproduction.plan import SAME, SAME_MASK_0, SAME_SHARED, DetectorVariant, budgets_of, preset_of, width_variant
from reproduction.tables import change, markdown, select, spread


def widths_of(frame: pd.DataFrame) -> dict[int, DetectorVariant]:
    """The embedding sizes that were measured, the smallest first, each with its detector."""
    own = preset_of(frame["group"].iloc[0], frame["tier"].iloc[0]).same.mae.width
    widths = {int(width) for width in frame["width"].dropna()} | {own}
    return {width: width_variant(width, own) for width in sorted(widths)}


def width_table(frame: pd.DataFrame) -> str:
    """Figure 7 in figures: SAME-X by the autoencoder's embedding size."""
    lines = [[width, *aurocs(frame, detector, alpha=1.0)] for width, detector in widths_of(frame).items()]
    return markdown(["embedding size (reconstruction error alone)", *LABELS], lines)


def figure7(frame: pd.DataFrame) -> Figure:
    """AUROC of the reconstruction error alone, by the autoencoder's embedding size."""
    figure, widths = plt.figure(figsize=(6.5, 3.6)), widths_of(frame)
    axis = figure.subplots()
    for number, label in enumerate(LABELS):
        columns = [detected(frame, d, label, alpha=1.0).set_index("seed")["auroc"] for d in widths.values()]
        seeds = pd.concat(columns, axis=1, join="inner")
        if len(seeds):
            band(axis, list(widths), 100 * seeds.to_numpy(), SHORT[label].replace("\n", " "), number)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(widths), [str(width) for width in widths])
    axis.set(xlabel="embedding size", ylabel="AUROC of SAME-X (%)", ylim=(0, 105))
    axis.legend()
    return figure


def sharing_table(frame: pd.DataFrame) -> str:
    """The auxiliary model on the victim's frozen trunk, or on one of its own: parameters, accuracy, AUROC."""
    lines = []
    for detector, name in ((SAME, "a network of its own"), (SAME_SHARED, "the victim's trunk")):
        cost = costs(frame, detector)
        size = f"{cost['auxiliary_parameters'].iloc[0]:,.0f}" if len(cost) else "–"
        accuracy = spread(cost["victim_accuracy"]) if len(cost) else "–"
        lines.append([name, size, accuracy, *aurocs(frame, detector)])
    return markdown(["auxiliary model", "parameters", "victim's accuracy", *LABELS], lines)


AUDIT_METRICS = METRICS | {"tpr_at_5%": "TPR at 5 %"}


def audited(frame: pd.DataFrame, fault: str, label: str) -> pd.DataFrame:
    """One row a seed, indexed by it: SAME at mask 0 with that fault ("none": without any), at its own alpha."""
    detector = SAME_MASK_0._replace(fault=fault)
    names = {"experiment": "detection", "label": label, "budget": budgets_of(frame)[1]}
    rows = select(frame, **names, **detector._asdict())
    return rows[rows["alpha"].isin((0.5, 0.99))].set_index("seed")


def audit_table(frame: pd.DataFrame, label: str = "knockoff") -> str:
    """Each fault of the released code alone, against SAME at mask 0 without it: change in percentage points, paired by
    seed. The first line holds the figures without any."""
    sound = audited(frame, "none", label)
    lines = [["none", *(spread(sound[metric]) for metric in AUDIT_METRICS)]]
    for fault in (ALL_FAULTS, *FAULTS):
        rows = audited(frame, fault, label)
        lines.append([fault, *(change((rows[metric] - sound[metric]).dropna()) for metric in AUDIT_METRICS)])
    return markdown(["fault", *AUDIT_METRICS.values()], lines)

"""Table 3: what a defence costs before the first query, in training, parameters and the victim's accuracy."""

from collections.abc import Iterator

import pandas as pd
from torch import nn

from reproduction.lab import WITH_OWN_VICTIM, Bench
from reproduction.plan import BASELINES, SAME, STEMS, Cell
from reproduction.rows import reported
from reproduction.tables import markdown, select, spread

PARTS = ("victim", "auxiliary", "mae")


def measure(bench: Bench, cell: Cell) -> Iterator[dict]:
    """Seconds of a defence's trainings (alone or beside others, as the grid was run), the victim's accuracy, and
    parameters beyond those of one victim."""
    victim, card = bench.undefended
    reading = {"parameters": 0}
    if cell.detector.architecture:
        victim, card = bench.victim_of(cell.detector.architecture)
    elif cell.detector.detector in WITH_OWN_VICTIM:
        detector = bench.detector(cell.detector)
        reading["parameters"] = _size(detector.victim.model) - _size(victim.model)
        victim, card = detector.victim, detector.cards["victim"]
    else:
        detector = bench.detector(cell.detector)
        reading |= {f"{name}_seconds": detector.cards[name]["seconds"] for name in PARTS[1:]}
        reading |= {f"{name}_parameters": _size(getattr(detector, name)) for name in PARTS[1:]}
        reading["parameters"] = reading["mae_parameters"] + reading["auxiliary_parameters"]
    yield {"victim_accuracy": bench.accuracy(victim), "victim_seconds": card["seconds"]} | reading


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def costs(frame: pd.DataFrame, detector=SAME) -> pd.DataFrame:
    """The cost of one defence, a row a seed; with `seconds`: of all its parts."""
    rows = select(frame, experiment="cost", **detector._asdict())
    return rows.assign(seconds=rows.reindex(columns=[f"{part}_seconds" for part in PARTS]).sum(axis=1))


def cost_table(frame: pd.DataFrame) -> str:
    """The paper's Table 3: the victim's accuracy and seconds of training under each defence, SAME's by their parts."""
    lines = []
    for name, detector in {"OE": BASELINES[0], "EDM": BASELINES[1], "SAME": SAME, **{str(s): s for s in STEMS}}.items():
        rows = costs(frame, detector)
        if rows.empty and detector in STEMS:
            continue
        columns = [*(f"{part}_seconds" for part in PARTS), "seconds"]
        seconds = [
            f"{rows.get(c, pd.Series(0.0, rows.index)).fillna(0).mean():.0f}" if len(rows) else "–" for c in columns
        ]
        parameters = f"{rows.parameters.iloc[0]:,.0f}" if len(rows) else "–"
        paper = reported("table3_cifar10", method=str(detector)).to_dict("records")
        theirs = [f"{row['accuracy']:.1f}" for row in paper] + [f"{row['training_seconds']:,.0f}" for row in paper]
        accuracy = spread(rows["victim_accuracy"]) if len(rows) else "–"
        lines.append([name, accuracy, *seconds, parameters, *(theirs or ["", ""])])
    header = ["defence", "accuracy", "victim, s", "auxiliary, s", "autoencoder, s", "in all, s", "more parameters"]
    return markdown([*header, "paper: accuracy (CIFAR-10)", "paper: s"], lines)

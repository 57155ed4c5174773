"""What every table is made of: choosing rows, means with their spread over seeds, Markdown."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from samelib.metrics import mean_interval


def select(frame: pd.DataFrame, **fields) -> pd.DataFrame:
    """The rows whose fields have these values; None: the rows that have no such value."""
    for name, value in fields.items():
        column = frame.get(name, pd.Series(np.nan, frame.index))
        frame = frame[column.isna() if value is None else column == value]
    return frame


def spread(values: Iterable[float]) -> str:
    """Mean and half width of the 95 % interval over seeds, of fractions, in percent: "81.3 ± 0.9"."""
    values = [100 * v for v in values]
    if not values or np.isnan(values).any():
        return "–"
    mean, half = mean_interval(values)
    return f"{mean:.1f}" if np.isnan(half) else f"{mean:.1f} ± {half:.1f}"


def change(values: Iterable[float]) -> str:
    """Like `spread`, of differences: with their sign."""
    text = spread(values)
    return text.replace("-0.0", "+0.0") if text.startswith(("-", "–")) else f"+{text}"


class Table(str):
    """Markdown that a notebook draws where it is what a cell ends with."""

    def _repr_markdown_(self) -> str:
        return str(self)


def markdown(header: Sequence[str], lines: Iterable[Sequence], words: int = 1) -> Table:
    """A table whose first `words` columns are text, the others figures."""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return Table("\n".join("| " + " | ".join(map(str, line)) + " |" for line in [header, rule, *lines]))

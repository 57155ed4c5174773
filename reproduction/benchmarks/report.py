"""The book's page of measured speed: models, detectors, attacks, and the service under load.

`python -m reproduction.benchmarks.report` prints it. The other files of this folder measure its rows again.
"""

import pandas as pd

from reproduction.rows import RESULTS, load_cells
from reproduction.tables import markdown

PAGE = """\
# Speed, service, soak

Every number on this page comes from a row of `reproduction/results/benchmarks.jsonl`, which says when and on which kind
of machine it was measured ({machines}). The programs in `reproduction/benchmarks/` measure them again.

## Models, detectors, attacks

The reference is the same autoencoder written the plain way, in float32, with masks shuffled sample by sample. Both took
turns in one run; brackets hold the lowest and the highest ratio of its pairs. The ceiling is this machine's own product
of two large matrices. These rows were measured in bfloat16, on a processor where that pays. On one where it does not,
`samelib` computes in float32 too, and most of that lead is gone.

{models}

A detector's time is compared with the victim's own. The growth of memory is from the first thousands of queries to the
last.

{detectors}

An attack's time holds its queries and all its training. Its growth is the exponent e in time ~ budget^e, from the
smallest to the largest budget.

{attacks}

## The service under load

The prediction service is asked by {clients} client processes that share its cores. Each sends its next query when it has
the answer to the last. The first table compares detection with the service alone, lecture tier, in one run of several
turns; brackets hold the lowest and the highest ratio of a turn. With proof of work, a query is two requests with the
client's hashes between them.

{loads}

**Beside a victim as small as this one (three convolutions), detection takes most of the time**: eight passes of the
autoencoder for each query, whatever the victim is.

## Long runs and stops

The smoke tier's detector, while the machine had other work too. Every answer of the long run was compared with the
victim's own.

{soaks}

Then the service was told to stop while clients were asking. No request that it had accepted may be lost.

{stops}
"""


def page() -> str:
    """The page as Markdown."""
    rows = pd.DataFrame(load_cells(RESULTS / "benchmarks.jsonl"))
    service = rows[rows["benchmark"].str.startswith("service: ")]
    return PAGE.format(
        machines="; ".join(sorted(rows["device"].unique())),
        clients=f"{service['clients'].max():.0f}",
        models=models_table(rows),
        detectors=detectors_table(rows),
        attacks=attacks_table(rows),
        loads=loads_table(service),
        soaks=soaks_table(service),
        stops=stops_table(service),
    )


def models_table(rows: pd.DataFrame) -> str:
    """Speed of the autoencoder beside the plain reference."""
    rows = rows.dropna(subset="ratio_to_reference")
    return table(
        {
            "masked autoencoder": rows["benchmark"],
            "images/s": rows["images_per_second"].map("{:,.0f}".format),
            "times the reference": ratios(rows, "ratio_to_reference", 1),
            "of the matrix ceiling": rows["share_of_matrix_ceiling"].map("{:.0%}".format),
        }
    )


def detectors_table(rows: pd.DataFrame) -> str:
    """Speed and memory of detection beside the victim alone."""
    rows = rows.dropna(subset="queries")
    return table(
        {
            "detector": rows["benchmark"],
            "queries": rows["queries"].map("{:,.0f}".format),
            "queries/s": rows["queries_per_second"].map("{:,.0f}".format),
            "victim's time = 1": rows["times_the_victim"].map("{:.1f}".format, na_action="ignore"),
            "growth of memory": rows["growth_mib"].map("{:.0f} MiB".format),
        }
    )


def attacks_table(rows: pd.DataFrame) -> str:
    """Speed of the attacks and how their time grows with the budget."""
    rows = rows.dropna(subset="attack")
    return table(
        {
            "attack": rows["attack"],
            "budget": rows["budget"].map("{:,.0f}".format),
            "queries/s": rows["queries_per_second"].map("{:,.0f}".format),
            "victim's time = 1": rows["times_the_victim"].map("{:.1f}".format),
            "growth": rows["growth"].map("{:.2f}".format, na_action="ignore"),
        }
    )


def loads_table(rows: pd.DataFrame) -> str:
    """The service under load beside itself without detection."""
    rows = rows.dropna(subset="ratio_to_off")
    return table(
        {
            "service": short(rows),
            "queries/s": rows["queries_per_second"].map("{:,.0f}".format),
            "detection off = 1": ratios(rows, "ratio_to_off", 2),
            "p50, ms": rows["p50_ms"].map("{:.1f}".format),
            "p99, ms": rows["p99_ms"].map("{:.1f}".format),
            "its own ms a query": rows["service_cpu_ms"].map("{:.1f}".format),
        }
    )


def soaks_table(rows: pd.DataFrame) -> str:
    """A long run whose every answer was checked."""
    rows = rows.dropna(subset="requests")
    counts = ("requests", "answered", "refused", "wrong", "lost")
    return table(
        {
            "soak": short(rows).str.removeprefix("soak, "),
            **{count: rows[count].map("{:,.0f}".format) for count in counts},
            "held": rows["resident_mib"].map("{:,.0f} MiB".format),
            "growth": rows["growth_mib"].map("{:,.0f} MiB".format),
            "stamps spent": rows["stamps_spent"].map("{:,.0f}".format),
            "twice": rows["spent_twice"].map("{:.0f}".format),
        }
    )


def stops_table(rows: pd.DataFrame) -> str:
    """Stops under load."""
    rows = rows.dropna(subset="stops")
    return table(
        {
            "SIGTERM under load, times": rows["stops"].map("{:.0f}".format),
            "requests accepted": rows["accepted"].map("{:,.0f}".format),
            "answered": rows["answered"].map("{:,.0f}".format),
            "lost": rows["lost"].map("{:,.0f}".format),
        }
    )


def short(rows: pd.DataFrame) -> pd.Series:
    """What a row of the service measured."""
    return rows["benchmark"].str.removeprefix("service: ")


def ratios(rows: pd.DataFrame, name: str, digits: int) -> pd.Series:
    """A ratio with its lowest and highest value: "3.2 (3.0 to 3.4)"."""
    middle, low, high = (rows[n].map(f"{{:.{digits}f}}".format) for n in (name, "ratio_min", "ratio_max"))
    return middle + " (" + low + " to " + high + ")"


def table(columns: dict[str, pd.Series]) -> str:
    """Columns by their headings, the first of words, as Markdown; what was not measured stays empty."""
    return markdown(list(columns), pd.DataFrame(columns).fillna("").values)


if __name__ == "__main__":
    print(page(), end="")

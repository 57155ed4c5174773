"""The tables of README.md, from result rows: `python -m samelib.experiments.readme` prints them."""

from samelib.experiments.report import cost_table, grid_rows, markdown, summary_table
from samelib.experiments.results import load_rows


def readme_tables() -> list[str]:
    """In the order in which they stand there."""
    rows = grid_rows("mnist", "lecture")
    return [summary_table(rows), cost_table(rows), benchmark_tables()]


def benchmark_tables() -> str:
    """Speed of the autoencoder beside the plain reference, and of detector and attacks beside the victim alone."""
    rows = load_rows("benchmarks")
    models, detectors, attacks = [], [], []
    for row in rows:
        if "ratio_to_reference" in row:
            ratio = f"{row['ratio_to_reference']:.1f} ({row['ratio_min']:.1f} to {row['ratio_max']:.1f})"
            speed, share = f"{row['images_per_second']:,.0f}", f"{row['share_of_matrix_ceiling']:.0%}"
            models.append([row["benchmark"], speed, ratio, share])
        if "queries" in row:
            times = f"{row['times_the_victim']:.1f}" if "times_the_victim" in row else ""
            speed, growth = f"{row['queries_per_second']:,.0f}", f"{row['growth_mib']:.0f} MiB"
            detectors.append([row["benchmark"], f"{row['queries']:,}", speed, times, growth])
        if "attack" in row:
            growth = "" if row["growth"] is None else f"{row['growth']:.2f}"
            speed, times = f"{row['queries_per_second']:,.0f}", f"{row['times_the_victim']:.1f}"
            attacks.append([row["attack"], f"{row['budget']:,}", speed, times, growth])
    return "\n\n".join([
        markdown(["masked autoencoder", "images/s", "times the reference", "of the matrix ceiling"], models),
        markdown(["detector", "queries", "queries/s", "victim's time = 1", "growth of memory"], detectors),
        markdown(["attack", "budget", "queries/s", "victim's time = 1", "growth"], attacks),
    ])  # fmt: skip


if __name__ == "__main__":
    print(*readme_tables(), sep="\n\n")

"""The tables of README.md, from result rows: `python -m reproduction.readme` prints them."""

from reproduction.defended_report import copies_table, http_table, responses_table
from reproduction.report import cost_table, grid_rows, markdown, summary_table
from reproduction.results import load_rows


def readme_tables() -> list[str]:
    """In the order in which they stand there."""
    rows = grid_rows("mnist", "lecture")
    responses, http = (grid_rows(f"mnist-{part}", "lecture") for part in ("responses", "http"))
    guarded = [responses_table(responses), copies_table(responses), http_table(http)]
    return [summary_table(rows), cost_table(rows), *guarded, benchmark_tables(), service_tables()]


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


def service_tables() -> str:
    """The service under load beside itself without detection; a long run whose every answer was checked; stops."""
    rows = [row for row in load_rows("benchmarks") if row["benchmark"].startswith("service: ")]
    loads, soaks, stops = [], [], []
    for row in rows:
        name = row["benchmark"].removeprefix("service: ")
        if "ratio_to_off" in row:
            ratio = f"{row['ratio_to_off']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
            times = [f"{row[name]:.1f}" for name in ("p50_ms", "p99_ms", "service_cpu_ms")]
            loads.append([name, f"{row['queries_per_second']:,.0f}", ratio, *times])
        elif "growth_mib" in row:
            counts = [f"{row[name]:,.0f}" for name in ("requests", "answered", "refused", "wrong", "lost")]
            memory = [f"{row[name]:,.0f} MiB" for name in ("resident_mib", "growth_mib")]
            soaks.append(
                [name.removeprefix("soak, "), *counts, *memory, f"{row['stamps_spent']:,.0f}", row["spent_twice"]]
            )
        elif "stops" in row:
            stops.append([row[name] for name in ("stops", "accepted", "answered", "lost")])
    asked = ["requests", "answered", "refused", "wrong", "lost", "held", "growth", "stamps spent", "twice"]
    return "\n\n".join([
        markdown(["service", "queries/s", "detection off = 1", "p50, ms", "p99, ms", "its own ms a query"], loads),
        markdown(["soak", *asked], soaks),
        markdown(["SIGTERM under load, times", "requests accepted", "answered", "lost"], stops, 0),
    ])  # fmt: skip


if __name__ == "__main__":
    print(*readme_tables(), sep="\n\n")

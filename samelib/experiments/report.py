"""Tables from result rows: what the README and the book say is written by these functions, never by hand."""

from collections.abc import Sequence

from samelib.experiments.results import load_rows, reported
from samelib.metrics import mean_interval


def spread(values: list[float]) -> str:
    """Mean and half width of the 95 % interval over seeds, of fractions, in percent: "81.3 ± 0.9"."""
    mean, half = mean_interval([100 * v for v in values])
    return f"{mean:.1f}" if half != half else f"{mean:.1f} ± {half:.1f}"


# The paper's three attacks, and the choice of what it leaves open about JBDA that comes nearest to its figure.
HEADLINES = ("knockoff", "jbda", "jbda, direction -, step 0.2, seeds left out", "dfme")
PAPER = {"mnist": "table1_mnist", "cifar10": "table2_cifar10"}
VARIANTS = {"SAME": 0.5, "SAME-X": 1.0, "SAME-Y": 0.0}  # alpha, on standardised terms


def attack_table(labels: Sequence[str] = HEADLINES, group: str = "mnist", tier: str = "lecture") -> str:
    """AUROC of SAME and of each term alone against the attacks of those labels, as Markdown, with the paper's SAME,
    and the substitute's accuracy and fidelity: a row an attack, budget and scoring."""
    rows = [row for row in load_rows(f"same_{group}", tier=tier) if row["attack"] in labels]
    names = ["attack", "budget", "scoring", *VARIANTS, "paper", "accuracy", "fidelity"]
    lines = ["| " + " | ".join(names) + " |", "| --- | ---: | --- |" + " ---: |" * 6]
    cells = {(labels.index(r["attack"]), r["budget"], r["scoring"]) for r in rows}
    for number, budget, scoring in sorted(cells):
        label = labels[number]
        cell = [r for r in rows if (r["attack"], r["budget"], r["scoring"]) == (label, budget, scoring)]
        figures = [spread([r["auroc"] for r in cell if r["alpha"] == alpha]) for alpha in VARIANTS.values()]
        paper = reported(PAPER[group], method="same", attack=label, budget=budget) if group in PAPER else []
        copy = [spread([r[f"substitute_{k}"] for r in cell if r["alpha"] == 0.5]) for k in ("accuracy", "fidelity")]
        theirs = f"{paper[0]['auroc']:.1f}" if paper else ""
        lines.append("| " + " | ".join([label, f"{budget:,}", scoring, *figures, theirs, *copy]) + " |")
    return "\n".join(lines)


def benchmark_tables() -> str:
    """Speed of the autoencoder beside the plain reference, and of detector and attacks beside the victim alone, as
    Markdown."""
    rows = load_rows("benchmarks")
    lines = [
        "| masked autoencoder | images/s | times the reference | of the matrix ceiling |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        if "ratio_to_reference" in row:
            ratio = f"{row['ratio_to_reference']:.1f} ({row['ratio_min']:.1f} to {row['ratio_max']:.1f})"
            share = f"{row['share_of_matrix_ceiling']:.0%}"
            lines.append(f"| {row['benchmark']} | {row['images_per_second']:,.0f} | {ratio} | {share} |")
    lines += [
        "",
        "| detector | queries | queries/s | victim's time = 1 | growth of memory |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if "queries" in row:
            times = f"{row['times_the_victim']:.1f}" if "times_the_victim" in row else ""
            figures = f"{row['queries']:,} | {row['queries_per_second']:,.0f} | {times} | {row['growth_mib']:.0f} MiB"
            lines.append(f"| {row['benchmark']} | {figures} |")
    lines += [
        "",
        "| attack | budget | queries/s | victim's time = 1 | growth |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if "attack" in row:
            growth = "" if row["growth"] is None else f"{row['growth']:.2f}"
            figures = f"{row['queries_per_second']:,.0f} | {row['times_the_victim']:.1f} | {growth}"
            lines.append(f"| {row['attack']} | {row['budget']:,} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(attack_table(), benchmark_tables(), sep="\n\n")

"""README.md as a newcomer meets it: short, its program runs, its table is that of the rows."""

import re
from pathlib import Path

import pytest

import samelib
from reproduction.adaptive import met
from reproduction.detection import detected
from reproduction.plan import BAN, EDM, EVERY_VIEW, HONEST, OUTLIER_EXPOSURE, SAME, SAME_PLUS, DetectorVariant
from reproduction.responses import copies_table
from reproduction.rows import load_rows, reported
from reproduction.tables import select, spread
from samelib.detectors.views import COMBINATION

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_it_is_short_and_names_both_commands():
    assert len(README.splitlines()) <= 100
    assert "make book" in README and "make test" in README


def test_the_front_page_takes_the_first_program_apart():
    pages = (README, (ROOT / "book" / "intro.md").read_text(encoding="utf-8"))
    program, pieces = ("".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)).split() for page in pages)
    assert program == pieces


def test_its_table_is_that_of_the_rows():
    header, _, *lines = copies_table(load_rows("mnist-responses", "lecture")).splitlines()
    columns = [i for i, name in enumerate(cells(header)) if name == "attack" or name.startswith("fidelity")]
    for line in lines:
        row = "| " + " | ".join(cells(line)[i] for i in columns) + " |"
        assert row in README, f"README.md lacks the row\n{row}"


def test_its_figures_of_photographs_are_those_of_the_rows():
    rows, views = load_rows("cifar10", "lecture"), load_rows("cifar10-views", "lecture")
    found = [detected(rows, detector, "knockoff") for detector in (SAME, OUTLIER_EXPOSURE, EDM)]
    found += [detected(views, EVERY_VIEW, "knockoff", view=view) for view in (COMBINATION, "doubt")]
    found += [detected(rows, EDM, "jbda"), detected(views, EVERY_VIEW, "jbda", view=COMBINATION)]
    (line,) = [line for line in README.split("> - ") if line.startswith("On real CIFAR-10")]
    assert sorted(re.findall(r"\d\d\.\d", line)) == sorted(f"{100 * one['auroc'].mean():.1f}" for one in found)


def test_its_figures_of_bans_are_those_of_the_rows():
    found = met(load_rows("mnist-adaptive", "lecture"), BAN, SAME_PLUS, "knockoff")
    kept = [spread(select(found, accounts=accounts)["substitute_fidelity"]) for accounts in (1, 10, 100)]
    (sentence,) = re.findall(r"Bans by account do more.*?\n\n", README, re.DOTALL)
    assert re.findall(r"[\d.]+ ± [\d.]+", sentence) == kept
    shifted = select(load_rows("mnist-bans", "lecture"), label=str(HONEST[1]), **SAME_PLUS._asdict())
    assert f"{spread(shifted['banned'])} % of honest accounts" in README


def test_the_front_page_has_the_figures_of_the_rows():
    rows, views = load_rows("mnist", "lecture"), load_rows("mnist-views", "lecture")
    controls, copies = load_rows("mnist-controls", "lecture"), load_rows("mnist-responses", "lecture")
    (paper,) = reported("table1_mnist", method="same", attack="knockoff", budget=4000)["auroc"]
    line = detected(controls, DetectorVariant("largest-difference-low"), "knockoff")
    wanted = [f"{paper:.1f}", f"{100 * line['auroc'].mean():.2f}"]
    for frame in (detected(rows, SAME, "knockoff"), detected(views, EVERY_VIEW, "knockoff", view=COMBINATION)):
        wanted.append(f"{100 * frame['auroc'].mean():.1f}")
    (thief,) = [cells(row) for row in copies_table(copies).splitlines() if row.startswith("| knockoff")]
    wanted += [thief[-3].split(" ±")[0], thief[-1].split(" ±")[0]]
    said = (ROOT / "book" / "intro.md").read_text(encoding="utf-8").split("## What it comes to")[1].split("\n## ")[0]
    assert sorted(re.findall(r"\d+\.\d+", said)) == sorted(wanted)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_its_links_lead_somewhere(link):
    assert (ROOT / link).is_file()


def test_its_program_runs(group, victim, detector, monkeypatch, capsys):
    """On a tiny group: the program is the same, what it loads and trains is not."""
    monkeypatch.setattr(samelib, "load_group", lambda name: group)
    monkeypatch.setattr(samelib, "train_victim", lambda group: victim)
    monkeypatch.setattr(samelib.SamePlus, "preset", lambda *_: samelib.SamePlus(detector.settings))
    monkeypatch.setattr(samelib, "QueryGateway", lambda victim, budget, detector: gateway(victim, 64, detector))
    gateway = samelib.gateway.QueryGateway
    exec(README.split("```python\n")[1].split("```")[0], {})
    printed = capsys.readouterr().out
    assert "flagged: thief tensor(" in printed and "flagged: users tensor(" in printed

"""`samelib reproduce` from end to end: the smoke grid of all tables and figures on embedded data."""

import sys

import pytest
from PIL import Image

from reproduction import figures, grid, report
from reproduction.cells import OVER_HTTP, PROTOCOLS, RESPONSES, TARGETS, cells_of, targets_of
from reproduction.defended_report import USERS, responded
from reproduction.figures import TARGET_FIGURES, TARGET_TABLES
from reproduction.report import grid_rows, pick
from reproduction.results import load_cells
from samelib import cli

pytestmark = pytest.mark.slow


class Grid:
    """The smoke grid in a folder of its own."""

    def __init__(self, folder):
        self.results, self.output = folder / "results", folder / "drawn"

    def reproduce(self, *words: str) -> None:
        cli.main(["reproduce", *words, "--tier", "smoke", "--seeds", "0", *self.places])

    @property
    def places(self) -> list[str]:
        return ["--results", str(self.results), "--output", str(self.output)]

    def rows(self, name: str) -> list[dict]:
        return grid_rows(name, "smoke", self.results / f"{name}.jsonl")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Grid:
    """Everything on glyphs, and the colour tables on shapes."""
    made = Grid(tmp_path_factory.mktemp("grid"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMELIB_CACHE", str(made.results / "cache"))
        made.reproduce("all", "--data", "glyphs")
        made.reproduce("table2", "table3", "--data", "shapes")
    return made


def test_every_cell_is_there(smoke):
    files = {"shapes": ["table2", "table3"]}
    for target in targets_of("glyphs", ["all"]):
        files.setdefault("-".join(filter(None, ("glyphs", TARGETS[target].part))), []).append(target)
    assert set(files) == {"glyphs", "glyphs-responses", "glyphs-http", "shapes"}
    for name, targets in files.items():
        wanted = cells_of(name.split("-")[0], "smoke", [0], targets)
        assert [r["cell"] for r in load_cells(smoke.results / f"{name}.jsonl")] == [str(c) for c in wanted]


def test_a_finished_grid_measures_nothing(smoke, monkeypatch, capsys):
    monkeypatch.setattr(grid, "measure", None)
    monkeypatch.setattr(grid, "load_group", None)  # not even the data are read
    smoke.reproduce("all", "--data", "glyphs")
    assert "cells, 0 of them measured now" in capsys.readouterr().out


def test_every_target_is_drawn(smoke):
    for target in TARGETS:
        folder = smoke.output / ("shapes-smoke" if target == "table2" else "glyphs-smoke")
        if target in TARGET_TABLES:
            lines = (folder / f"{target}.md").read_text().splitlines()
            assert len(lines) > 3 and "nan" not in "".join(lines)
        if target in TARGET_FIGURES:
            with Image.open(folder / f"{target}.png") as picture:
                colours = picture.convert("RGB").getcolors(2**24)
            assert len(colours) > 50, "an empty figure"
        assert target in TARGET_TABLES or target in TARGET_FIGURES
    assert not (smoke.output / "glyphs-smoke" / "table2.md").exists(), "that is a table of colour pictures"


def test_tables_have_no_gaps(smoke):
    for name in ("glyphs", "glyphs-responses", "glyphs-http", "shapes"):
        group, _, part = name.partition("-")
        wanted = ("table2", "table3") if group == "shapes" else set(TARGET_TABLES) - {"table2"}
        for target in (t for t in wanted if TARGETS[t].part == part):
            table = TARGET_TABLES[target](smoke.rows(name))
            body = [line for line in table.splitlines() if line.startswith("| ")]
            if target != "accounts":  # an account without an alarm has no first alarm
                assert not any("–" in line for line in body), table


def test_the_measures_are_shares(smoke):
    for row in smoke.rows("glyphs"):
        for name in (
            "auroc",
            "aupr",
            "fpr95",
            "fpr90",
            "tpr_at_5%",
            "alarmed",
            "victim_accuracy",
            "substitute_fidelity",
        ):
            assert 0 <= row.get(name, 0) <= 1


def test_defences_are_attacked_through_their_own_victims(smoke):
    rows = [r for r in smoke.rows("glyphs") if "auroc" in r]
    accuracy = {
        d: {r["victim_accuracy"] for r in rows if r["detector"] == d} for d in ("same", "outlier_exposure", "edm")
    }
    assert all(len(found) == 1 for d, found in accuracy.items() if d != "same")
    substitutes = {d: pick(rows, detector=d, attack="knockoff", budget=500)[0]["substitute_fidelity"] for d in accuracy}
    assert len(set(substitutes.values())) > 1, "one query log for all would give one substitute"


def test_what_a_fault_cannot_change_it_does_not(smoke):
    rows = smoke.rows("glyphs")
    audited = {p: report._audited(rows, p, "knockoff")[0] for p in PROTOCOLS}
    assert audited["scores raw queries"]["auroc"] == audited["fixed"]["auroc"], (
        "Knockoff's images are 8-bit as they are"
    )
    assert audited["interpolated ROC"]["auroc"] == audited["fixed"]["auroc"]
    unclipped = {p: report._audited(rows, p, "jbda, unclipped")[0]["auroc"] for p in ("fixed", "scores raw queries")}
    assert unclipped["scores raw queries"] != unclipped["fixed"]


def test_costs_are_parts_of_a_whole(smoke):
    costs = {r["detector"]: r for r in smoke.rows("glyphs") if "victim_seconds" in r}
    assert costs["outlier_exposure"]["parameters"] == 0 and costs["edm"]["parameters"] > 0
    assert costs["same"]["parameters"] == costs["same"]["mae_parameters"] + costs["same"]["auxiliary_parameters"]
    assert costs["same, shared trunk"]["auxiliary_parameters"] < costs["same"]["auxiliary_parameters"]
    assert all(cost["victim_seconds"] > 0 for cost in costs.values())
    stems = {r["detector"] for r in smoke.rows("shapes") if "victim_seconds" in r}
    assert {"victim, resnet18", "victim, resnet18-imagenet"} < stems


def test_responses_act_on_every_user(smoke):
    rows, http = smoke.rows("glyphs-responses"), smoke.rows("glyphs-http")
    for user in USERS:
        answered = {name: responded(rows, name, user)[0]["answered"] for name in RESPONSES}
        assert answered["no response"] == answered["proof of work"] == 1.0
        if user in ("benign", "knockoff"):  # whose queries do not depend on the answers
            assert answered["reject 5 %"] <= answered["reject 1 %"]
        (work,) = responded(rows, "proof of work", user)
        assert work["hashes"] > 2**10 and work["times"] == sorted(work["times"]) and work["times"][0] > 0
        for name in OVER_HTTP:
            (there,) = responded(http, name, user, http=True)
            assert there["queries"] <= 50 and min(there["times"]) > 0
    (benign,) = responded(rows, "proof of work", "benign")
    (noise,) = responded(rows, "proof of work", "dfme")
    assert noise["hashes"] > 4 * benign["hashes"], "what looks strange works more"
    assert responded(rows, "reject 5 %", "benign")[0]["answered"] > 0.9


def test_without_a_response_the_copy_is_the_one_of_the_tables(smoke):
    for attack in ("knockoff", "dfme"):
        (alone,) = responded(smoke.rows("glyphs-responses"), "no response", attack)
        (table,) = report.detected(smoke.rows("glyphs"), "same", attack, 500)
        assert all(alone[f"substitute_{k}"] == table[f"substitute_{k}"] for k in ("accuracy", "fidelity"))


def test_figures_come_from_rows_alone(smoke, monkeypatch):
    rows, responses, http = (smoke.rows(f"glyphs{part}") for part in ("", "-responses", "-http"))
    for module in ("torch", "reproduction.measure", "samelib.data.real"):
        monkeypatch.setitem(sys.modules, module, None)  # nothing may be computed or loaded
    drawn = dict.fromkeys(
        (figures.figure1, figures.figure5, figures.figure6, figures.figure7, figures.alpha_figure), rows
    )
    for draw, found in (drawn | {figures.figure4: responses, figures.http_figure: http}).items():
        figure = draw(found)
        assert all(axis.get_xlabel() or axis.get_ylabel() for axis in figure.axes)
        figures.plt.close(figure)


def test_a_dry_run_measures_nothing(smoke, capsys):
    smoke.reproduce("table1", "--data", "glyphs", "--dry-run")
    assert "0 to measure" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["table9"], "unknown table or figure 'table9'"),
        (["table1", "--data", "letters"], "unknown group 'letters'"),
        (["table1", "--tier", "huge"], "unknown tier 'huge'"),
        (["table1", "--data", "shapes"], "for shapes take table2"),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path):
    with pytest.raises(SystemExit, match=f"samelib: .*{message}"):
        cli.main(["reproduce", *words, "--results", str(tmp_path)])

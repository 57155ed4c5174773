"""`python -m reproduction run` from end to end: the smoke grid of all tables and figures on embedded data."""

import sys

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from PIL import Image

from reproduction import ablations, curve, detection, responses, run
from reproduction.__main__ import FIGURES, TABLES, main
from reproduction.author_code import INTERPOLATED, RAW_QUERIES
from reproduction.plan import (
    EDM,
    OUTLIER_EXPOSURE,
    OVER_HTTP,
    RESPONSES,
    SAME,
    TARGETS,
    DetectorVariant,
    cells_of,
    targets_of,
)
from reproduction.responses import USERS, responded
from reproduction.rows import load_cells, load_rows
from reproduction.tables import select

pytestmark = pytest.mark.slow


class Grid:
    """The smoke grid in a folder of its own."""

    def __init__(self, folder):
        self.results, self.output = folder / "results", folder / "drawn"

    def reproduce(self, *words: str) -> None:
        main(["run", *words, "--tier", "smoke", "--seeds", "0", *self.places])

    @property
    def places(self) -> list[str]:
        return ["--results", str(self.results), "--output", str(self.output)]

    def rows(self, name: str) -> pd.DataFrame:
        return load_rows(name, "smoke", self.results / f"{name}.jsonl")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Grid:
    """Everything on glyphs; of a colour table SAME alone, as the other ResNets take minutes (a test of real data has them)."""
    made = Grid(tmp_path_factory.mktemp("grid"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMELIB_CACHE", str(made.results / "cache"))
        made.reproduce("all", "--data", "glyphs")
        run.run(
            [c for c in cells_of("shapes", "smoke", [0], ["table3"]) if c.detector == SAME],
            made.results / "shapes.jsonl",
        )
    return made


def test_every_cell_is_there(smoke):
    files = {}
    for target in targets_of("glyphs", ["all"]):
        files.setdefault("-".join(filter(None, ("glyphs", TARGETS[target].part))), []).append(target)
    assert len(files) > 4 and set(files) == {p.stem for p in smoke.results.glob("glyphs*.jsonl")}
    for name, targets in files.items():
        wanted = cells_of(name.split("-")[0], "smoke", [0], targets)
        assert [r["cell"] for r in load_cells(smoke.results / f"{name}.jsonl")] == [str(c) for c in wanted]


def test_a_finished_grid_measures_nothing(smoke, monkeypatch, capsys):
    monkeypatch.setattr(run, "measure", None)
    monkeypatch.setattr(run, "group_of", None)  # not even the data are read
    smoke.reproduce("all", "--data", "glyphs")
    assert "cells, 0 of them measured now" in capsys.readouterr().out


def test_every_target_is_drawn(smoke):
    for target in set(TARGETS) - {"table2"}:
        folder = smoke.output / "glyphs-smoke"
        if target in TABLES:
            lines = (folder / f"{target}.md").read_text().splitlines()
            assert len(lines) > 3 and "nan" not in "".join(lines)
            # No alarm, no first alarm; no answer, no time to wait for it; honest users steal no copy.
            if target not in ("accounts", "http", "adaptive", "bans", "prices"):
                assert not any("–" in line for line in lines if line.startswith("| ")), lines
        if target in FIGURES:
            with Image.open(folder / f"{target}.png") as picture:
                colours = picture.convert("RGB").getcolors(2**24)
            assert len(colours) > 50, "an empty figure"
        assert target in TABLES or target in FIGURES
    assert not (smoke.output / "glyphs-smoke" / "table2.md").exists(), "that is a table of colour pictures"


def test_the_measures_are_shares(smoke):
    names = ("auroc", "aupr", "fpr95", "fpr90", "tpr_at_5%", "alarmed", "victim_accuracy", "substitute_fidelity")
    for name in names:
        assert smoke.rows("glyphs")[name].dropna().between(0, 1).all()


def test_a_control_stands_in_the_papers_tables(smoke):
    frame, control = smoke.rows("glyphs-controls"), DetectorVariant("laplacian-low")
    table4 = detection.ratio_table(frame, detector=control)
    assert "–" not in table4 and table4 != detection.ratio_table(smoke.rows("glyphs"))
    table1 = detection.detection_table(frame, {"Laplacian, low": control}).splitlines()
    large = [line for line in table1 if f"{detection.budgets_of(frame)[1]:,}" in line]
    assert len(large) == len(detection.LABELS) and not any("–" in line for line in large)


def test_defences_are_attacked_through_their_own_victims(smoke):
    frame = smoke.rows("glyphs")
    found = [detection.detected(frame, detector, "knockoff") for detector in (SAME, OUTLIER_EXPOSURE, EDM)]
    assert len({rows["victim_accuracy"].iloc[0] for rows in found}) > 1
    assert len({rows["substitute_fidelity"].iloc[0] for rows in found}) > 1, "one log for all gives one substitute"


def test_what_a_fault_cannot_change_it_does_not(smoke):
    frame = smoke.rows("glyphs")

    def auroc(fault: str, label: str) -> float:
        return ablations.audited(frame, fault, label)["auroc"].iloc[0]

    sound = auroc("none", "knockoff")
    assert auroc(RAW_QUERIES, "knockoff") == sound, "Knockoff's images are 8-bit as they are"
    assert auroc(INTERPOLATED, "knockoff") == sound
    assert auroc(RAW_QUERIES, "jbda, unclipped") != auroc("none", "jbda, unclipped")


def test_costs_are_parts_of_a_whole(smoke):
    costs = {r["cell"].split(": ")[1]: r for r in select(smoke.rows("glyphs"), experiment="cost").to_dict("records")}
    same, shared = costs["same / cost"], costs["same, shared trunk / cost"]
    assert costs["outlier_exposure / cost"]["parameters"] == 0 and costs["edm / cost"]["parameters"] > 0
    assert same["parameters"] == same["mae_parameters"] + same["auxiliary_parameters"]
    assert shared["auxiliary_parameters"] < same["auxiliary_parameters"]
    assert all(cost["victim_seconds"] > 0 for cost in costs.values())
    (colour,) = smoke.rows("shapes").to_dict("records")
    assert colour["auxiliary_parameters"] < same["auxiliary_parameters"], "a ResNet-10 is smaller than Conv3"


def test_responses_act_on_every_user(smoke):
    frame, http = smoke.rows("glyphs-responses"), smoke.rows("glyphs-http")

    def reading(frame: pd.DataFrame, response: str, label: str) -> pd.Series:
        return responded(frame, response, label).iloc[0]

    for label in USERS:
        answered = {name: reading(frame, name, label)["answered"] for name in RESPONSES}
        assert answered["no response"] == answered["proof of work"] == 1.0
        if label in ("benign", "knockoff"):  # whose queries do not depend on the answers
            assert answered["reject 5 %"] <= answered["reject 1 %"]
        work = reading(frame, "proof of work", label)
        assert work["hashes"] > 2**9 and work["times"] == sorted(work["times"]) and work["times"][0] > 0
        for name in OVER_HTTP:
            there = reading(http, name, label)
            assert there["queries"] <= 10 and min(there["times"], default=1) > 0
    strange, ordinary = (reading(frame, "proof of work", label)["hashes"] for label in ("dfme", "benign"))
    assert strange > 2 * ordinary, "what looks strange works more"
    assert reading(frame, "reject 5 %", "benign")["answered"] > 0.85


def test_without_a_response_the_copy_is_the_one_of_the_tables(smoke):
    for label in ("knockoff", "dfme"):
        alone = responded(smoke.rows("glyphs-responses"), "no response", label).iloc[0]
        table = detection.detected(smoke.rows("glyphs"), SAME, label).iloc[0]
        assert all(alone[f"substitute_{name}"] == table[f"substitute_{name}"] for name in ("accuracy", "fidelity"))


def test_figures_come_from_rows_alone(smoke, monkeypatch):
    frame, answered, http = (smoke.rows(f"glyphs{part}") for part in ("", "-responses", "-http"))
    for module in ("torch", "reproduction.lab", "samelib.data.real"):
        monkeypatch.setitem(sys.modules, module, None)  # nothing may be computed or loaded
    drawn = dict.fromkeys((detection.figure1, detection.figure5, detection.alpha_figure), frame)
    drawn |= {curve.figure6: frame, ablations.figure7: frame, responses.figure4: answered, responses.http_figure: http}
    for draw, rows in drawn.items():
        figure = draw(rows)
        assert all(axis.get_xlabel() or axis.get_ylabel() for axis in figure.axes)
        plt.close(figure)


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
    with pytest.raises(SystemExit, match=f"reproduction: .*{message}"):
        main(["run", *words, "--results", str(tmp_path)])


def test_the_ledger_is_printed(capsys):
    main(["ledger"])
    assert capsys.readouterr().out.startswith("# The ledger\n")

import csv
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from samelib import cli, commands
from samelib.detectors.same import SameDetector
from samelib.models.classifiers import Victim


def run(*words: str) -> None:
    cli.main(list(map(str, words)))


@pytest.mark.parametrize("command", ["data", "fit", "score", "attack", "cache"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop:
        run(command, "--help")
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and f"usage: samelib {command}" in shown and len(shown.splitlines()) > 5


def test_it_is_installed_as_a_command():
    shown = subprocess.run([sys.executable, "-m", "samelib.cli", "--help"], capture_output=True, text=True, check=True)
    assert "A first round: samelib fit" in shown.stdout.replace("\n", " ")


def test_data_shows_six_sets_and_draws_them(tmp_path, capsys):
    run("data", "--data", "glyphs", "--tier", "smoke", "--sheet", tmp_path / "sheet.png")
    shown = capsys.readouterr().out
    for name in ("victim_train", "calibration", "benign_test", "seeds", "proxy", "outliers", "fingerprint"):
        assert name in shown
    assert Image.open(tmp_path / "sheet.png").size[0] > 400


def test_fit_score_and_cache(tmp_path, capsys):
    folder = tmp_path / "detector"
    run("fit", folder, "--data", "glyphs", "--tier", "smoke")
    assert "accuracy" in capsys.readouterr().out
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    run("score", folder, tmp_path / "pictures", "--output", tmp_path / "scores.csv")
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert [r["image"].rsplit("/")[-1] for r in rows] == ["0.png", "1.png", "2.png"]
    assert all(r["flagged"] == "1" and float(r["p_value"]) <= 0.05 for r in rows)  # noise

    images = rng.integers(0, 256, (5, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "queries.npz", images=images)
    capsys.readouterr()
    run("score", folder, tmp_path / "queries.npz")
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    scores = SameDetector.load(folder).score(images[:, None])
    assert np.allclose([float(r["score"]) for r in rows], scores, rtol=1e-4)

    run("cache")
    assert "in 3 entries" in capsys.readouterr().out  # victim, autoencoder, auxiliary model
    run("cache", "--clear")
    run("cache")
    assert "in 0 entries" in capsys.readouterr().out


SMALL = {
    "noise": ["--labels", "hard"],
    "knockoff": [],
    "adaptive-knockoff": ["--reward", "certainty", "--superclasses", "0,0,0,1,1,1,2,2,2,2"],
    "jbda": ["--direction", "-", "--step", "0.1", "--step-range", "0", "1", "--reservoir", "50"],
    "dfme": ["--epsilon", "0.1", "--directions", "2", "--student-steps", "3"],
}


@pytest.fixture(scope="module")
def smoke_cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("smoke-cache"))


@pytest.mark.parametrize("name", SMALL)
def test_every_attack_against_a_groups_victim(name, tmp_path, capsys, smoke_cache, monkeypatch):
    monkeypatch.setenv("SAMELIB_CACHE", smoke_cache)
    run("attack", name, tmp_path / "loot", "--tier", "smoke", "--budget", "230", *SMALL[name])
    shown = capsys.readouterr()
    assert "230 queries" in shown.out and "fidelity" in shown.out and "next: samelib score" in shown.out
    assert "/230" in shown.err and "query/s" in shown.err  # the progress bar
    with np.load(tmp_path / "loot" / "queries.npz") as log:
        assert log["images"].shape == (230, 1, 28, 28) and log["images"].dtype == np.uint8
        assert np.allclose(log["answers"].sum(1), 1, atol=1e-3) and "scores" not in log
    substitute = Victim.load(tmp_path / "loot" / "substitute")
    assert (substitute.image_shape, substitute.classes) == ((1, 28, 28), 10)


def test_attack_a_saved_victim_behind_its_detector_then_the_copy(detector, tmp_path, capsys):
    folder = detector.save(tmp_path / "detector")
    run("attack", "noise", tmp_path / "loot", "--tier", "smoke", "--budget", "60", "--victim", folder)
    assert "queries flagged: " in capsys.readouterr().out
    with np.load(tmp_path / "loot" / "queries.npz") as log:
        assert np.allclose(log["scores"], detector.score(log["images"]), rtol=1e-4, atol=1e-5)
    run("score", folder, tmp_path / "loot" / "queries.npz")  # the log is a set of images
    assert len(capsys.readouterr().out.splitlines()) == 61
    run(
        "attack",
        "knockoff",
        tmp_path / "again",
        "--tier",
        "smoke",
        "--budget",
        "40",
        "--victim",
        tmp_path / "loot" / "substitute",
    )
    assert "40 queries" in capsys.readouterr().out


def test_an_interrupted_attack_keeps_what_was_answered(tmp_path, capsys, monkeypatch, detector):
    folder = detector.save(tmp_path / "detector")

    monkeypatch.setattr(commands.QueryGateway, "query", stop_after(2, commands.QueryGateway.query))
    with pytest.raises(SystemExit, match="stopped"):
        run("attack", "noise", tmp_path / "loot", "--tier", "smoke", "--budget", "900", "--victim", folder)
    with np.load(tmp_path / "loot" / "queries.npz") as log:
        assert len(log["images"]) == 512
    assert "512 queries" in capsys.readouterr().out and not (tmp_path / "loot" / "substitute").exists()


def stop_after(calls: int, query):
    """`query`, but Ctrl-C is pressed at a later call."""
    done = []

    def asked(self, x):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(len(x))
        return query(self, x)

    return asked


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score", "nowhere", "x.png"], "no readable card.json"),
        (["data", "--data", "minst"], "unknown group"),
        (["data", "--data", "path:nowhere"], "give a folder of images"),
        (["fit", ".", "--tier", "smoke"], "exists; remove it"),
        (["attack", "noise", "."], "exists; remove it"),
        (["attack", "jbda", "loot", "--tier", "smoke", "--step", "0"], "changes no 8-bit image"),
        (["attack", "noise", "loot", "--tier", "smoke", "--victim", "nowhere"], "no readable card.json"),
        (["attack", "adaptive-knockoff", "loot", "--tier", "smoke", "--superclasses", "0,1"], "superclasses for 2"),
    ],
)
def test_mistakes_end_in_one_clear_line(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert str(stop.value).startswith("samelib: ") and message in str(stop.value)

import csv
import re
import tomllib
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_SAME, TINY_TRAIN
from PIL import Image

from samelib import cli
from samelib.detectors import load_detector
from samelib.detectors.power import VERSIONS
from samelib.models.classifiers import Victim
from samelib.presets import preset
from samelib.responses import BanAccount, ProofOfWork
from samelib.service.app import create_app
from samelib.service.server import running


def run(*words: str) -> None:
    cli.main(list(map(str, words)))


@pytest.mark.parametrize("command", ["data", "fit", "score", "attack", "cache"])
def test_help_teaches(command, capsys):
    run(command, "--help")  # and returns: book/build.py goes on after a command
    shown = capsys.readouterr().out
    assert f"Usage: samelib {command}" in shown and len(shown.splitlines()) > 5


def test_it_is_installed_as_a_command(capsys):
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    EntryPoint("samelib", project["scripts"]["samelib"], "console_scripts").load()(["--help"])
    assert "A first round: samelib fit" in capsys.readouterr().out.replace("\n", " ")


def test_data_shows_six_sets_and_draws_them(tmp_path, capsys):
    run("data", "--data", "glyphs", "--tier", "smoke", "--sheet", tmp_path / "sheet.png")
    shown = capsys.readouterr().out
    for name in ("victim_train", "calibration", "benign_test", "seeds", "proxy", "outliers", "fingerprint"):
        assert name in shown
    assert Image.open(tmp_path / "sheet.png").size[0] > 400


@pytest.fixture
def small_group(group, monkeypatch):
    """Every group is the tests' own, a tenth of the smoke tier's, and trainings are as short."""
    monkeypatch.setattr(cli, "load_group", lambda *_, **__: group)
    short = {"victim_train": TINY_TRAIN, "substitute_train": TINY_TRAIN, "round_train": TINY_TRAIN, "same": TINY_SAME}
    monkeypatch.setattr(cli, "preset", lambda *words: replace(preset(*words), **short))


def test_fit_score_and_cache(tmp_path, capsys, small_group):
    folder = tmp_path / "detector"
    run("fit", folder, "--data", "glyphs", "--tier", "smoke")
    shown = capsys.readouterr().out
    assert "accuracy" in shown and re.search(
        r"flagged: [\d.]+ %, 95 % interval [\d.]+ to [\d.]+ \(calib.* to 5 %\)", shown
    )
    power = re.findall(r"^  ([a-z ]+?) +([\d.]+)%(  weak)?$", shown, re.MULTILINE)
    assert [name for name, *_ in power] == list(VERSIONS)
    assert all((float(share) < 90) == bool(weak) for _, share, weak in power)
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in (0, 2):
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "pictures" / "1.png").write_bytes(b"half a file")
    with pytest.raises(SystemExit, match="1 of 3 images cannot be read; the column error says why"):
        run("score", folder, tmp_path / "pictures", "--output", tmp_path / "scores.csv")
    assert "2 of 2 images flagged at 5.0%" in capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert [r["image"].rsplit("/")[-1] for r in rows] == ["0.png", "1.png", "2.png"]
    good, bad = [rows[0], rows[2]], rows[1]
    assert all(r["flagged"] == "1" and float(r["p_value"]) <= 0.05 and not r["error"] for r in good)  # noise
    assert "1.png is missing, or no readable image" in bad["error"] and bad["score"] == bad["flagged"] == ""

    images = rng.integers(0, 256, (5, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "queries.npz", images=images)
    capsys.readouterr()
    run("score", folder, tmp_path / "queries.npz")
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    scores = load_detector(folder).score(images[:, None])
    assert np.allclose([float(r["score"]) for r in rows], scores, rtol=1e-4)

    run("cache")
    assert "in 3 entries" in capsys.readouterr().out  # victim, autoencoder, auxiliary model
    run("cache", "--clear")
    run("cache")
    assert "in 0 entries" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "parts"), [("same", {"reconstruction_error", "deviation"}), ("same-plus", {"p_trace", "p_doubt"})]
)
def test_a_table_says_what_each_method_saw(method, parts, tmp_path, capsys, small_group):
    np.savez(tmp_path / "queries.npz", images=np.zeros((2, 28, 28), np.uint8))
    run("fit", tmp_path / "detector", "--tier", "smoke", "--method", method)
    capsys.readouterr()
    run("score", tmp_path / "detector", tmp_path / "queries.npz")
    (row, _) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert parts <= set(row) and 0 < float(row["p_value"]) <= 1


SMALL = {
    "noise": ["--labels", "hard"],
    "knockoff": [],
    "adaptive-knockoff": ["--reward", "certainty", "--superclasses", "0,0,0,1,1,1,2,2,2,2"],
    "jbda": ["--direction", "-", "--step", "0.1", "--step-range", "0", "1", "--reservoir", "50"],
    "dfme": ["--epsilon", "0.1", "--directions", "2", "--student-steps", "3"],
    "knockoff-preprocessed": [],
    "knockoff-mixed": ["--share", "0.8"],
    "knockoff-self-trained": ["--confidence", "0.5", "--labels", "hard"],
}


@pytest.fixture(scope="module")
def smoke_cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("smoke-cache"))


@pytest.mark.parametrize("name", SMALL)
def test_every_attack_against_a_groups_victim(name, tmp_path, capsys, smoke_cache, monkeypatch, small_group):
    monkeypatch.setenv("SAMELIB_CACHE", smoke_cache)
    run("attack", name, tmp_path / "loot", "--tier", "smoke", "--budget", "90", *SMALL[name])
    shown = capsys.readouterr()
    assert "90 queries" in shown.out and "fidelity" in shown.out and "next: samelib score" in shown.out
    assert "/90" in shown.err and "query/s" in shown.err  # the progress bar
    with np.load(tmp_path / "loot" / "queries.npz") as log:
        assert log["images"].shape == (90, 1, 28, 28) and log["images"].dtype == np.uint8
        assert np.allclose(log["answers"].sum(1), 1, atol=1e-3) and "scores" not in log
    substitute = Victim.load(tmp_path / "loot" / "substitute")
    assert (substitute.image_shape, substitute.classes) == ((1, 28, 28), 10)


def test_attack_a_saved_victim_behind_its_detector_then_the_copy(detector, tmp_path, capsys, small_group):
    folder = detector.save(tmp_path / "detector")
    run("attack", "noise", tmp_path / "loot", "--tier", "smoke", "--budget", "60", "--victim", folder)
    assert "queries flagged: " in capsys.readouterr().out
    with np.load(tmp_path / "loot" / "queries.npz") as log:
        assert np.allclose(log["scores"], detector.score(log["images"]), rtol=1e-4, atol=1e-5)
    run("score", folder, tmp_path / "loot" / "queries.npz")  # the log is a set of images
    assert len(capsys.readouterr().out.splitlines()) == 61
    copy = tmp_path / "loot" / "substitute"
    run("attack", "knockoff", tmp_path / "again", "--tier", "smoke", "--budget", "40", "--victim", copy)
    assert "40 queries" in capsys.readouterr().out


@pytest.mark.parametrize("known", [False, True], ids=["blind", "with its victim"])
def test_attack_a_live_service(known, victim, detector, tmp_path, capsys, small_group):
    """Whoever owns the victim as well learns how faithful the copy is; nobody else can."""
    words = ["--victim", detector.save(tmp_path / "detector")] if known else []
    with running(create_app(victim, detector, ProofOfWork(2, 3))) as url:
        run("attack", "noise", tmp_path / "loot", "--tier", "smoke", "--budget", 40, "--url", url, *words)
    shown = capsys.readouterr().out
    with np.load(tmp_path / "loot" / "queries.npz") as log:
        assert len(log["images"]) == 40 and "scores" not in log
        assert f"answered: 40, refused: 0, hashes: {log['hashes'].sum():,}" in shown and log["hashes"].sum() > 40
    assert ("fidelity" in shown) == known
    assert Victim.load(tmp_path / "loot" / "substitute").classes == 10


def test_an_attack_on_a_service_that_bans(victim, detector, tmp_path, capsys, small_group):
    words = ["attack", "noise", tmp_path / "loot", "--tier", "smoke", "--budget", 100]
    with running(create_app(victim, detector, BanAccount(0.1))) as url:
        with pytest.raises(SystemExit, match="X-API-Key"):
            run(*words, "--url", url)
        run(*words, "--url", url, "--api-key", "a thief")
    answered, refused = map(int, re.search(r"answered: (\d+), refused: (\d+)", capsys.readouterr().out).groups())
    assert answered + refused == 100 and 5 < answered < 60


def test_a_service_for_other_images(tmp_path, small_group):
    small = Victim(lambda x: x.flatten(1)[:, :10].softmax(1), (1, 8, 8), 10)
    with running(create_app(small)) as url, pytest.raises(SystemExit, match=r"\(1, 8, 8\) .*; choose its --data"):
        run("attack", "noise", tmp_path / "loot", "--tier", "smoke", "--url", url)


def test_an_interrupted_attack_keeps_what_was_answered(tmp_path, capsys, monkeypatch, detector, small_group):
    folder = detector.save(tmp_path / "detector")

    monkeypatch.setattr(cli.QueryGateway, "query", stop_after(2, cli.QueryGateway.query))
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
        (["attack", "knockoff", "loot", "--step", "0.2"], "knockoff ignores --step"),
        (["attack", "jbda", "loot", "--proxy", "path:x.npz"], "jbda ignores --proxy"),
        (["attack", "dfme", "loot", "--labels", "hard"], "dfme ignores --labels"),
        (["attack", "knockoff", "loot", "--share", "0.5"], "knockoff ignores --share"),
        (["attack", "knockoff-mixed", "loot", "--tier", "smoke", "--share", "1"], "below 1, got 1.0"),
        (["attack", "noise", "loot", "--tier", "smoke", "--url", "http://127.0.0.1:9"], "no answer from"),
        (["attack", "noise", "loot", "--tier", "smoke", "--victim", "nowhere"], "no readable card.json"),
        (["attack", "adaptive-knockoff", "loot", "--tier", "smoke", "--superclasses", "0,1"], "superclasses for 2"),
    ],
)
def test_mistakes_end_in_one_clear_line(words, message, group, monkeypatch):
    load = cli.load_group
    monkeypatch.setattr(cli, "load_group", lambda name, *more, **own: group if name == "glyphs" else load(name))
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert str(stop.value).startswith("samelib: ") and message in str(stop.value)

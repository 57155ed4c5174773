"""The leaderboard: the house plays, whoever fails is shown last and stops nobody."""

import numpy as np
import pytest
import torch

from course import contest
from course.contest import ATTACKS, Contest, main, standings, submissions, table
from samelib import Knockoff
from samelib.data.image_set import to_uint8
from samelib.presets import preset

NOISY = """
def detect(train, calibration, victim):
    return lambda x: (x[..., 1:] - x[..., :-1]).abs().flatten(1).mean(1)
"""
THIEF = """
def steal(gateway, proxy, seeds):
    assert len(seeds) and gateway.remaining == 210
    from torch import nn
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
"""
BLIND = "def detect(train, calibration, victim):\n    return lambda x: x.flatten(1).mean(1) * float('nan')\n"
BROKEN = "x = 1 /\n"


@pytest.fixture(scope="module")
def held(tmp_path_factory) -> Contest:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SAMELIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        from samelib import load_group

        yield Contest(load_group("glyphs", "smoke"), queries=210, accounts=3)


@pytest.fixture
def folder(tmp_path):
    for name, text in {"ann": NOISY, "bob": THIEF, "cid": BLIND, "eve": BROKEN}.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def test_who_fails_is_last_with_the_reason(held, folder):
    entries = submissions(folder)
    thieves, detectors = (standings(held, entries, function) for function in ("steal", "detect"))
    assert [name for name, _ in thieves] == ["bob", "eve"] and 0 <= thieves[0][1]["fidelity"] < 0.5
    assert thieves[0][1]["answered"] == 0  # it asked nothing
    assert [name for name, _ in detectors] == ["ann", "cid", "eve"]
    assert detectors[1][1].startswith("ValueError") and "0 finite" in detectors[1][1]
    assert detectors[2][1].startswith("SyntaxError")
    lines = table(detectors, ("mean", *ATTACKS, "benign flagged")).splitlines()
    assert lines[2].startswith("| 1 | ann |") and lines[3].startswith("| – | cid | ValueError")


def test_detectors_are_compared_at_one_rate_set_on_images_that_they_did_not_get(held):
    given = {}

    def detect(train, calibration, victim):
        given["calibration"] = calibration
        wanted = {image.numpy().tobytes() for image in held.logs["dfme"]}
        return lambda x: torch.tensor([float(image.numpy().tobytes() in wanted) for image in to_uint8(x)])

    figures = held.detector(detect)
    assert list(figures) == ["mean", *ATTACKS, "benign"]
    assert figures["dfme"] == 1 and figures["knockoff"] == figures["benign"] == 0
    assert figures["mean"] == pytest.approx(np.mean([figures[name] for name in ATTACKS]))
    same = (given["calibration"].images[:, None] == held.kept.images[None, :20]).flatten(2).all(2)
    assert len(held.kept) and not same.any()
    assert {len(queries) for queries in held.logs.values()} == {210}


def test_the_house_steals_through_its_accounts(held):
    (steal,) = (entry["steal"] for entry in held.house().values() if "steal" in entry)
    figures = held.thief(steal)
    assert 0 < figures["answered"] <= 1 and figures["fidelity"] > 0.1
    settings = preset("smoke", held.group.image_shape)
    spent = []

    def greedy(gateway, proxy, seeds):
        spent.append((len(gateway.gateways), gateway.budget))
        return Knockoff(proxy, settings.architecture, settings.round_train).run(gateway).substitute

    held.thief(greedy)
    assert spent == [(3, 210)]


def test_bad_input_is_said(held, folder):
    with pytest.raises(SystemExit, match="is no folder"):
        main([str(folder / "none")])
    with pytest.raises(SystemExit, match="as many proxy images"):
        main([str(folder), "--tier", "smoke", "--queries", "100000"])
    with pytest.raises(ValueError, match="5 images got 2 scores"):
        contest._scores(lambda x: torch.zeros(2), torch.zeros(5, 1, 8, 8, dtype=torch.uint8))

"""The program of book/servers.md that gives model and detector to deployments of their own: two guards decide as one
would."""

import os
import re
import sys
from pathlib import Path

import httpx
import pytest
import torch
from conftest import TINY_SAME, fit_beside
from serving import noise
from test_servers import free_port, processes

from samelib import BanAccount, Defence, SamePlus
from samelib.service.client import as_png

PAGE = (Path(__file__).parents[2] / "book" / "servers.md").read_text(encoding="utf-8")
PROGRAM = re.search(r":name: ray-apart\n:caption: apart.py\n\n(.*?)^```$", PAGE, re.M | re.S)[1]
RUN = """
import sys, time, ray
from ray import serve
import apart

ray.init(num_cpus=4, include_dashboard=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(apart.deployment({"folder": sys.argv[2], "guards": 2}))
time.sleep(3600)
"""
VICTIM = """
from samelib.detectors import load_detector

victim = load_detector({folder!r}).victim
"""


@pytest.fixture(scope="module")
def plus(group, victim, store) -> SamePlus:
    return fit_beside(SamePlus(TINY_SAME), group, victim, store)


def test_two_guards_decide_as_one_would(plus, group, tmp_path):
    folder = plus.save(tmp_path / "detector")
    for name, text in (("apart.py", PROGRAM), ("run.py", RUN), ("victim.py", VICTIM.format(folder=str(folder)))):
        (tmp_path / name).write_text(text)
    thief, honest = noise(30, 0, group.image_shape), group.benign_test.images[:10]
    order = [("thief", image) for image in thief] + [("honest", image) for image in honest]
    one = Defence(plus.victim, plus, BanAccount())
    refused = [bool(one.judge(image[None], accounts=[account]).refused) for account, image in order]
    assert any(refused) and not all(refused[:30]) and not any(refused[30:])

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, tmp_path / "run.py", port, tmp_path]
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    given = {"SAMELIB_SECRET": "a secret of tests", "PYTHONPATH": paths}
    with processes({tmp_path / "ray.log": command}, [f"{url}/docs"], **given):
        answers = []
        for account, image in order:  # over a new connection each: any replica may get it
            form = {"image": ("x.png", as_png(image), "image/png")}
            answers.append(httpx.post(f"{url}/predict", files=form, headers={"X-API-Key": account}, timeout=60))
    assert [answer.status_code for answer in answers] == [403 if no else 200 for no in refused]
    rows = torch.tensor(answers[-1].json()["probabilities"])
    assert torch.allclose(rows, plus.victim(honest[-1:] / 127.5 - 1)[0], atol=1e-5)

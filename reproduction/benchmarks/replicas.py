"""Queries a second with one and with two replicas of the detector, in Ray Serve, turn by turn in one run.

    make servers; _build/servers/bin/python reproduction/benchmarks/replicas.py

Runs the program of book/servers.md that gives model and detector to deployments of their own, with the lecture tier's
`SamePlus` on `glyphs`. Clients, Ray and all replicas share the cores of one machine: what counts is the ratio, and how
many cores there are.
"""

import os
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from statistics import median

import httpx
import ray
from ray import serve

from samelib import SamePlus, load_group, train_victim
from samelib.service.client import as_png

PAGE = Path(__file__).parents[2] / "book" / "servers.md"
VICTIM = "from samelib.detectors import load_detector\n\nvictim = load_detector({folder!r}).victim\n"
CLIENTS, SECONDS, TURNS, PORT = 16, 15, 4, 8765


def prepare(folder: Path, group) -> None:
    """The program of the page, and what it reads."""
    program = re.search(r":name: ray-apart\n:caption: apart.py\n\n(.*?)^```$", PAGE.read_text(), re.M | re.S)[1]
    victim = train_victim(group)
    detector = SamePlus.preset("lecture", group.image_shape).fit(group.victim_train, group.calibration, victim)
    for replicas in "12":
        detector.save(folder / replicas / "detector")
    (folder / "apart.py").write_text(program)
    (folder / "victim.py").write_text(VICTIM.format(folder=str(folder / "1" / "detector")))


def turn(replicas: str, files: list[bytes]) -> float:
    """Answered queries a second."""
    end, url = time.monotonic() + SECONDS, f"http://127.0.0.1:{PORT}/{replicas}/predict"

    def client(number: int) -> int:
        answered, images = 0, cycle(files[number::CLIENTS])
        with httpx.Client(timeout=60, headers={"X-API-Key": f"user {number}"}) as http:
            while time.monotonic() < end:
                answer = http.post(url, files={"image": ("x.png", next(images), "image/png")})
                answered += answer.raise_for_status().status_code == 200
        return answered

    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(pool.map(client, range(CLIENTS))) / SECONDS


def main() -> None:
    group = load_group("glyphs")
    files = [as_png(image) for image in group.benign_test.images]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, group)
        paths = os.pathsep.join([name, os.environ.get("PYTHONPATH", "")])
        environment = {"PYTHONPATH": paths, "SAMELIB_SECRET": "a secret of this benchmark", "OMP_NUM_THREADS": "1"}
        os.environ |= environment
        sys.path.insert(0, name)
        import apart

        ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        for replicas in "12":
            deployed = apart.deployment({"folder": str(folder / replicas), "guards": replicas})
            serve.run(deployed, name=replicas, route_prefix=f"/{replicas}")
            turn(replicas, files)  # what is loaded lazily is loaded
        rates = [(turn("1", files), turn("2", files)) for _ in range(TURNS)]
        serve.shutdown()
        ray.shutdown()
    ratios = [two / one for one, two in rates]
    print(
        f"{os.cpu_count()} cores; one: {median(one for one, _ in rates):.0f}, two: {median(two for _, two in rates):.0f} queries a second"
    )
    print(f"ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), {TURNS} turns of {SECONDS} s")


if __name__ == "__main__":
    main()

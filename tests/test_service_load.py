"""The load generator, for a moment: it asks, solves what it is asked, and says how long that took."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from serving import Ranked

import reproduction
from samelib.models.classifiers import Victim
from samelib.responses import ProofOfWork
from samelib.service.app import create_app
from samelib.service.server import running


@pytest.mark.slow
def test_locust_asks_and_solves():
    victim = Victim(lambda x: x.flatten(1)[:, :10].softmax(1), (1, 28, 28), 10)
    locustfile = Path(reproduction.__file__).parent / "benchmarks" / "service.py"
    options = ["--headless", "--skip-log", "--json", "--users", "3", "--spawn-rate", "3", "--run-time", "5s"]
    with running(create_app(victim, Ranked(victim.image_shape), ProofOfWork(4, 0))) as url:
        command = [sys.executable, "-m", "locust", "-f", str(locustfile), *options, "--host", url, "--images", "2"]
        records = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=120).stdout)
    requests = {record["name"]: record for record in records}
    queries = requests["query"]["num_requests"]
    assert queries > 3 and requests["/v1/predict"]["num_requests"] >= 2 * queries
    assert requests["query"]["total_content_length"] > 8 * queries  # 2^4 hashes for each of two images, on average
    assert not any(record["num_failures"] for record in records)

import io
import logging
import runpy
import warnings
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from serving import (
    INFER,
    WORK,
    Ranked,
    as_files,
    as_tensors,
    ask,
    connect,
    fault,
    grey,
    metrics,
    noise,
    probabilities,
    quarters,
    read_all,
    results,
    right,
    service,
)

import samelib.service
from samelib.data.image_set import to_float
from samelib.models.classifiers import Victim
from samelib.responses import ProofOfWork, Reject
from samelib.service.app import create_app
from samelib.service.client import as_png
from samelib.service.intake import Limits
from samelib.service.server import running
from samelib.service.stamps import read_challenge, solve


@pytest.fixture(scope="module")
def client():
    """Of a service that refuses 5 % and takes 8 images at a time."""
    with service(response=Reject(0.05), limits=Limits(images=8)) as client:
        yield client


@pytest.fixture
def fresh():
    """The same, new: its metrics are zero."""
    with service(response=Reject(0.05), limits=Limits(images=8)) as client:
        yield client


@pytest.mark.parametrize("count", [1, 2, 8])
def test_each_image_gets_the_victims_probabilities_in_order(client, count):
    images = noise(count, seed=count)
    assert right(ask(client, images), images)


def test_a_real_detector_and_victim(victim, detector, group):
    images = group.benign_test.images[:40]
    flagged = detector.flag(to_float(images))
    with running(create_app(victim, detector, Reject(detector.fpr))) as url, httpx.Client(base_url=url) as http:
        found = results(ask(http, images))
    assert [result["status"] == "refused" for result in found] == flagged.tolist()
    expected = victim(to_float(images[~flagged]))
    answers = torch.tensor([result["probabilities"] for result in found if result["status"] == "answered"])
    assert torch.allclose(answers, expected, atol=1e-5)


def test_jpeg(client):
    file = io.BytesIO()
    Image.fromarray(noise(1, 5)[0, 0].numpy()).save(file, "JPEG", quality=60)
    with Image.open(file) as image:
        unpacked = torch.from_numpy(np.array(image))[None, None]
    sent = client.post("/v1/predict", files=[("image", ("x.jpg", file.getvalue(), "image/jpeg"))])
    assert right(sent, unpacked) and not torch.equal(unpacked, noise(1, 5))


def test_colour_channels_keep_their_places():
    shape = (3, 4, 6)
    victim = Victim(lambda x: x.mean((2, 3)).softmax(1), shape, 3)
    images = noise(4, 1, shape)
    images[0], images[0, 1] = 0, 255  # green
    with running(create_app(victim)) as url, httpx.Client(base_url=url) as http:
        answers = probabilities(ask(http, images))
        assert answers[0].argmax() == 1 and torch.allclose(answers, to_float(images).mean((2, 3)).softmax(1), atol=1e-6)
        palette = io.BytesIO()
        Image.fromarray(images[0].permute(1, 2, 0).contiguous().numpy()).convert("P").save(palette, "PNG")
        sent = http.post("/v1/predict", files=[("image", ("x.png", palette.getvalue(), "image/png"))])
        assert probabilities(sent)[0].argmax() == 1


def test_strange_images_are_refused_and_the_others_answered(client):
    images = grey(70, 240, 127, 255)
    found = results(ask(client, images))
    assert [result["status"] for result in found] == ["answered", "refused", "answered", "refused"]
    assert [set(result) for result in found[:2]] == [{"status", "probabilities"}, {"status"}]
    assert np.allclose(found[2]["probabilities"], quarters(to_float(images[2:3]))[0])


def test_challenge_then_stamp_then_answer():
    images = grey(0, 255)
    with service(response=WORK) as client:
        asked = results(ask(client, images))
        assert [set(result) for result in asked] == [{"status", "challenge", "bits"}] * 2
        bits = [result["bits"] for result in asked]
        assert bits == [read_challenge(result["challenge"]).bits for result in asked]
        assert bits == [WORK.base_bits, WORK.base_bits + WORK.most_bits]  # the stranger one costs more
        stamps = [solve(result["challenge"])[0] for result in asked]
        assert right(ask(client, images, stamps), images)


def test_what_is_free_needs_no_stamp():
    with service(response=ProofOfWork(0, 4)) as client:
        found = results(ask(client, grey(0, 255)))
    assert [result["status"] for result in found] == ["answered", "challenge"]


def test_a_watched_service_answers_everything_and_counts():
    images = grey(0, 255)
    with service(detector=Ranked()) as client:
        assert right(ask(client, images), images)
        assert metrics(client)["samelib_p_value_count",] == 2


def test_what_the_service_says_of_itself(client):
    assert client.get("/v1/model").json() == {"image_shape": [1, 8, 8], "classes": 4, "most_images": 8}
    described = client.get("/openapi.json").json()
    form = described["components"]["schemas"]["ImageForm"]
    assert (form["required"], form["properties"]["image"]["maxItems"]) == (["image"], 8)
    assert {"/v1/predict", INFER} < set(described["paths"])
    page = client.get("/docs")
    assert page.status_code == 200 and "openapi.json" in page.text


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/", 404), ("GET", "/v1/predict", 405)])
def test_other_paths_and_methods(client, method, path, status):
    answer = client.request(method, path)
    assert fault(answer) == (status, "http")
    assert status != 405 or answer.headers["allow"] == "POST"


def test_metrics_count_what_happened(fresh):
    ask(fresh, grey(0, 255, 120))
    fresh.post(INFER, **as_tensors(grey(0)))
    fresh.post(INFER, content=b"[", headers={"content-type": "application/json"})
    fresh.post("/v1/predict", **as_files(grey(0), ["no stamp"]))
    answer = fresh.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    values = metrics(fresh)
    requests = {key[1]: value for key, value in values.items() if key[0] == "samelib_requests_total"}
    assert requests == {"200": 2, "422": 1, "403": 1}
    images = {key[1]: value for key, value in values.items() if key[0] == "samelib_images_total"}
    assert images == {"answered": 3, "refused": 1}
    assert values["samelib_refused_stamps_total", "malformed"] == 1
    assert (values["samelib_request_seconds_count",], values["samelib_p_value_count",]) == (4, 4)
    assert values["samelib_p_value_bucket", "0.01"] == 1  # 1 / 200, of the white image
    assert (values["samelib_queue_images",], values["samelib_spent_stamps",]) == (0, 0)


MARK = "mArKeR5150"


def send_marks(client) -> list[str]:
    """The same word in every place of a request where a client can put one; what the service says to that."""
    image = as_png(noise(1)[0])
    form = {"content-type": "multipart/form-data; boundary=b"}
    broken = f'--b\r\nContent-Disposition[: form-data; name="{MARK}"\r\n\r\n{MARK}\r\n--b--\r\n'.encode()
    tensors = as_tensors(noise(1))["json"]["inputs"]
    answers = [
        client.get(f"/{MARK}", params={MARK: MARK}, headers={MARK: MARK, "user-agent": MARK, "cookie": MARK}),
        client.request(MARK.upper(), "/v1/predict"),
        client.post("/v1/predict", content=MARK, headers={"content-type": f"text/{MARK}", "content-encoding": MARK}),
        client.post("/v1/predict", content=MARK, headers={"content-type": f"multipart/form-data; boundary={MARK}"}),
        client.post("/v1/predict", content=broken, headers=form),
        client.post("/v1/predict", files=[("image", (f"../../{MARK}", MARK.encode(), MARK))]),
        client.post("/v1/predict", files=[("image", (MARK, image, MARK))], data={"stamp": MARK}),
        client.post("/v1/predict", files=[("image", (MARK, image, MARK))], data={MARK: MARK}),
        client.post(f"/v2/models/{MARK}/infer", json={}),
        client.post(INFER, content=f'{{"{MARK}', headers={"content-type": "application/json"}),
        client.post(INFER, json={MARK: [MARK], "inputs": [MARK], "outputs": [{"name": MARK}], "parameters": MARK}),
        client.post(INFER, json={"inputs": [{"name": MARK, "shape": [MARK], "datatype": MARK, "data": MARK}]}),
        client.post(INFER, json={"inputs": [tensors[0] | {"data": [MARK]}]}),
        client.post(INFER, **as_tensors(noise(1), [MARK])),
    ]
    with connect(client) as connection:
        connection.sendall(f"{MARK}\r\n\r\n".encode())
        assert read_all(connection).startswith(b"HTTP/1.1 400")
    with connect(client) as connection:
        head = f"POST /v1/predict?{MARK} HTTP/1.1\r\nHost: {MARK}\r\nContent-Length: 100\r\nUpgrade: {MARK}\r\n\r\n"
        connection.sendall(f"{head}{MARK}".encode())
    assert right(ask(client, noise(1)), noise(1))  # and the service is alive
    assert all(400 <= answer.status_code < 500 for answer in answers)
    return [answer.text for answer in answers]


def test_nothing_from_a_client_gets_into_logs_metrics_or_answers(fresh, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):  # uvicorn keeps its own to itself
        logging.getLogger(name).addHandler(caplog.handler)
    try:
        shown = [*send_marks(fresh), fresh.get("/metrics").text]
    finally:
        for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
            logging.getLogger(name).removeHandler(caplog.handler)
    written = capfd.readouterr()
    ours = [record for record in caplog.records if not record.name.startswith("http")]  # httpx is the client
    assert any("Invalid HTTP request" in record.getMessage() for record in ours)  # the log was watched
    for text in (*(record.getMessage() for record in ours), written.out, written.err, *shown):
        assert MARK.lower() not in text.lower()
    assert not any(record.exc_info for record in ours)  # and what clients do wrong is no fault of the service


SOURCES = sorted(Path(samelib.service.__file__).parent.glob("*.py"))


def test_nothing_is_pickled():
    assert len(SOURCES) > 7
    for source in SOURCES:
        for word in ("pickle", "marshal", "shelve", "torch.load", "eval(", "exec("):
            assert word not in source.read_text(), f"{word} in {source.name}"


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_importing_the_service_changes_nothing_of_its_host(source):
    """Neither the filters of warnings nor the levels of loggers."""
    with warnings.catch_warnings():
        warnings.resetwarnings()
        logging.getLogger("python_multipart").setLevel(logging.NOTSET)
        runpy.run_path(str(source))
        assert not warnings.filters
        assert logging.getLogger("python_multipart").level == logging.NOTSET


@pytest.mark.parametrize(
    ("limits", "words"), [({"images": 0}, "images must be positive"), ({"queue": 3}, "cannot take a request of 64")]
)
def test_bad_limits_are_refused(limits, words):
    with pytest.raises(ValueError, match=words):
        Limits(**limits)


def test_a_detector_of_another_victim_is_refused(detector):
    for victim, words in (
        (Victim(quarters, (1, 8, 8), 10), r"\(1, 8, 8\)"),
        (Victim(quarters, (1, 28, 28), 4), "4 cl"),
    ):
        with pytest.raises(ValueError, match=words):
            create_app(victim, detector)
    with pytest.raises(ValueError, match="needs a detector"):
        create_app(Victim(quarters, (1, 8, 8), 4), None, Reject())


def test_a_name_that_is_no_part_of_a_path_is_refused():
    with pytest.raises(ValueError, match="letters, digits"):
        create_app(Victim(quarters, (1, 8, 8), 4), name="a/b")

"""What the dashboard of book/grafana.json shows while a service is robbed, drawn without Grafana.

    python reproduction/benchmarks/dashboard.py book/figures/dashboard.png

Ten honest users ask a guarded service, a thief joins them, and opens a new account whenever the last is banned. The
metrics are read once a second; a rate is over 20 seconds, where the dashboard takes minutes.
"""

import sys
import time
from itertools import count, cycle

import httpx
import matplotlib.pyplot as plt
import numpy as np
from fastapi import FastAPI, UploadFile
from prometheus_client.parser import text_string_to_metric_families

from samelib import BanAccount, SamePlus, load_group, train_victim
from samelib.data.image_set import to_float
from samelib.plots import COLOURS, LINES, use_style
from samelib.service.client import as_png
from samelib.service.intake import Limits, decode_images
from samelib.service.middleware import METRICS, Guarded, multipart_images
from samelib.service.server import running

SECONDS, THIEF_COMES, WINDOW = 120, 40, 20
HONEST, ROBBED = 6, 6  # queries a second
STYLES = [{"color": colour, "linestyle": line} for colour, line in zip(COLOURS, LINES, strict=True)]


def guarded_service(group) -> FastAPI:
    victim = train_victim(group)
    detector = SamePlus.preset("lecture", group.image_shape).fit(group.victim_train, group.calibration, victim)
    app = FastAPI()
    app.state.limits = Limits()

    @app.post("/predict")
    def predict(files: list[UploadFile]):
        images = decode_images([file.file.read() for file in files], group.image_shape)
        return {"probabilities": victim(to_float(images)).tolist()}

    decode = multipart_images(group.image_shape, "files")
    app.add_middleware(Guarded, detector=detector, response=BanAccount(), decode=decode)
    return app


def rob(client: httpx.Client, honest, stolen) -> list[dict]:
    """One reading of the metrics a second: (name, labels) -> value."""
    users, thieves = cycle(f"user {number}" for number in range(10)), (f"thief {number}" for number in count())
    thief, readings, start = next(thieves), [], time.monotonic()
    for second in range(SECONDS):
        for _ in range(HONEST):
            ask(client, next(honest), next(users))
        for _ in range(ROBBED if second >= THIEF_COMES else 0):
            if ask(client, next(stolen), thief).status_code == 403:
                thief = next(thieves)
        readings.append(read(client))
        time.sleep(max(0.0, start + second + 1 - time.monotonic()))
    return readings


def ask(client: httpx.Client, image, account: str) -> httpx.Response:
    files = [("files", ("x.png", as_png(image), "image/png"))]
    return client.post("/predict", files=files, headers={"X-API-Key": account})


def read(client: httpx.Client) -> dict:
    families = text_string_to_metric_families(client.get(METRICS).text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def series(readings: list[dict], *name: str) -> np.ndarray:
    return np.array([reading.get(name, 0.0) for reading in readings])


def rate(values: np.ndarray) -> np.ndarray:
    """Growth a second over the window before; of the seconds that have a whole one."""
    return (values[WINDOW:] - values[:-WINDOW]) / WINDOW


def labels(readings: list[dict], name: str) -> list[tuple]:
    return sorted({key for reading in readings for key in reading if key[0] == name})


def draw(readings: list[dict]):
    use_style()
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.4), sharex=True, layout="constrained")
    seconds = np.arange(1, len(readings) + 1)
    later = seconds[WINDOW:]
    small, shares, outcomes, wealth = axes.flat

    total = rate(series(readings, "samelib_p_value_count"))
    for bound, style in zip(("0.05", "0.01"), STYLES, strict=False):
        part = rate(series(readings, "samelib_p_value_bucket", bound))
        small.plot(later, 100 * part / total, **style, label=f"p up to {bound}")
    small.axhline(5, color="black", linewidth=0.8)
    small.set(ylabel="% of queries", title="Small p-values (line: 5 %)")
    small.legend(loc="upper left")

    bounds = [
        key
        for key in labels(readings, "samelib_p_value_bucket")
        if key[1] in ("0.05", "0.1", "0.3", "0.5", "0.9", "+Inf")
    ]
    for key, style in zip(sorted(bounds, key=lambda key: float(key[1])), STYLES, strict=False):
        shares.plot(later, 100 * rate(series(readings, *key)) / total, **style, label=key[1].replace("+Inf", "1"))
    shares.set(ylabel="% of queries", title="P-values up to …")
    shares.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    for key, style in zip(labels(readings, "samelib_images_total"), STYLES, strict=False):
        outcomes.plot(later, rate(series(readings, *key)), **style, label=key[1])
    outcomes.set(xlabel="seconds", ylabel="images a second", title="Images by outcome")
    outcomes.legend()

    for key, style in zip(labels(readings, "samelib_account_log_wealth")[:3], STYLES, strict=False):
        wealth.plot(seconds, series(readings, *key), **style, label=f"no. {key[1]}")
    bans = series(readings, "samelib_bans_total")
    for second in seconds[1:][np.diff(bans) > 0]:
        wealth.axvline(second, color="black", linewidth=0.6, alpha=0.5)
    wealth.set(xlabel="seconds", ylabel="log wealth", title=f"Nearest to a ban (lines: {bans[-1]:.0f} bans)")
    wealth.legend()
    return figure


def main() -> None:
    group = load_group("glyphs")
    honest, stolen = (cycle(images.images) for images in (group.benign_test, group.proxy))
    with running(guarded_service(group)) as url, httpx.Client(base_url=url, timeout=60) as client:
        readings = rob(client, honest, stolen)
    draw(readings).savefig(sys.argv[1], dpi=160)
    last = readings[-1]
    print({key: value for key, value in last.items() if key[0] in ("samelib_images_total", "samelib_bans_total")})


if __name__ == "__main__":
    main()

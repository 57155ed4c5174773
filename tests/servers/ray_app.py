"""Ray Serve, with both models under paths of their own, because Ray starts slowly: python ray_app.py PORT"""

import sys
import time

import numpy as np
import ray
import torch
from defended import CASES, answer
from fastapi import FastAPI, UploadFile
from PIL import Image
from ray import serve

from samelib.service.middleware import Guarded, multipart_images


def service(case: str) -> serve.Application:
    victim, guarded = CASES[case]()
    app = FastAPI()
    app.add_middleware(Guarded, decode=multipart_images(victim.image_shape, "images"), **guarded)

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    @serve.ingress(app)
    class Service:
        @app.post("/predict")
        async def predict(self, images: list[UploadFile]):
            return answer(
                victim, torch.from_numpy(np.stack([Image.open(image.file).convert("L") for image in images]))[:, None]
            )

    return Service.bind()


if __name__ == "__main__":
    ray.init(num_cpus=1, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run_many([serve.RunTarget(service(case), name=case, route_prefix=f"/{case}") for case in CASES])
    while True:
        time.sleep(60)

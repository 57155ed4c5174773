"""BentoML: bentoml serve bento_service:Service, where CASE says which model."""

import os

import bentoml
import numpy as np
import torch
from defended import CASES, answer
from PIL.Image import Image

from samelib.service.middleware import Guarded, multipart_images

victim, guarded = CASES[os.environ["CASE"]]()


@bentoml.service
class Service:
    @bentoml.api
    def predict(self, images: list[Image]) -> dict:
        return answer(victim, torch.from_numpy(np.stack([image.convert("L") for image in images]))[:, None])


Service.add_asgi_middleware(Guarded, decode=multipart_images(victim.image_shape, "images"), **guarded)

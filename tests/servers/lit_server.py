"""LitServe, with Guarded as one of its middlewares: python lit_server.py CASE PORT"""

import os
import sys

import litserve as ls
import torch
from defended import CASES, SECRET, answer

from samelib.service.middleware import Guarded
from samelib.service.stamps import SpentStamps, StampOffice


def pixels(body: dict) -> torch.Tensor:
    """For the model and for Guarded: they read a request in one way."""
    return torch.tensor(body["images"], dtype=torch.uint8)


async def decode(request):
    return pixels(await request.json())


def guard(app):
    """Made in each process that answers: LitServe forks these, and the connection to a file would not survive that."""
    office = StampOffice(SECRET, spent=SpentStamps(os.environ["STAMPS"]))
    return Guarded(app, decode=decode, office=office, **CASES["tiny"]()[1])


class Api(ls.LitAPI):
    def setup(self, device):
        self.victim, _ = CASES[sys.argv[1]]()

    def decode_request(self, request):
        return pixels(request)

    def predict(self, x):
        return answer(self.victim, x)

    def encode_response(self, output):
        return output


if __name__ == "__main__":
    case, port = sys.argv[1:]
    if case == "tiny":
        middleware, running = guard, {"num_api_servers": 2}
    else:
        middleware = (Guarded, {"decode": decode, **CASES[case]()[1]})
        running = {}
    server = ls.LitServer(Api(), accelerator="cpu", middlewares=[middleware])
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, **running)

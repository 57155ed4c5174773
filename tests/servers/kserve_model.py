"""A model for KServe's server: python kserve_model.py --http_port PORT --enable_grpc false"""

import numpy as np
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
from kserve.utils.utils import generate_uuid
from numpy_model import labels, quarters


class Quarters(Model):
    def __init__(self):
        super().__init__("quarters")
        self.ready = True

    def predict(self, payload: InferRequest, headers=None, response_headers=None) -> InferResponse:
        rows = quarters(payload.inputs[0].as_numpy())
        outputs = []
        for name, datatype, values in (
            ("probabilities", "FP32", rows),
            ("labels", "BYTES", np.array(labels(rows), object)),
        ):
            outputs.append(InferOutput(name, list(values.shape), datatype))
            outputs[-1].set_data_from_numpy(values, binary_data=False)
        # It puts into bytes which outputs the client wants so.
        return InferResponse(
            payload.id or generate_uuid(),
            self.name,
            outputs,
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )


if __name__ == "__main__":
    ModelServer().start([Quarters()])

"""A model for MLServer: mlserver start FOLDER, where model-settings.json names this class."""

from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse
from numpy_model import labels, quarters


class Quarters(MLModel):
    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        rows = quarters(NumpyCodec.decode_input(payload.inputs[0]))
        outputs = [NumpyCodec.encode_output("probabilities", rows), StringCodec.encode_output("labels", labels(rows))]
        return InferenceResponse(model_name=self.name, outputs=outputs)

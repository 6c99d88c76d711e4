"""The model as the objective sees it: noisy latents and a batch in, velocity out."""

from torch import Tensor

from library.data.batches import Batch
from library.models.flux import FluxTransformer
from library.models.predict import predict


class Predictor:
    """Calls the one predict function with a batch's cached text and condition."""

    def __init__(self, transformer: FluxTransformer):
        self.transformer = transformer

    def __call__(self, noisy: Tensor, t: Tensor, batch: Batch, guidance: Tensor) -> Tensor:
        """(B, 16, h, w), (B,), batch, (B,) -> (B, 16, h, w)."""
        text = batch.text.to(self.transformer.device)
        condition = batch.condition.to(self.transformer.device)
        return predict(self.transformer, noisy, t, text, condition, guidance)

"""The model as the objective sees it: noisy latents and a batch in, velocity out."""

from torch import Tensor, nn

from library.data.batches import Batch
from library.models.flux import FluxTransformer
from library.models.predict import predict
from library.models.text import TextEmbeddings


class Predictor:
    """Calls the one predict function with a batch's cached text and condition.

    clip: CLIP-L, where it is trained; the pooled text is then computed from the cached token ids in every step.
    """

    def __init__(self, transformer: FluxTransformer, clip: nn.Module | None = None):
        self.transformer = transformer
        self.clip = clip

    def __call__(self, noisy: Tensor, t: Tensor, batch: Batch, guidance: Tensor) -> Tensor:
        """(B, 16, h, w), (B,), batch, (B,) -> (B, 16, h, w)."""
        text = batch.text.to(self.transformer.device)
        if self.clip is not None:
            text = TextEmbeddings(text.t5, self.pooled(batch.clip_ids))
        condition = batch.condition.to(self.transformer.device)
        return predict(self.transformer, noisy, t, text, condition, guidance)

    def pooled(self, clip_ids: Tensor) -> Tensor:
        """CLIP's pooled vectors (B, P) of token ids (B, 77), as its network makes them now."""
        assert self.clip is not None
        return self.clip(clip_ids.to(self.transformer.device).long()).pooler_output

"""The model as the objective sees it: noisy latents and a batch in, velocity out."""

import torch
from torch import Tensor, nn

from library.data.batches import Batch
from library.models.flux import FluxTransformer, Modulation
from library.models.predict import predict, prepare
from library.models.text import TextEmbeddings


class Predictor:
    """Calls the one predict function with a batch's cached text and condition.

    clip: CLIP-L, where it is trained; the pooled text is then computed from the cached token ids in every step.
    """

    def __init__(self, transformer: FluxTransformer, clip: nn.Module | None = None):
        self.transformer = transformer
        self.clip = clip
        self._ahead: dict[int, tuple[Batch, Modulation]] = {}

    @property
    def works_ahead(self) -> bool:
        """Whether modulation is computed on the CPU while the device is busy with the batch before.

        It is where its weights live in RAM beside a device, and nothing that it depends on is trained.
        """
        home = {linear.device.type for linear in self.transformer.vector_linears()}
        return home == {"cpu"} and self.transformer.device.type != "cpu" and self.modulation_is_frozen

    @property
    def modulation_is_frozen(self) -> bool:
        """Whether no gradient goes through modulation: neither its linears, nor the embedders, nor CLIP are trained."""
        return self.clip is None and all(linear.adapter is None for linear in self.transformer.vector_linears())

    @torch.no_grad()
    def prepare(self, batch: Batch, t: Tensor, guidance: Tensor) -> None:
        """Compute a coming batch's modulation. Called from the thread that reads batches ahead."""
        self._ahead[batch.position] = batch, prepare(self.transformer, t, batch.text, guidance)

    def __call__(self, noisy: Tensor, t: Tensor, batch: Batch, guidance: Tensor) -> Tensor:
        """(B, 16, h, w), (B,), batch, (B,) -> (B, 16, h, w)."""
        text = batch.text.to(self.transformer.device)
        if self.clip is not None:
            text = TextEmbeddings(text.t5, self.pooled(batch.clip_ids))
        condition = batch.condition.to(self.transformer.device)
        ours, modulation = self._ahead.get(batch.position, (None, None))
        if ours is batch:
            del self._ahead[batch.position]
        else:  # a held-out batch: its position is another count
            modulation = None
        return predict(self.transformer, noisy, t, text, condition, guidance, modulation)

    def pooled(self, clip_ids: Tensor) -> Tensor:
        """CLIP's pooled vectors (B, P) of token ids (B, 77), as its network makes them now."""
        assert self.clip is not None
        return self.clip(clip_ids.to(self.transformer.device).long()).pooler_output

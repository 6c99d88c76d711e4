"""JOB 1: images, masks and captions -> cache. The only job that loads a VAE encoder and text encoders.

Everything the user gave is looked at before a model is loaded; then text and images are encoded one after the other,
so that the text encoders and the VAE are never in memory together. Importing this imports no torch.
"""

from library.caching.run import run

__all__ = ["run"]

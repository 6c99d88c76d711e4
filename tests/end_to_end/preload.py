"""What every command of InFlux imports in the end: loaded once by the fork server, so that a test's process starts at
once. Each test still runs the real script in a process of its own."""

import bitsandbytes  # noqa: F401
import diffusers  # noqa: F401
import torch
import transformers  # noqa: F401
from diffusers import AutoencoderKL  # noqa: F401
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast  # noqa: F401

torch.set_num_threads(1)

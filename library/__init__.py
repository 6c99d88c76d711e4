"""InFlux, in reading order.

errors, files, tensorfile   what the user can mend; files that are whole or not there; safetensors headers
config/        what the user may say (imports no torch)
flow/          the mathematics: packing, timesteps, velocity and loss, Euler sampling, keyed draws
conditioning/  how the source image reaches the model: edit, mask, spatial
memory/        how it fits: linears in any precision, checkpointing, streaming, the estimate
models/        the base model: checkpoint layouts, the transformer, text encoders, VAE
networks/      what is trained: LoRA, LyCORIS, x_embedder, targets, files
data/          files on disk -> cached entries -> batches
sampling       condition -> latents -> image, for previews and inference
caching/       job 1: images, masks and captions -> cache
training/      job 2: cache -> LoRA
inference/     job 3: LoRA + image + prompt -> image
"""

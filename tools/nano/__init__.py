"""How the nano base was made: scenes, text encoders, VAE, transformer, export, model card (see build.py)."""

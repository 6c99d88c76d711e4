"""CONDITION -> LATENTS -> PICTURE: what previews and inference share.

fit says which sizes a picture passes through (without torch), pixels brings files in and out, denoise is the run.
"""

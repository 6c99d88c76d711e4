"""How the source image reaches the model: edit, mask and spatial conditioning."""

"""The base model: checkpoint layouts and key maps, the transformer, the text encoders, the VAE.

`base.Base` finds the parts of a base model and loads them; `predict.predict` is the one function that training,
previews and inference call.
"""

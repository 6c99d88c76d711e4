"""The mathematics: packing, timesteps, velocity and loss, Euler sampling, keyed draws. Pure functions of tensors."""

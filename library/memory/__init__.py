"""How a 12-billion-parameter base fits on a small card: linears in any precision, recomputation, streaming, the plan.

Nothing here knows FLUX: it works on `Linear` layers and on residual blocks (`checkpoint.Segment`).
"""

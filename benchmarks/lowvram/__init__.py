"""Peak VRAM, peak RAM, seconds per step and bytes over PCIe of FLUX.1 Fill training, for every way to keep the base.

`python -m benchmarks.lowvram` needs a CUDA card and no checkpoint: the full-size model has random weights, made on the
device. It measures the card's ceilings, then one arm after the other, each in a process of its own, and settles every
target. `--toy` runs the same code at toy size on a CPU.

  arms.py      what is measured, the most important first
  run.py       the arms one after the other, within the time
  child.py     one arm, in a process of its own
  trainer.py   an arm of InFlux: the whole trainer over a synthetic batch
  peers.py     an arm of diffusers + PEFT
  ceilings.py  what the card can do at best
  floors.py    what a step must at least hold and take
  targets.py   met, missed or not measured
  report.py    the Markdown and the JSON
"""

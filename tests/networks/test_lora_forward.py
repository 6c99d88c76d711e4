"""Our LoRA's counted cost stays below PEFT's and LyCORIS's; the committed figures pass the benchmark's own gates."""

import json

from benchmarks.counters import count
from benchmarks.lora_forward import ARMS, RESULT, Arm, Setting, failures, make_step, saved_bytes


def test_counts_are_below_the_others() -> None:
    setting, arms = Setting(hidden=128, single_blocks=1, image_tokens=16, text_tokens=8, rank=4), {}
    for name in ARMS:
        step, parameters = make_step(setting, name)
        counts = count(step, parameters)
        arms[name] = Arm(counts.kernels, counts.traffic_gb, saved_bytes(step, parameters))
    assert failures(arms, timed=False) == []


def test_committed_figures_pass() -> None:
    content = json.loads(RESULT.read_text(encoding="utf-8"))
    assert content["setting"]["hidden"] == 1024 and content["repeats"] >= 7
    arms = {name: Arm(**{**arm, "interval": tuple(arm["interval"])}) for name, arm in content["arms"].items()}
    assert failures(arms) == []

"""All that a run must remember, into a state folder and back."""

from pathlib import Path

from library.config.resolved import differences, split
from library.errors import ConfigError
from library.training import state
from library.training.loop import Trained
from library.training.progress import Progress
from library.training.state import RunState


def collect(trained: Trained, name: str, seed: int, identity: dict[str, object], segments: list) -> RunState:
    """The state of a run at the end of a step. `segments`: how the present epoch was cut so far (see data.Epoch)."""
    optimizer, skeleton = state.optimizer_tensors(trained.optimizer.state_dict())
    tensors = {"network": trained.network.state(), "optimizer": optimizer}
    if trained.ema is not None:
        tensors["ema"] = trained.ema.averages
    scalars = {
        "output_name": name,
        "step": trained.progress.step,
        "epoch": trained.progress.epoch,
        "seed": seed,
        "progress": trained.progress.as_json(),
        "segments": segments,
        "optimizer": skeleton,
        "loss_scale": [trained.scale.value, trained.scale.good_steps] if trained.scale.acts else None,
        "ema_updates": None if trained.ema is None else trained.ema.updates,
        "identity": identity,
    }
    return RunState(tensors, scalars)


def restore(trained: Trained, saved: RunState) -> None:
    """Put a saved state into freshly made parts."""
    trained.network.load_state(saved.tensors["network"])
    skeleton = saved.scalars["optimizer"]
    trained.optimizer.load_state_dict(state.optimizer_states(saved.tensors.get("optimizer", {}), skeleton))
    trained.progress.__dict__.update(Progress.from_json(saved.scalars["progress"]).__dict__)
    if trained.scale.acts and saved.scalars["loss_scale"] is not None:  # mixed_precision may have changed
        trained.scale.value, trained.scale.good_steps = saved.scalars["loss_scale"]
    if trained.ema is not None:
        assert saved.scalars["ema_updates"] is not None, "use_ema is part of a run's identity"
        trained.ema.load(saved.tensors["ema"], saved.scalars["ema_updates"])


def refuse_other_run(folder: Path, scalars: dict, identity: dict[str, object]) -> None:
    """Raises ConfigError if a state was made by a run that this configuration cannot continue."""
    changed = differences(split(scalars["identity"])[0], split(identity)[0])
    if changed:
        raise ConfigError(
            f"{folder} cannot be continued with this configuration. What differs (old -> new):\n  "
            + "\n  ".join(changed)
            + "\nLearning rates, schedule, number of steps, saving, previews, memory settings and the precision of the "
            "arithmetic and the base may change; these may not. To start from its weights alone, use network_weights"
        )

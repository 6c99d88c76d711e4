"""What a run leaves behind, and how it is continued."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from library.config.table import FilePath, Strings, Table, key

if TYPE_CHECKING:
    from library.config.run import Run


class SavingTable(Table):
    """Files of the run: networks, states, metadata, hub."""

    section: ClassVar[str] = "saving"
    reads: ClassVar[str] = "train"

    output_dir: FilePath = key("flux-dreambooth-lora", path="path", reads="cache train infer", kohya="none")
    """Folder of everything the run writes."""
    output_name: str = key("last", reads="train infer")
    """Name of the network's file, without extension."""
    save_every_n_steps: int | None = key(500, ge=1, kohya="none", rerun=True)
    """Save the network every N steps. checkpointing_steps means this, with save_state."""
    save_every_n_epochs: int | None = key(None, ge=1, rerun=True)
    """Save the network every N epochs."""
    save_last_n_steps: int | None = key(None, ge=1, rerun=True, only_with="save_every_n_steps")
    """Keep only networks of the last N steps."""
    save_last_n_epochs: int | None = key(None, ge=1, rerun=True, only_with="save_every_n_epochs")
    """Keep only networks of the last N epochs."""
    save_state: bool = key(True, kohya="false", rerun=True)
    """Save the state beside each network, the last one included, so that the run can be continued or made longer."""
    save_last_n_steps_state: int | None = key(None, ge=1, rerun=True, only_with="save_state")
    """Keep only states of the last N steps; as save_last_n_steps if not set."""
    save_last_n_epochs_state: int | None = key(None, ge=1, rerun=True, only_with="save_state")
    """Keep only states of the last N epochs; as save_last_n_epochs if not set."""
    save_state_on_train_end: bool = key(False, rerun=True)
    """Save the state after the last step even where save_state is off, so that the run can be made longer."""
    checkpoints_total_limit: int | None = key(None, ge=1, rerun=True, only_with="save_state")
    """Keep at most this many states."""
    resume: str | None = key(None, aliases=("resume_from_checkpoint",), path="model", rerun=True)
    """A state to go back to: a state folder. It is taken up once, and what was made after it is moved to a folder
    set-aside-1. `latest`, and the same command run again, continue from the newest state; where there is none, a run
    begins."""
    save_format: Literal["kohya", "diffusers", "both"] = key("kohya", seed="diffusers", rerun=True)
    """Names in the file. kohya loads in ComfyUI, A1111-family programs and diffusers."""
    save_precision: Literal["float", "fp32", "fp16", "bf16"] | None = key(None, rerun=True)
    """Precision of the saved network: bf16 or fp16 as trained, or float (fp32)."""
    upcast_before_saving: bool = key(False, rerun=True)
    """Save the network in fp32, as save_precision = "float"."""
    save_workflow: bool = key(True, rerun=True)
    """Write a ComfyUI workflow beside the network."""
    no_metadata: bool = key(False, rerun=True)
    """Write only the metadata that loading needs."""
    metadata_title: str | None = key(None, rerun=True)
    """Title in the metadata; output_name if not set."""
    metadata_author: str | None = key(None, rerun=True)
    """Author in the metadata."""
    metadata_description: str | None = key(None, rerun=True)
    """Description in the metadata."""
    metadata_license: str | None = key(None, rerun=True)
    """Licence in the metadata."""
    metadata_tags: Strings = key((), rerun=True)
    """Tags in the metadata."""
    trigger_words: Strings = key((), rerun=True)
    """Words that call the network up, for the metadata and the model card."""
    metadata_thumbnail: FilePath | None = key(None, path="path", exists="train", rerun=True)
    """A picture for the metadata, which model browsers show; it is made small."""
    training_comment: str | None = key(None, rerun=True)
    """A note in the metadata."""
    push_to_hub: bool = key(False, rerun=True)
    """Upload the network and a model card to the hub at the end."""
    hub_model_id: str | None = key(None, rerun=True, only_with="push_to_hub")
    """Repository on the hub; the output folder's name under the token's account if not set."""
    hub_token: str | None = key(None, secret=True, reads="cache train infer", rerun=True)
    """Token of the hub, for downloads and uploads; better given as the environment variable HF_TOKEN. Never stored or
    printed."""
    hub_private: bool = key(True, rerun=True, only_with="push_to_hub")
    """Make a new repository private."""

    def problems(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """Names that would leave output_dir, and precisions that contradict each other."""
        if not re.fullmatch(r"[\w][\w. +-]*", self.output_name) or self.output_name.endswith((".", " ")):
            yield (
                ["output_name"],
                f'output_name = "{self.output_name}": a plain file name, without folders; the folder is output_dir.',
            )
        if self.upcast_before_saving and self.save_precision in ("fp16", "bf16"):
            yield (
                ["upcast_before_saving", "save_precision"],
                f"upcast_before_saving means fp32, but save_precision = {self.save_precision}. Remove one of them.",
            )

    def cautions(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """A secret in a file travels with the file."""
        if self.hub_token and not run.origins.get("hub_token", "--").startswith("--"):
            yield ["hub_token"], "hub_token stands in a file; the environment variable HF_TOKEN keeps it out of there."

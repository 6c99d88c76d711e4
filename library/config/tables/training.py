"""The run itself: how long, how it draws timesteps, what it minimises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from library.config.table import Range, Table, key

if TYPE_CHECKING:
    from library.config.run import Run


class TrainingTable(Table):
    """Length of the run, objective, and the draws behind it."""

    section: ClassVar[str] = "training"
    reads: ClassVar[str] = "train"

    max_train_steps: int | None = key(None, ge=1, kohya="1600", rerun=True)
    """Optimizer steps; wins over max_train_epochs."""
    max_train_epochs: int = key(1, aliases=("num_train_epochs",), ge=1, kohya="none", rerun=True)
    """Passes over the data, if max_train_steps is not set."""
    gradient_accumulation_steps: int = key(1, ge=1)
    """Batches whose gradients are averaged before one optimizer step."""
    seed: int | None = key(None, ge=0, le=2**63 - 1, reads="cache train infer")
    """Seed of every draw. Drawn once, when a run begins, and written down if not set; what the caching command draws
    (generated masks, random crops, the validation split) has seed 0 then."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = key(
        None, reads="cache train infer", kohya="no", inexact=True
    )
    """Arithmetic of the transformer. If not set: bf16 on a card that has it, otherwise no (fp32)."""
    device: str | None = key(None, reads="cache train infer", rerun=True)
    """cuda, cuda:1, mps or cpu; the first GPU if there is one, if not set."""
    allow_tf32: bool = key(False, reads="cache train infer", inexact=True)
    """Let matrix products in fp32 use TF32 on Ampere cards and later."""
    local_rank: int = key(-1, ge=-1, reads="cache train", rerun=True)
    """Rank of this process, for launchers that do not set LOCAL_RANK; -1 leaves the environment alone."""
    dataloader_num_workers: int = key(0, ge=0, aliases=("max_data_loader_n_workers",), kohya="8", rerun=True)
    """Batches that a background thread reads ahead from the cache; at least 2."""
    weighting_scheme: Literal["none", "uniform", "sigma_sqrt", "logit_normal", "mode", "cosmap"] = key(
        "none", kohya="uniform"
    )
    """logit_normal and mode choose the density of timesteps; sigma_sqrt and cosmap weigh the loss; uniform is none."""
    logit_mean: float = key(0.0, only_with="weighting_scheme=logit_normal")
    """logit_normal: mean."""
    logit_std: float = key(1.0, gt=0, only_with="weighting_scheme=logit_normal")
    """logit_normal: deviation."""
    mode_scale: float = key(1.29, only_with="weighting_scheme=mode")
    """mode: scale."""
    timestep_sampling: Literal["sigma", "uniform", "sigmoid", "shift", "flux_shift"] = key("sigma")
    """Density of timesteps. sigma leaves it to weighting_scheme; uniform, sigmoid, shift, flux_shift are densities of
    their own; flux_shift depends on the resolution."""
    sigmoid_scale: float = key(1.0, gt=0, only_with="timestep_sampling=sigmoid|shift|flux_shift")
    """sigmoid, shift, flux_shift: scale of the normal draw."""
    discrete_flow_shift: float | None = key(None, gt=0, kohya="3.0", only_with="timestep_sampling=shift|sigma")
    """shift: how far towards noise (3 if not set). sigma: shifts the table of sigmas, which is unshifted if not set."""
    min_timestep: int = key(0, ge=0, le=999)
    """Smallest timestep, of 1000."""
    max_timestep: int = key(1000, ge=1, le=1000)
    """Largest timestep, of 1000."""
    stratified_timesteps: bool = key(False)
    """Spread the draws of a batch evenly over the density."""
    guidance_scale: float = key(3.5, ge=0)
    """Value of the guidance embedding in training. Previews and inference have sample_guidance_scale."""
    guidance_scale_range: Range | None = key(None)
    """Draw the guidance of each item from [low, high] instead."""
    loss_type: Literal["l2", "l1", "huber", "smooth_l1"] = key("l2")
    """What is minimised."""
    huber_c: float = key(0.1, gt=0, only_with="loss_type=huber|smooth_l1")
    """huber and smooth_l1: where the loss turns from square to linear."""
    huber_schedule: Literal["constant", "exponential"] = key(
        "constant", kohya="snr", only_with="loss_type=huber|smooth_l1"
    )
    """huber and smooth_l1: huber_c at every timestep, or falling from 1 (no noise) to huber_c (all noise)."""
    huber_scale: float = key(1.0, gt=0, only_with="loss_type=huber|smooth_l1")
    """huber and smooth_l1: factor on huber_c."""
    masked_loss: Literal["none", "mask", "half", "changed"] = key("none")
    """Where the loss counts: everywhere, in the repainted area (mask), in the target half of a spatial canvas (half),
    or where the pair differs (changed). kohya's true means mask."""
    masked_loss_floor: float = key(0.0, ge=0, le=1, only_with="masked_loss")
    """Weight of the rest of the image with masked_loss."""
    prior_loss_weight: float = key(1.0, ge=0)
    """Weight of regularisation items (is_reg, class images)."""
    use_ema: bool = key(False)
    """Keep a running average of the trained weights and save it as well."""
    ema_decay: float = key(0.999, ge=0, lt=1, only_with="use_ema")
    """Decay of the running average."""
    ema_cpu: bool = key(False, rerun=True, only_with="use_ema")
    """Hold the running average in RAM."""
    max_nonfinite_steps: int = key(3, ge=1, rerun=True)
    """Stop after this many steps in a row whose loss or gradient is not finite."""

    def problems(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """Two densities at once, and empty ranges."""
        if self.weighting_scheme in ("logit_normal", "mode") and self.timestep_sampling not in ("sigma",):
            yield (
                ["weighting_scheme", "timestep_sampling"],
                f"weighting_scheme = {self.weighting_scheme} and timestep_sampling = {self.timestep_sampling} both "
                "choose the density of timesteps. Remove one of them (timestep_sampling = sigma leaves it to "
                "weighting_scheme).",
            )
        if self.min_timestep >= self.max_timestep:
            yield (
                ["min_timestep", "max_timestep"],
                f"min_timestep = {self.min_timestep} is not below max_timestep = {self.max_timestep}.",
            )
        if self.guidance_scale_range and self.guidance_scale_range[0] > self.guidance_scale_range[1]:
            yield ["guidance_scale_range"], f"guidance_scale_range = {list(self.guidance_scale_range)}: low above high."

        if self.masked_loss in ("mask", "half") and self.masked_loss_floor == 0:
            yield from self._nothing_repainted(run)

    def _nothing_repainted(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """An edit with a black mask repaints nothing: its loss, counted there, is zero at every step."""
        for subset in (subset for dataset in run.datasets for subset in dataset.subsets):
            if subset.mode == "edit" and subset.edit_mask_value == 0 and not subset.may_have_masks:
                yield (
                    ["masked_loss", "edit_mask_value"],
                    f"masked_loss = {self.masked_loss} with edit_mask_value = 0: the mask is black, so nothing would "
                    'be learnt. Use masked_loss = "changed" or "none", or a masked_loss_floor above 0.',
                )
                return

    def cautions(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """Epochs beside steps, and half precision that FLUX's activations are known to leave."""
        if self.max_train_steps and self.changed("max_train_epochs"):
            yield ["max_train_epochs"], "max_train_epochs does nothing here: max_train_steps is set, and wins."
        if self.mixed_precision == "fp16":
            yield (
                ["mixed_precision"],
                "mixed_precision = fp16: the 12B FLUX.1 Fill is known to overflow in it (black images). Use bf16.",
            )

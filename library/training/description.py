"""What a network's file says about the run that made it, and the precision it is written in."""

import torch

from library.conditioning import MODES
from library.config.resolved import metadata_toml
from library.config.run import Run
from library.models.base import Base
from library.networks.clip import Together
from library.networks.file import DTYPES
from library.networks.metadata import Description, now, thumbnail
from library.networks.network import Network
from library.networks.outline import saved_as
from library.training.facts import DataFacts
from library.training.progress import Progress


def file_dtype(run: Run, mixed_precision: str) -> torch.dtype:
    """The precision that networks are saved in."""
    return DTYPES[saved_as(run.saving, mixed_precision)]


def picture_size(bucket: tuple[int, int], modes: tuple[str, ...]) -> tuple[int, int]:
    """One picture of the largest bucket: in spatial mode the bucket is a canvas of two, and inference is given one."""
    return bucket[0] // max(MODES[mode].pictures_across for mode in modes), bucket[1]


def describe_run(
    run: Run,
    base: Base,
    network: Network | Together,
    progress: Progress,
    seed: int,
    started: float,
    facts: DataFacts,
    rank: int | None,
) -> Description:
    """The metadata of a network saved now. rank: the commonest in the file."""
    saving, defaults = run.saving, base.defaults
    guidance = run.sampling.sample_guidance_scale
    return Description(
        output_name=saving.output_name,
        modes=facts.modes,
        edit_mask_value=facts.edit_mask_values[0] if facts.edit_mask_values else None,
        train_guidance=run.training.guidance_scale,
        sample_guidance=defaults.sample_guidance_scale if guidance is None else guidance,
        resolution=None if facts.largest is None else picture_size(facts.largest, facts.modes),
        t5xxl_max_token_length=run.cache.t5xxl_max_token_length or defaults.t5xxl_max_token_length,
        network_module=network.module_name,
        network_dim=rank,
        network_args={name: value for name, _, value in (pair.partition("=") for pair in run.network.network_args)},
        trained_scales=network.trained_scales(),
        base_model=base.name.replace("\\", "/").rstrip("/").rpartition("/")[2],
        resolved_toml=metadata_toml(run),
        started_at=started,
        finished_at=now(),
        steps=progress.step,
        epoch=progress.epoch,
        seed=seed,
        title=saving.metadata_title,
        author=saving.metadata_author,
        description=saving.metadata_description,
        license=saving.metadata_license,
        tags=saving.metadata_tags,
        trigger_words=saving.trigger_words,
        comment=saving.training_comment,
        thumbnail=None if saving.metadata_thumbnail is None else thumbnail(saving.metadata_thumbnail),
        trains_text_encoder=run.network.train_text_encoder,
        edits_regions=facts.edits_regions,
        prompt=facts.prompt,
        sample_steps=run.sampling.sample_steps or defaults.sample_steps,
        extra={**_kohya_fields(run), **facts.kohya},
    )


def _kohya_fields(run: Run) -> dict[str, object]:
    """Further `ss_*` fields that kohya's tools show."""
    optimizer, training, network = run.optimizer, run.training, run.network
    return {
        "ss_learning_rate": optimizer.learning_rate,
        "ss_unet_lr": optimizer.unet_lr,
        "ss_text_encoder_lr": optimizer.text_encoder_lr if network.train_text_encoder else None,
        "ss_optimizer": optimizer.optimizer_type,
        "ss_lr_scheduler": optimizer.lr_scheduler,
        "ss_lr_warmup_steps": optimizer.lr_warmup_steps,
        "ss_max_grad_norm": optimizer.max_grad_norm,
        "ss_max_train_steps": training.max_train_steps,
        "ss_gradient_checkpointing": run.memory.gradient_checkpointing,
        "ss_gradient_accumulation_steps": training.gradient_accumulation_steps,
        "ss_mixed_precision": training.mixed_precision,
        "ss_network_dropout": network.network_dropout,
        "ss_loss_type": training.loss_type,
        "ss_weighting_scheme": training.weighting_scheme,
        "ss_timestep_sampling": training.timestep_sampling,
        "ss_sigmoid_scale": training.sigmoid_scale,
        "ss_discrete_flow_shift": training.discrete_flow_shift,
        "ss_prior_loss_weight": training.prior_loss_weight,
    }

"""Which data: sources, pairs, captions, masks, sizes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from library.config.table import FilePath, Integers, Size, Table, as_tuple, key

if TYPE_CHECKING:
    from library.config.run import Run

MaskKinds = Annotated[tuple[Literal["box", "brush", "half", "outpaint", "full"], ...], BeforeValidator(as_tuple)]
FILES = "image_dir or metadata_file"
MASK_FILES = "mask_dir or mask_suffix or mask_column or alpha_mask or metadata_file"
MASKS = f"{MASK_FILES} or generate_mask"
Interpolation = Literal["lanczos", "area", "bicubic", "bilinear", "nearest"]


class SubsetTable(Table):
    """One source of items: [[datasets.subsets]]. A key may also stand in [[datasets]] or [general] for all subsets."""

    section: ClassVar[str] = "subset"
    reads: ClassVar[str] = "cache train"

    image_dir: FilePath | None = key(None, aliases=("instance_data_dir",), path="path", exists="cache")
    """Folder of the images: sources in edit mode, images in mask mode, sources or joined canvases in spatial mode."""
    target_dir: FilePath | None = key(None, aliases=("target_data_dir",), path="path", exists="cache")
    """Folder of the targets, named as the images."""
    mask_dir: FilePath | None = key(None, aliases=("mask_data_dir",), path="path", exists="cache")
    """Folder of the masks (white is repainted), named as the images."""
    caption_dir: FilePath | None = key(
        None, aliases=("caption_data_dir",), path="path", exists="cache", only_with=FILES
    )
    """Folder of the caption files; the images' own folder if not set."""
    mode: Literal["edit", "mask", "spatial"] = key("mask")
    """edit: target from the unmasked source. mask: the masked area from the rest. spatial: one half of a canvas from
    the other. `fill` means mask."""
    metadata_file: FilePath | None = key(None, aliases=("image_jsonl_file",), path="path", exists="cache")
    """A .jsonl or .csv file that lists the items (columns image, target, mask, caption), instead of folders. A column
    of targets or masks is filled in every row; what has no column is looked for by the image's name in target_dir,
    mask_dir and caption_dir (captions also beside the image)."""
    recursive: bool = key(False, only_with=FILES)
    """Look into folders below as well."""
    source_suffix: str | None = key(None, only_with="image_dir")
    """Pairs in one folder: what the source's name ends in, as _source."""
    target_suffix: str | None = key(None, only_with="image_dir")
    """Pairs in one folder: what the target's name ends in, as _target."""
    mask_suffix: str | None = key(None, only_with="image_dir")
    """Masks in the images' folder: what their names end in, as -masklabel."""
    dataset_name: str | None = key(None, path="model")
    """A data set on the hub, or a folder or parquet file of one, instead of image_dir. Needs the `datasets` package."""
    dataset_config_name: str | None = key(None, only_with="dataset_name")
    """Configuration of dataset_name."""
    dataset_split: str = key("train", only_with="dataset_name")
    """Split of dataset_name."""
    dataset_revision: str | None = key(None, only_with="dataset_name")
    """Revision of dataset_name on the hub."""
    dataset_streaming: bool = key(False, only_with="dataset_name")
    """Read dataset_name item by item, for sets larger than the disk."""
    image_column: str = key("image", only_with="dataset_name or metadata_file")
    """Column of the images in dataset_name or metadata_file."""
    target_column: str | None = key(None, only_with="dataset_name or metadata_file")
    """Column of the targets."""
    mask_column: str | None = key(None, only_with="dataset_name or metadata_file")
    """Column of the masks."""
    caption_column: str | None = key(None, only_with="dataset_name or metadata_file")
    """Column of the captions."""
    num_repeats: int = key(1, aliases=("repeats", "dataset_repeats"), ge=1)
    """How often each item comes in an epoch."""
    subset_weight: float | None = key(None, gt=0)
    """Share of this subset against the others, instead of num_repeats."""
    instance_prompt: str | None = key(None, aliases=("class_tokens",))
    """Caption of items that have none of their own. Never replaces one."""
    caption_extension: str = key(".txt", kohya=".caption", only_with=FILES)
    """Ending of caption files."""
    caption_per_line: bool = key(False, only_with=FILES)
    """Each line of a caption file is a caption of its own; a step draws one."""
    caption_prefix: str | None = key(None)
    """Put before each caption."""
    caption_suffix: str | None = key(None)
    """Put after each caption."""
    caption_separator: str = key(",", only_with="shuffle_caption or caption_tag_dropout_rate")
    """What separates the tags of a caption."""
    shuffle_caption: bool = key(False)
    """Cache a caption with its tags in other orders (caption_variants of them) and draw one in each step."""
    caption_variants: int = key(1, ge=1, only_with="shuffle_caption or caption_tag_dropout_rate")
    """How many shuffled or thinned captions are cached for an item."""
    keep_tokens: int = key(0, ge=0, only_with="shuffle_caption or caption_tag_dropout_rate")
    """Tags at the beginning that stay, and stay in place."""
    caption_dropout_rate: float = key(0.0, ge=0, le=1)
    """Chance that a step trains with the empty caption."""
    caption_dropout_every_n_epochs: int = key(0, ge=0)
    """Train every Nth epoch (the Nth, the 2Nth, ...) with empty captions; 0 turns it off."""
    caption_tag_dropout_rate: float = key(0.0, ge=0, le=1)
    """Chance that a tag is left out of a cached variant of a caption."""
    allow_empty_captions: bool = key(False)
    """Accept captions that are empty files."""
    flip_aug: bool = key(False, aliases=("random_flip",))
    """Cache a mirrored variant of each item and draw one in each step."""
    random_crop: bool = key(False)
    """Crop at random places (crop_variants of them are cached) instead of the centre."""
    crop_variants: int = key(1, ge=1, only_with="random_crop")
    """How many random crops are cached for an item."""
    size_mismatch: Literal["error", "crop", "pad"] = key("error")
    """What to do with a pair whose images differ in aspect by more than one pixel of the smaller. Never stretched."""
    background_color: str = key("#ffffff")
    """What is put behind transparent images, also those of previews."""
    resize_interpolation: Interpolation | None = key(None)
    """How images are resized; lanczos up and area down if not set."""
    alpha_mask: bool = key(False)
    """Take the mask from the image's alpha channel (transparent is repainted)."""
    generate_mask: MaskKinds = key((), comma=True)
    """Make masks instead of reading them: box, brush, half, outpaint, full; drawn by seed."""
    mask_variants: int = key(1, ge=1, only_with="generate_mask or mask_jitter")
    """How many generated or jittered masks are cached for an item."""
    full_mask_rate: float = key(0.0, ge=0, le=1, only_with=MASKS)
    """Chance that a step trains an item with a full mask."""
    mask_dilation: int = key(0, only_with=MASKS)
    """Pixels by which masks grow (or shrink, if negative)."""
    mask_jitter: int = key(0, ge=0, only_with=MASKS)
    """Pixels by which masks may grow, shrink and move at random, differently in each variant."""
    invert_mask: bool = key(False, only_with=MASK_FILES)
    """Black is repainted instead of white, also in the masks of previews."""
    mask_only_right: bool = key(False, only_with="mode=spatial")
    """spatial: always repaint the right half; otherwise left or right at random."""
    edit_mask_value: float = key(1.0, ge=0, le=1, only_with="mode=edit")
    """edit: value of the mask channels. 1 is what inference programs use; 0 is what InFluxEdit trained with."""
    is_reg: bool = key(False)
    """Regularisation items, weighed by prior_loss_weight."""
    is_validation: bool = key(False)
    """Held-out items: measured, never trained on."""

    def problems(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """One source, and what its mode cannot do without."""
        yield from self._source_problems()
        listed = self.metadata_file is not None
        if self.mode == "edit" and not (self.target_dir or self.target_suffix or self.target_column or listed):
            yield (
                ["mode"],
                "mode = edit needs targets: set target_dir (target_data_dir), target_suffix, target_column or "
                "metadata_file.",
            )
        if self.mode == "mask" and not self.may_have_masks:
            yield (
                ["mode"],
                "mode = mask needs masks: set mask_dir (mask_data_dir), mask_suffix, mask_column, alpha_mask, "
                "generate_mask or metadata_file. (mode = edit trains on pairs; use_split_mask on joined images.)",
            )
        if "." not in self.caption_extension:
            message = (
                f'caption_extension = "{self.caption_extension}": write it with its dot, ".{self.caption_extension}".'
            )
            yield ["caption_extension"], message
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", self.background_color):
            yield ["background_color"], f'background_color = "{self.background_color}": write it as "#rrggbb".'

    @property
    def may_have_masks(self) -> bool:
        """Whether anything says where masks come from."""
        listed = self.metadata_file is not None
        return any((self.mask_dir, self.mask_suffix, self.mask_column, self.alpha_mask, self.generate_mask, listed))

    def cautions(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """Keys that cannot act beside others. Variants are cached: with one of them there is nothing to draw from."""
        for reason, names in self._idle(run):
            yield from (([name], f"{name} does nothing here: {reason}.") for name in names if self.changed(name))
        if (self.shuffle_caption or self.caption_tag_dropout_rate) and self.caption_variants == 1:
            yield (
                ["shuffle_caption", "caption_tag_dropout_rate"],
                "with caption_variants = 1 every step sees the same shuffled or thinned caption. Set caption_variants.",
            )
        if self.random_crop and self.crop_variants == 1:
            yield (
                ["random_crop"],
                "with crop_variants = 1 every step sees the same random crop. Set crop_variants for more.",
            )

    def _idle(self, run: Run) -> Iterator[tuple[str, tuple[str, ...]]]:
        """What only_with cannot say: keys that do not act, with the reason."""
        masks = (self.mask_dir, self.mask_suffix, self.mask_column, self.alpha_mask, self.generate_mask)
        if self.mode == "edit" and any(masks):
            yield "the masks of this subset say what may change", ("edit_mask_value",)
        apart = (self.target_dir, self.target_suffix, self.target_column, self.metadata_file)
        if self.mode != "edit" and not any(apart):
            yield "there is one image to an item, and no pair", ("size_mismatch",)
        if self.metadata_file is not None:
            yield "metadata_file names the files", ("source_suffix", "target_suffix", "mask_suffix")
        if self.is_validation:
            names = ("num_repeats", "caption_dropout_rate", "caption_dropout_every_n_epochs", "full_mask_rate")
            yield "held-out items are measured once, as they are", (*names, "subset_weight")
        elif self.is_reg:
            yield "regularisation items come as often as all others together", ("subset_weight",)
        else:
            trained = [
                subset
                for dataset in run.datasets
                for subset in dataset.subsets
                if not (subset.is_reg or subset.is_validation)
            ]
            if len(trained) == 1:
                yield "there is no other subset to weigh it against", ("subset_weight",)
        if self.dataset_name is not None and Path(self.dataset_name).exists():
            yield from _idle_on_disk(Path(self.dataset_name))

    def _source_problems(self) -> Iterator[tuple[list[str], str]]:
        if self.dataset_name and self.metadata_file:
            message = "dataset_name and metadata_file both name the images. Remove one of them."
            yield ["dataset_name", "metadata_file"], message
        if not (self.dataset_name or self.image_dir or self.metadata_file):
            yield [], "a subset has no images: set image_dir (instance_data_dir), metadata_file or dataset_name."


def _idle_on_disk(data: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Keys that cannot act on a data set of the `datasets` library that is on this machine."""
    yield "dataset_name is on this machine", ("dataset_revision",)
    one, several = (data / "state.json").is_file(), (data / "dataset_dict.json").is_file()
    if data.suffix == ".parquet" or one:
        yield "dataset_name is one table", ("dataset_config_name", "dataset_split")
    if several:
        yield "dataset_name was written by save_to_disk", ("dataset_config_name",)
    if one or several:
        yield "dataset_name was written by save_to_disk, and is read row by row as it is", ("dataset_streaming",)


class DatasetTable(Table):
    """Subsets that share sizes and batch: [[datasets]]."""

    section: ClassVar[str] = "dataset"
    reads: ClassVar[str] = "cache train"

    resolution: int | Size = key(512)
    """Area the images are resized to: a side length, or [width, height]."""
    resolutions: Integers = key((), aliases=("size",), comma=True)
    """Several sizes instead: each is cached, a batch draws one. "704,1024" means this too."""
    enable_bucket: bool = key(True, kohya="false")
    """Keep each image's aspect in buckets of equal area; false crops all to `resolution`."""
    min_bucket_reso: int | None = key(None, ge=16, kohya="256", only_with="enable_bucket")
    """Shortest side of a bucket; half the resolution if not set."""
    max_bucket_reso: int | None = key(None, ge=16, kohya="1024", only_with="enable_bucket")
    """Longest side of a bucket; twice the resolution if not set."""
    bucket_reso_steps: int = key(64, ge=16, multiple_of=16, only_with="enable_bucket")
    """Sides of buckets are multiples of this."""
    bucket_no_upscale: bool = key(False, only_with="enable_bucket")
    """Do not enlarge images smaller than the resolution."""
    train_batch_size: int = key(4, aliases=("batch_size",), ge=1, kohya="1")
    """Items in a batch."""
    validation_split: float = key(0.0, ge=0, lt=1)
    """Share of the items that is held out."""
    validation_seed: int | None = key(None, ge=0, only_with="validation_split")
    """Seed of that choice; `seed` if not set."""
    subsets: tuple[SubsetTable, ...] = ()
    """The sources: [[datasets.subsets]]."""

    @property
    def sizes(self) -> tuple[int | tuple[int, int], ...]:
        """The areas to cache: `resolutions`, or the one `resolution`."""
        return self.resolutions or (self.resolution,)

    def problems(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """Sizes the model cannot have, and bucket limits that leave nothing."""
        for size in self.sizes:
            sides = size if isinstance(size, tuple) else (size, size)
            if min(sides) < 16:
                yield ["resolution", "resolutions"], f"resolution = {size}: a side is at least 16 pixels."
            elif not self.enable_bucket and any(side % 16 for side in sides):
                yield (
                    ["resolution", "resolutions"],
                    f"resolution = {size}: without enable_bucket both sides must be multiples of 16.",
                )
        low, high = self.min_bucket_reso, self.max_bucket_reso
        if low is not None and high is not None and low > high:
            yield ["min_bucket_reso", "max_bucket_reso"], f"min_bucket_reso = {low} is above max_bucket_reso = {high}."

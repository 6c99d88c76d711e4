"""Everything a call will do, decided and checked without loading weights: what `--dry_run` prints and the job executes.

What a network says about itself (mode, mask value, guidance, resolution) is obeyed unless the user says otherwise.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from library.conditioning import MODES, ModeSettings
from library.config.run import Run
from library.config.tables import InferenceTable
from library.data.buckets import Bucketing
from library.errors import ConfigError, DataError
from library.inference.networks import NetworkUse, agreed, networks_of, notes_on
from library.inference.pictures import SHOWN, Picture, find_pictures
from library.models.base import Defaults
from library.sampling.fit import Fit, fit_area, fit_own_size, fit_size

LARGEST_OWN_AREA = 1024 * 1024
_UNSAFE = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Request:
    """One result to make: a picture, a seed, and where it goes."""

    picture: Picture
    seed: int
    fit: Fit
    output: Path


@dataclass(frozen=True)
class Plan:
    """All requests of a call and the settings they share. is_one_file: the user named the result's file, no folder."""

    mode: str
    mode_settings: ModeSettings
    guidance: float
    steps: int
    token_length: int
    networks: tuple[NetworkUse, ...]
    requests: tuple[Request, ...]
    notes: tuple[str, ...] = field(default=())
    is_one_file: bool = False

    def lines(self) -> list[str]:
        """The plan in words."""
        networks = ", ".join(f"{use.path.name} at {use.strength:g}" for use in self.networks) or "none: the base alone"
        value = f", mask value {self.mode_settings.edit_mask_value:g}" if self.mode == "edit" else ""
        lines = [
            f"networks: {networks}",
            f"mode: {self.mode}{value}; {self.steps} steps, guidance {self.guidance:g}",
            *self.notes,
        ]
        for request in self.requests[:SHOWN]:
            name, fit = request.picture.path.name, request.fit.words()
            lines.append(f"{name} ({fit}), seed {request.seed} -> {request.output}")
        if len(self.requests) > SHOWN:
            lines.append(f"... and {len(self.requests) - SHOWN} more")
        return lines

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.requests[0].output.parent

    def seen(self, request: Request) -> tuple[int, int]:
        """Width and height of what the model sees while it edits: in spatial mode both halves."""
        return MODES[self.mode].canvas(*request.fit.canvas)

    def settings_of(self, request: Request, base_name: str | None) -> dict[str, object]:
        """What a result's file says about how it was made. Files are named without their folders."""
        settings: dict[str, object] = {
            "prompt": request.picture.prompt,
            "mode": self.mode,
            "seed": request.seed,
            "steps": self.steps,
            "sampler": "euler",
            "guidance": self.guidance,
            "size": f"{request.fit.canvas[0]}x{request.fit.canvas[1]}",
            "base": Path(base_name or "").name,
            "image": request.picture.path.name,
        }
        if request.picture.mask is not None:
            settings["mask"] = request.picture.mask.name
        elif self.mode == "edit":
            settings["mask value"] = self.mode_settings.edit_mask_value
        for use in self.networks:
            settings[f"network {use.path.name}"] = use.strength
        return settings


def make_plan(run: Run, base: Defaults) -> Plan:
    """Decide and check everything. Raises UserError for whatever the user can mend."""
    table = run.inference
    networks = networks_of(table, run.network, Path(run.saving.output_dir) / f"{run.saving.output_name}.safetensors")
    mode = _mode(table, networks, run)
    pictures, notes = find_pictures(table, MODES[mode])
    resolution, said = _resolution(table, networks, run)
    seeds = _seeds(table, run.training.seed)
    fits = [_fit(table, picture, resolution) for picture in pictures]
    outputs = _outputs(table, Path(run.saving.output_dir), pictures, seeds)
    requests = [
        Request(picture, seed, fit, output)
        for (picture, fit, paths) in zip(pictures, fits, outputs)
        for seed, output in zip(seeds, paths)
    ]
    return Plan(
        mode=mode,
        mode_settings=ModeSettings(edit_mask_value=_mask_value(table, networks, run), mask_only_right=True),
        guidance=_guidance(run, networks, base),
        steps=run.sampling.sample_steps or base.sample_steps,
        token_length=_token_length(run, networks, base),
        networks=networks,
        requests=tuple(requests),
        is_one_file=table.output in [request.output for request in requests],
        notes=(*notes_on(networks), *notes, *said),
    )


def _mode(table: InferenceTable, networks: tuple[NetworkUse, ...], run: Run) -> str:
    if table.inference_mode is not None:
        return table.inference_mode
    trained = sorted({mode for use in networks for mode in use.guide.modes})
    if not trained:
        trained = sorted({subset.mode for dataset in run.datasets for subset in dataset.subsets})
    if len(trained) == 1 and trained[0] in MODES:
        return trained[0]
    choices = " or ".join(f"--mode {name}" for name in (trained or MODES))
    if trained:
        raise ConfigError(f"the network was trained in several modes ({', '.join(trained)}): choose with {choices}")
    raise ConfigError(f"nothing says in which mode to edit (no network with InFlux's metadata): choose with {choices}")


def _mask_value(table: InferenceTable, networks: tuple[NetworkUse, ...], run: Run) -> float:
    if table.inference_mask_value is not None:
        return table.inference_mask_value
    trained = agreed(networks, "edit_mask_value", "edit_mask_value")
    if trained is not None:
        return trained
    configured = {subset.edit_mask_value for dataset in run.datasets for subset in dataset.subsets}
    return configured.pop() if len(configured) == 1 else 1.0


def _guidance(run: Run, networks: tuple[NetworkUse, ...], base: Defaults) -> float:
    if run.sampling.sample_guidance_scale is not None:
        return run.sampling.sample_guidance_scale
    trained = agreed(networks, "sample_guidance", "sample_guidance_scale")
    if trained is not None:
        return trained
    return base.sample_guidance_scale


def _token_length(run: Run, networks: tuple[NetworkUse, ...], base: Defaults) -> int:
    if run.cache.t5xxl_max_token_length is not None:
        return run.cache.t5xxl_max_token_length
    trained = agreed(networks, "t5xxl_max_token_length", "t5xxl_max_token_length")
    return base.t5xxl_max_token_length if trained is None else int(trained)


def _resolution(table: InferenceTable, networks: tuple[NetworkUse, ...], run: Run) -> tuple[int | None, list[str]]:
    """The area to edit at, None for each picture's own, and what to say about it."""
    if table.width is not None or table.height is not None:
        if table.inference_resolution is not None:
            raise ConfigError("resolution and width or height are both given: choose one way to say the size")
        return None, []
    if table.inference_resolution is not None:
        return Bucketing(table.inference_resolution).area, []
    sizes = [use.guide.resolution for use in networks if use.guide.resolution is not None]
    if not sizes:
        sizes = [size for dataset in run.datasets for size in dataset.sizes]
    areas = sorted({Bucketing(size).area for size in sizes})
    if len(areas) <= 1:
        return (areas[0] if areas else None), []
    return areas[-1], ["trained at several resolutions: the largest is used, choose another with --resolution"]


def _fit(table: InferenceTable, picture: Picture, area: int | None) -> Fit:
    if table.width is not None or table.height is not None:
        return fit_size(picture.size, table.width, table.height, table.fit, picture.path.name)
    keep_size = table.result_size == "image"
    own_area = picture.size[0] * picture.size[1]
    if area is None and own_area > LARGEST_OWN_AREA:
        area = LARGEST_OWN_AREA
    return fit_own_size(picture.size) if area is None else fit_area(picture.size, area, keep_size)


def _seeds(table: InferenceTable, run_seed: int | None) -> list[int]:
    if table.seeds:
        if table.num_images > 1 and len(table.seeds) > 1:
            raise ConfigError(f"seeds names {len(table.seeds)} seeds and num_images is {table.num_images}: choose one")
        first = table.seeds[0]
        return list(table.seeds) if table.num_images == 1 else [first + n for n in range(table.num_images)]
    first = secrets.randbelow(2**32) if run_seed is None else run_seed
    return [first + n for n in range(table.num_images)]


def safe_name(stem: str) -> str:
    """A file name of letters, digits, `_`, `.` and `-` alone, which cannot leave its folder."""
    return _UNSAFE.sub("_", stem).strip(".")[:120] or "picture"


def _outputs(table: InferenceTable, output_dir: Path, pictures: list[Picture], seeds: list[int]) -> list[list[Path]]:
    """Where each picture's results go, one path for each seed. Existing files are never named."""
    given = table.output
    if given is not None and given.suffix.lower() == ".png" and not given.is_dir():
        if len(pictures) * len(seeds) > 1:
            raise DataError(f"{len(pictures) * len(seeds)} results do not fit into one file: give a folder as output")
        if given.exists():
            raise DataError(f"{given} exists already and nothing is overwritten: give another output")
        return [[given]]
    if given is not None and (given.is_file() or given.suffix):
        raise DataError(f"output {given} is neither a folder nor a .png file: results are PNG files")
    folder = output_dir / "edited" if given is None else given
    taken: set[Path] = set()
    return [
        [_free_path(folder, picture.path.stem, seed, len(seeds) > 1, taken) for seed in seeds] for picture in pictures
    ]


def _free_path(folder: Path, stem: str, seed: int, name_seed: bool, taken: set[Path]) -> Path:
    name = safe_name(stem) + (f"_seed{seed}" if name_seed else "")
    path, number = folder / f"{name}.png", 2
    while path in taken or path.exists():
        path, number = folder / f"{name}_{number}.png", number + 1
    taken.add(path)
    return path

"""What one call should read and do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from library.config.table import FilePath, Strings, Table, key

if TYPE_CHECKING:
    from library.config.run import Run


class CommandTable(Table):
    """The files a call reads, and actions that are no settings of the experiment."""

    section: ClassVar[str] = "command"

    config_file: FilePath | None = key(None, path="path", command_line_only=True)
    """The experiment: a TOML file. Everything in it may be overridden on the command line."""
    dataset_config: FilePath | None = key(None, path="path")
    """A TOML file with the [general] and [[datasets]] tables, if they do not stand in the configuration itself."""
    dry_run: bool = key(False, command_line_only=True)
    """Print what would be done, what it needs and what it makes, without loading weights; then stop."""
    debug: bool = key(False, command_line_only=True)
    """Show the Python traceback with an error."""
    fresh: bool = key(False, reads="train", command_line_only=True)
    """Start a new run in a numbered folder instead of continuing the one in output_dir."""
    status: bool = key(False, reads="cache", command_line_only=True)
    """Say what in the cache is fresh, stale (and why), missing or orphaned, and which configurations it knows. Nothing
    is encoded or deleted."""
    gc: bool = key(False, reads="cache", command_line_only=True)
    """Remove cache entries that no configuration known to the cache names (--status lists them). Nothing else is ever
    deleted, and nothing that a running trainer reads."""
    give_up: Strings = key((), reads="cache", command_line_only=True, only_with="gc")
    """With --gc: configurations to forget first, by the names that --status gives them."""
    verify: bool = key(False, reads="cache", command_line_only=True)
    """Read the whole cache again and hash the sources; report damage and changes."""
    force: bool = key(False, reads="cache", command_line_only=True)
    """Encode everything again, fresh or not."""
    preview: FilePath | None = key(None, reads="cache", path="path", command_line_only=True)
    """Write one self-contained HTML page that shows what the model will see, decoded from the cache, after bringing the
    cache up to date."""
    preview_items: int = key(500, ge=1, reads="cache", command_line_only=True, only_with="preview")
    """How many items of the --preview page have pictures, those with warnings first; all are listed."""
    lint: bool = key(False, reads="cache", command_line_only=True)
    """Check the data for what spoils a training (identical pairs, shifted pairs, constant masks, ...)."""
    lint_json: FilePath | None = key(None, reads="cache", path="path", command_line_only=True, only_with="lint")
    """Write the findings of --lint to this JSON file."""
    strict: bool = key(False, reads="cache", command_line_only=True, only_with="lint")
    """With --lint: exit with code 1 if anything was found."""
    list_modules: bool = key(False, reads="train", command_line_only=True)
    """List the modules this configuration would train, with the parameters of each and the sizes of the files; then
    stop."""
    show_timesteps: bool = key(False, reads="train", command_line_only=True)
    """Plot the density of timesteps this configuration would train on; then stop."""

    def problems(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """Looking at the cache and changing it are different calls; one of them would not be done."""
        alone = [name for name in ("dry_run", "lint", "list_modules", "show_timesteps") if getattr(self, name)]
        upkeep = [name for name in ("status", "gc", "verify") if getattr(self, name)]
        work = [name for name in ("force", "preview", "fresh") if getattr(self, name)]
        asked = [*alone, *upkeep[:1], *work[:1]] if alone or upkeep else []
        if len(asked) > 1 and set(asked) - {"dry_run", "fresh", "force"}:
            names = " and ".join(f"--{name}" for name in asked)
            yield asked, f"{names} are different calls: run one, then the other."

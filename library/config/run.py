"""The whole configuration of one call, frozen. Jobs take it apart; every part receives its own table."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from library.config import tables
from library.config.table import Command


class Run(BaseModel):
    """Everything the user said, resolved.

    `origins` tells where each value that is not a default came from, and where each data set and subset begins.
    `to_cache`: the words of the command line that the caching command has to be given too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Command
    command: tables.CommandTable = tables.CommandTable()
    model: tables.ModelTable = tables.ModelTable()
    datasets: tuple[tables.DatasetTable, ...] = ()
    cache: tables.CacheTable = tables.CacheTable()
    network: tables.NetworkTable = tables.NetworkTable()
    optimizer: tables.OptimizerTable = tables.OptimizerTable()
    training: tables.TrainingTable = tables.TrainingTable()
    memory: tables.MemoryTable = tables.MemoryTable()
    sampling: tables.SamplingTable = tables.SamplingTable()
    validation: tables.ValidationTable = tables.ValidationTable()
    saving: tables.SavingTable = tables.SavingTable()
    logging: tables.LoggingTable = tables.LoggingTable()
    inference: tables.InferenceTable = tables.InferenceTable()
    origins: dict[str, str] = {}
    warnings: tuple[str, ...] = ()
    to_cache: tuple[str, ...] = ()

    def with_values(self, table: str, origin: str, **values: object) -> Run:
        """The same run with values that were settled later (a drawn seed, a plan's choice); `origin` says by whom."""
        old = getattr(self, table)
        new = type(old).model_validate({**dict(old), **values})
        object.__setattr__(new, "__pydantic_fields_set__", {*old.model_fields_set, *values})
        return self.model_copy(update={table: new, "origins": {**self.origins, **dict.fromkeys(values, origin)}})

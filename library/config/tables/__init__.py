"""The tables: every key a user may write, one table per file."""

from library.config.tables.cache import CacheTable
from library.config.tables.command import CommandTable
from library.config.tables.dataset import DatasetTable, SubsetTable
from library.config.tables.inference import InferenceTable
from library.config.tables.logging import LoggingTable
from library.config.tables.memory import MemoryTable
from library.config.tables.model import ModelTable
from library.config.tables.network import NetworkTable
from library.config.tables.optimizer import OptimizerTable
from library.config.tables.sampling import SamplingTable
from library.config.tables.saving import SavingTable
from library.config.tables.training import TrainingTable
from library.config.tables.validation import ValidationTable

__all__ = [
    "CacheTable",
    "CommandTable",
    "DatasetTable",
    "InferenceTable",
    "LoggingTable",
    "MemoryTable",
    "ModelTable",
    "NetworkTable",
    "OptimizerTable",
    "SamplingTable",
    "SavingTable",
    "SubsetTable",
    "TrainingTable",
    "ValidationTable",
]

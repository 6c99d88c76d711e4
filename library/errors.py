"""What the user can mend: every error that ends a command with a plain message instead of a traceback.

Each class carries the exit code of its kind: 2 configuration or data, 3 non-finite stop, 4 out of memory,
5 disk or I/O, 130 Ctrl-C and 143 SIGTERM (both after the state was saved).
"""


class UserError(Exception):
    """An error whose message says what is wrong, where, and what to do. Shown without a traceback."""

    exit_code = 2


class ConfigError(UserError):
    """A key, value or combination in the TOML file or on the command line."""


class DataError(UserError):
    """Images, masks, captions or their pairing."""


class CacheError(UserError):
    """A cache that is missing, stale or damaged."""


class ModelError(UserError):
    """A checkpoint, text encoder, tokenizer or VAE that is not what it should be."""


class NetworkFileError(UserError):
    """A LoRA file that cannot be read, written or applied whole."""


class NonFiniteError(UserError):
    """Training stopped because losses or gradients stayed NaN or infinite."""

    exit_code = 3


class OutOfMemory(UserError):
    """A device ran out of memory; the message names the next knob to turn."""

    exit_code = 4


class DiskError(UserError):
    """The disk is full, read-only or failing."""

    exit_code = 5


class Stopped(UserError):
    """The run was asked to stop (Ctrl-C: 130, SIGTERM: 143) and has saved its state."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code

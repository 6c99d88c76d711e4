"""Train a network from the cache that influx_cache.py made."""

from library.config import Run
from library.start import start


def job(run: Run) -> int | None:
    """The job is imported when the configuration is known to be valid: help and errors come at once."""
    from library import training

    return training.run(run)


if __name__ == "__main__":
    start("train", job)

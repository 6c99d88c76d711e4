"""Encode a data set: images, masks and captions to a cache that the trainer reads."""

from library.config import Run
from library.start import start


def job(run: Run) -> int | None:
    """The job is imported when the configuration is known to be valid: help and errors come at once."""
    from library import caching

    return caching.run(run)


if __name__ == "__main__":
    start("cache", job)

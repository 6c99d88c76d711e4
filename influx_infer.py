"""Edit images with a trained network."""

from library.config import Run
from library.start import start


def job(run: Run) -> int | None:
    """The job is imported when the configuration is known to be valid: help and errors come at once."""
    from library import inference

    return inference.run(run)


if __name__ == "__main__":
    start("infer", job)

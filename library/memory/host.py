"""Host memory that the device copies from and to: page-locked where the system grants it, else pageable."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)
Shape = tuple[int, ...] | torch.Size


def host_tensor(
    shape: Shape, dtype: torch.dtype, pin: bool, allocate: Callable[[Shape, torch.dtype], Tensor] | None = None
) -> Tensor:
    """An empty tensor in host memory; page-locked if asked for and granted. A refusal is said once, as a warning.

    allocate: makes the page-locked tensor or raises RuntimeError; torch's own, where there is a GPU, if not given.
    """
    if allocate is None and torch.cuda.is_available():
        allocate = _page_locked
    if pin and allocate is not None:
        try:
            return allocate(shape, dtype)
        except RuntimeError as error:
            _say_refused(math.prod(shape) * dtype.itemsize, str(error).splitlines()[0])
    return torch.empty(shape, dtype=dtype)


def host_buffer(size: int, pin: bool) -> Tensor:
    """A flat byte buffer in host memory; page-locked if asked for and granted."""
    return host_tensor((size,), torch.uint8, pin)


def _page_locked(shape: Shape, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)


@functools.cache
def _say_once() -> bool:
    log.warning(
        "the system locks no more RAM (Windows locks about half of it at most). The rest is used unlocked: "
        "nothing fails, but each copy between RAM and card then costs CPU time and is slower. To fit in what can be "
        'locked: fewer blocks_to_swap, base_precision = "nf4", or more RAM; pin_memory = false asks for none.'
    )
    return True


def _say_refused(size: int, reason: str) -> None:
    _say_once()
    log.debug("%d bytes of page-locked memory were refused: %s", size, reason)

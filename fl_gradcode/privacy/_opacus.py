"""Opacus, imported when it is needed: it takes seconds, is an extra, and would set up the process's logging."""

from __future__ import annotations

import logging
import warnings
from functools import lru_cache
from typing import Any

__all__ = ["opacus"]


@lru_cache(maxsize=1)
def opacus() -> Any:
    """The package, with all its modules; the root logger stays as it was.

    Raises:
        ImportError: It is not installed; says which extra brings it.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch's, about what Opacus imports from it
            import opacus
            import opacus.accountants
            import opacus.grad_sample
            import opacus.optimizers
            import opacus.utils.fast_gradient_clipping_utils
            import opacus.validators
    except ImportError as error:
        raise ImportError("Privacy needs Opacus: pip install 'fl-gradcode[privacy]'.") from error
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return opacus

"""Opacus: imported quietly, and checked for the names that the library relies on.

Importing this module imports Opacus, which takes seconds and comes with an extra. Import it where Opacus is used:
`accounting` does when it computes an epsilon, `training` (through `dp_optimizer`) when it trains a shard.

The optimizers in `dp_optimizer` override single steps of Opacus' own. That is safe only while Opacus calls them by the
names in `RELIED_ON`: if a later version called another method, its own noise would be added instead of ours. So each
name is looked for before anything is trained.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import CodeType
from typing import Any

__all__ = [
    "RELIED_ON",
    "DPOptimizer",
    "GradSampleModule",
    "GradSampleModuleFastGradientClipping",
    "ModuleValidator",
    "check_relied_on",
    "create_accountant",
    "create_or_accumulate_grad_sample",
    "ft_compute_per_sample_gradient",
    "promote_current_grad_sample",
]

#: The version of Opacus that the names below were read in.
CHECKED_WITH = "1.6.0"

#: Functions and methods of Opacus that the library calls or overrides, and the names that each must use itself
#: (attributes and functions, separated by spaces) for the overrides to take effect.
RELIED_ON: dict[str, str] = {
    "accountants.create_accountant": "",
    "validators.ModuleValidator.validate": "",
    "optimizers.DPOptimizer.__init__": "max_grad_norm expected_batch_size loss_reduction original_optimizer",
    "optimizers.DPOptimizer.signal_skip_step": "_step_skip_queue",
    # Gradients of single records.
    "grad_sample.GradSampleModule.GRAD_SAMPLERS": "",
    "grad_sample.GradSampleModule.capture_activations_hook": "activations hooks_enabled training",
    "grad_sample.GradSampleModule.capture_backprops_hook": "hooks_enabled GRAD_SAMPLERS grad_accumulation_allowed",
    "grad_sample.GradSampleModule.rearrange_grad_samples": "activations max_batch_len",
    "grad_sample.GradSampleModule.forbid_grad_accumulation": "grad_accumulation_allowed",
    "grad_sample.GradSampleModule.to_standard_module": "",
    "grad_sample.grad_sample_module.create_or_accumulate_grad_sample": "_current_grad_sample",
    "grad_sample.grad_sample_module.promote_current_grad_sample": "_current_grad_sample grad_sample",
    "grad_sample.functorch.ft_compute_per_sample_gradient": "ft_compute_sample_grad",
    # Norms of single records' gradients, in the first backward pass of ghost clipping.
    "grad_sample.GradSampleModuleFastGradientClipping.NORM_SAMPLERS": "",
    "grad_sample.GradSampleModuleFastGradientClipping.capture_backprops_hook": (
        "hooks_enabled _norm_sample NORM_SAMPLERS GRAD_SAMPLERS"
    ),
    "grad_sample.GradSampleModuleFastGradientClipping.per_sample_gradient_norms": "",
    "grad_sample.GradSampleModuleFastGradientClipping.forbid_grad_accumulation": "grad_accumulation_allowed",
    "grad_sample.GradSampleModuleFastGradientClipping.to_standard_module": "",
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave the root logger as it is, which Opacus would set up; hide PyTorch's warnings about Opacus' imports."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def check_relied_on(package: Any) -> None:
    """Check that Opacus has every name in `RELIED_ON`.

    Args:
        package: `opacus`, with its submodules imported.

    Raises:
        ImportError: A name is missing. The sentence has the name, the installed version and what to install.
    """
    for path, used in RELIED_ON.items():
        missing = _missing_in(package, path, used)
        if missing is not None:
            raise ImportError(
                f"Opacus {version('opacus')} has no {missing}, which private training relies on. Install the version "
                f"that it was checked with: pip install 'opacus=={CHECKED_WITH}'."
            )


def _missing_in(package: Any, path: str, used: str) -> str | None:
    """Returns what is missing, as a phrase; None if the function at `path` is there and uses all names in `used`."""
    found = package
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            return path
    absent = [name for name in used.split() if name not in _names_in(getattr(found, "__code__", None))]
    return f"{absent[0]} in {path}" if absent else None


def _names_in(code: CodeType | None) -> set[str]:
    """Returns the attributes and functions that a function uses, comprehensions and inner functions included."""
    if code is None:
        return set()
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names}.union(*map(_names_in, inner))


try:
    with _quiet():
        import opacus
        import opacus.accountants
        import opacus.grad_sample
        import opacus.optimizers
        import opacus.validators
except ImportError as error:
    raise ImportError("Privacy needs Opacus: pip install 'opacus>=1.6,<2'.") from error

check_relied_on(opacus)

create_accountant: Any = opacus.accountants.create_accountant
ModuleValidator: Any = opacus.validators.ModuleValidator
DPOptimizer: Any = opacus.optimizers.DPOptimizer
GradSampleModule: Any = opacus.grad_sample.GradSampleModule
GradSampleModuleFastGradientClipping: Any = opacus.grad_sample.GradSampleModuleFastGradientClipping
create_or_accumulate_grad_sample: Any = opacus.grad_sample.grad_sample_module.create_or_accumulate_grad_sample
promote_current_grad_sample: Any = opacus.grad_sample.grad_sample_module.promote_current_grad_sample
ft_compute_per_sample_gradient: Any = opacus.grad_sample.functorch.ft_compute_per_sample_gradient

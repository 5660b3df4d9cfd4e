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
    "DPLossFastGradientClipping",
    "DPOptimizer",
    "DPOptimizerFastGradientClipping",
    "DPTensorFastGradientClipping",
    "GradSampleModule",
    "GradSampleModuleFastGradientClipping",
    "ModuleValidator",
    "check_processed_flag",
    "check_relied_on",
    "create_accountant",
    "mark_as_processed",
]

#: The version of Opacus that the names below were read in.
CHECKED_WITH = "1.6.0"

#: Functions and methods of Opacus that the library calls or overrides, and the names that each must use itself
#: (attributes and functions, separated by spaces) for the overrides to take effect.
RELIED_ON: dict[str, str] = {
    "accountants.create_accountant": "",
    "validators.ModuleValidator.validate": "",
    # One step with per-record gradients.
    "optimizers.DPOptimizer.__init__": "max_grad_norm expected_batch_size loss_reduction original_optimizer",
    "optimizers.DPOptimizer.step": "pre_step original_optimizer step",
    "optimizers.DPOptimizer.pre_step": "clip_and_accumulate _check_skip_next_step add_noise scale_grad",
    "optimizers.DPOptimizer.clip_and_accumulate": "params grad_sample _get_flat_grad_sample max_grad_norm summed_grad",
    "optimizers.DPOptimizer.add_noise": "params summed_grad grad _check_processed_flag _mark_as_processed",
    "optimizers.DPOptimizer.scale_grad": "grad expected_batch_size",
    "optimizers.DPOptimizer.zero_grad": "grad_sample summed_grad",
    "optimizers.DPOptimizer._get_flat_grad_sample": "grad_sample",
    "optimizers.optimizer._check_processed_flag": "",
    "optimizers.optimizer._mark_as_processed": "",
    "grad_sample.GradSampleModule.forbid_grad_accumulation": "grad_accumulation_allowed",
    "grad_sample.GradSampleModule.to_standard_module": "",
    # One step with ghost clipping: the loss measures norms in a first backward pass and clips in a second one.
    "optimizers.DPOptimizerFastGradientClipping.step": "pre_step original_optimizer step",
    "optimizers.DPOptimizerFastGradientClipping.pre_step": "accumulate _check_skip_next_step add_noise scale_grad",
    "optimizers.DPOptimizerFastGradientClipping.accumulate": "params summed_grad grad",
    "grad_sample.GradSampleModuleFastGradientClipping.get_clipping_coef": "max_grad_norm get_norm_sample",
    "grad_sample.GradSampleModuleFastGradientClipping.get_norm_sample": "_norm_sample trainable_parameters",
    "grad_sample.GradSampleModuleFastGradientClipping.capture_backprops_hook": "hooks_enabled _norm_sample",
    "grad_sample.GradSampleModuleFastGradientClipping.per_sample_gradient_norms": "",
    "grad_sample.GradSampleModuleFastGradientClipping.forbid_grad_accumulation": "grad_accumulation_allowed",
    "grad_sample.GradSampleModuleFastGradientClipping.to_standard_module": "",
    "utils.fast_gradient_clipping_utils.DPTensorFastGradientClipping.__init__": "module optimizer loss_per_sample",
    "utils.fast_gradient_clipping_utils.DPTensorFastGradientClipping.backward": "get_clipping_coef loss_per_sample",
    "utils.fast_gradient_clipping_utils.DPTensorFastGradientClipping.__mul__": "loss_per_sample",
    "utils.fast_gradient_clipping_utils.DPTensorFastGradientClipping.__add__": "loss_per_sample",
    "utils.fast_gradient_clipping_utils.DPLossFastGradientClipping.__call__": "criterion module optimizer",
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
        import opacus.utils.fast_gradient_clipping_utils
        import opacus.validators
except ImportError as error:
    raise ImportError("Privacy needs Opacus: pip install 'fl-gradcode[privacy]'.") from error

check_relied_on(opacus)

create_accountant: Any = opacus.accountants.create_accountant
ModuleValidator: Any = opacus.validators.ModuleValidator
DPOptimizer: Any = opacus.optimizers.DPOptimizer
DPOptimizerFastGradientClipping: Any = opacus.optimizers.DPOptimizerFastGradientClipping
GradSampleModule: Any = opacus.grad_sample.GradSampleModule
GradSampleModuleFastGradientClipping: Any = opacus.grad_sample.GradSampleModuleFastGradientClipping
DPTensorFastGradientClipping: Any = opacus.utils.fast_gradient_clipping_utils.DPTensorFastGradientClipping
DPLossFastGradientClipping: Any = opacus.utils.fast_gradient_clipping_utils.DPLossFastGradientClipping
check_processed_flag: Any = opacus.optimizers.optimizer._check_processed_flag
mark_as_processed: Any = opacus.optimizers.optimizer._mark_as_processed

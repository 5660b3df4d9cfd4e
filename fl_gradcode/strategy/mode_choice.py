"""The chooser of a run's modes, by its settings."""

from __future__ import annotations

from ..codes import GradientCode
from .options import Adaptive, Options, Shards
from .round_mode import FixedMode, LearnedTimes, ModeChooser, RoundMode

__all__ = ["mode_chooser"]


def mode_chooser(options: Options, code: GradientCode, *, coded: bool = True) -> ModeChooser:
    """Returns the object that chooses the modes of a run with these options.

    Args:
        options: Settings of the run.
        code: The code.
        coded: Whether an adaptive run may send coded vectors.
    """
    if isinstance(options.send, Adaptive):
        # Imported here because replaying rounds needs the planner and scipy.stats, which no other run needs.
        from .adaptive import AdaptiveModes

        return AdaptiveModes(code, smaller=options.policy != "raise", coded=coded)
    if isinstance(options.send, Shards):
        if isinstance(options.send.patience, str):
            return LearnedTimes(code)
        return FixedMode(RoundMode(code, "shards", options.send.patience))
    return FixedMode(RoundMode(code, "coded"))

"""Differential privacy that survives replication: what users import.

Server: `GradientCoding(..., privacy=DPSGD(...))` or `privacy=CentralNoise(...)`. Client, inside `train()`:
`private_training(message, context, model, examples=...)`, if `asks_for_privacy(message, context)`.
"""

from __future__ import annotations

from flwr.app import Context, Message

from .accounting import Spend, epsilon_of, noise_multiplier_for
from .key_files import read_keys, rotate_keys, write_keys
from .privacy_records import Spent, asked_of, in_config
from .privacy_settings import DPSGD, CentralNoise
from .private_training import PrivateTraining, private_training
from .spending import SpentLedger

__all__ = [
    "DPSGD",
    "CentralNoise",
    "PrivateTraining",
    "Spend",
    "Spent",
    "SpentLedger",
    "asks_for_privacy",
    "epsilon_of",
    "in_config",
    "noise_multiplier_for",
    "private_training",
    "read_keys",
    "rotate_keys",
    "write_keys",
]


def asks_for_privacy(message: Message, context: Context) -> bool:
    """Whether `train()` has to train by `private_training`."""
    asked = asked_of(message, context)
    return asked is not None and isinstance(asked.privacy, DPSGD)

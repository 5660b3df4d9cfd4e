"""Differential privacy under coding: settings, keys, noise that holders share, budgets, and what no client sends."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .accounting import Spend, epsilon_of, noise_multiplier_for
    from .attempts import call_privately
    from .budget_ledger import SHARDS_SPENT, SPENT, BudgetLedger, Request, refuse_other_unit
    from .clipping import clip, clipping_mod_named_in, is_statistic, refuse_clipping_mods, refuse_statistics
    from .dp_optimizer import wrap
    from .key_derivation import PRFStream
    from .keys import NodeKeys, check_own, read_keys, rotate_keys, write_keys
    from .output_guard import guarded_reply, refuse_unprotected, spent_by
    from .records import (
        BUDGET,
        FOLDER,
        PRIVACY_KEYS,
        Asked,
        Spent,
        asked_of,
        asks_for_privacy,
        budget_of,
        in_config,
        max_delta_of,
        trusts_server,
    )
    from .run_account import Releases, RunAccount, amplification
    from .settings import DPSGD, CentralNoise, IntegerNoise, Privacy, privacy_from_json, privacy_to_json
    from .training import PrivateTraining, private_training

__all__ = [
    "BUDGET",
    "DPSGD",
    "FOLDER",
    "PRIVACY_KEYS",
    "SHARDS_SPENT",
    "SPENT",
    "Asked",
    "BudgetLedger",
    "CentralNoise",
    "IntegerNoise",
    "NodeKeys",
    "PRFStream",
    "Privacy",
    "PrivateTraining",
    "Releases",
    "Request",
    "RunAccount",
    "Spend",
    "Spent",
    "amplification",
    "asked_of",
    "asks_for_privacy",
    "budget_of",
    "call_privately",
    "check_own",
    "clip",
    "clipping_mod_named_in",
    "epsilon_of",
    "guarded_reply",
    "in_config",
    "is_statistic",
    "max_delta_of",
    "noise_multiplier_for",
    "privacy_from_json",
    "privacy_to_json",
    "private_training",
    "read_keys",
    "refuse_clipping_mods",
    "refuse_other_unit",
    "refuse_statistics",
    "refuse_unprotected",
    "rotate_keys",
    "spent_by",
    "trusts_server",
    "wrap",
    "write_keys",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "accounting": [
            "Spend",
            "epsilon_of",
            "noise_multiplier_for",
        ],
        "attempts": [
            "call_privately",
        ],
        "budget_ledger": [
            "BudgetLedger",
            "Request",
            "SHARDS_SPENT",
            "SPENT",
            "refuse_other_unit",
        ],
        "clipping": [
            "clip",
            "clipping_mod_named_in",
            "is_statistic",
            "refuse_clipping_mods",
            "refuse_statistics",
        ],
        "dp_optimizer": [
            "wrap",
        ],
        "key_derivation": [
            "PRFStream",
        ],
        "keys": [
            "NodeKeys",
            "check_own",
            "read_keys",
            "rotate_keys",
            "write_keys",
        ],
        "output_guard": [
            "guarded_reply",
            "refuse_unprotected",
            "spent_by",
        ],
        "records": [
            "Asked",
            "BUDGET",
            "FOLDER",
            "PRIVACY_KEYS",
            "Spent",
            "asked_of",
            "asks_for_privacy",
            "budget_of",
            "in_config",
            "max_delta_of",
            "trusts_server",
        ],
        "run_account": [
            "Releases",
            "RunAccount",
            "amplification",
        ],
        "settings": [
            "CentralNoise",
            "DPSGD",
            "IntegerNoise",
            "Privacy",
            "privacy_from_json",
            "privacy_to_json",
        ],
        "training": [
            "PrivateTraining",
            "private_training",
        ],
    },
)

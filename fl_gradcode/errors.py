"""The exceptions of this library, as one small tree.

    FlGradcodeError
    ├── InvalidCode         (ValueError)    a code, worker or survivor set that makes no sense
    │   ├── NotDecodable    (ValueError)    these survivors do not determine the sum
    │   └── NotCertified    (ValueError)    masks on this graph would not hide all but the sum
    ├── Overflow            (OverflowError) numbers too large for a code's fixed point
    ├── IncompatibleStrategy (TypeError)    a Flower strategy that cannot work on a decoded reply
    ├── UnsuitableApp       (RuntimeError)  the clients' app breaks the contract, or lacks the mod
    │   └── VersionMismatch (RuntimeError)  server and client have incompatible versions
    ├── ShardMismatch       (ValueError)    a node's data differ from a manifest
    ├── InvalidSetting      (ValueError)    an option or a path that cannot be used
    ├── PrivacyRefused      (RuntimeError)  a client's privacy rules forbid the answer
    ├── SecureRefused       (RuntimeError)  a client's rules of secure aggregation forbid the answer
    ├── MaskedSumInvalid    (ValueError)    a decoded masked sum is not what it must be
    │   ├── MasksRemain     (ValueError)    its masks do not cancel
    │   ├── ShardsFailed    (ValueError)    some shard failed on its holders
    │   └── OutOfRange      (ValueError)    an entry is larger than any sum can be
    ├── TrainingFailed      (RuntimeError)  private training ended in an error that is not told
    └── RoundFailed         (RuntimeError)  a round that must decode did not, or the nodes do not fit the code

Each class also derives from the builtin exception that a caller would expect.
"""

from typing import ClassVar

__all__ = [
    "FlGradcodeError",
    "IncompatibleStrategy",
    "InvalidCode",
    "InvalidSetting",
    "MaskedSumInvalid",
    "MasksRemain",
    "NotCertified",
    "NotDecodable",
    "OutOfRange",
    "Overflow",
    "PrivacyRefused",
    "RoundFailed",
    "SecureRefused",
    "ShardMismatch",
    "ShardsFailed",
    "TrainingFailed",
    "UnsuitableApp",
    "VersionMismatch",
]


class FlGradcodeError(Exception):
    """Base class of all errors that this library raises on purpose.

    Attributes:
        kind: Kind of the rejection that the server records if a node answers with this error; see `protocol.Rejection`.
    """

    kind: ClassVar[str] = "error"


class InvalidCode(FlGradcodeError, ValueError):
    """A code, a worker number or a survivor set that is not valid."""


class NotDecodable(InvalidCode):
    """The survivors' replies do not determine the sum over all shards."""


class NotCertified(InvalidCode):
    """Masks on this graph of classes would reveal more than the sum to the server and its colluders."""


class Overflow(FlGradcodeError, OverflowError):
    """Updates too large for the fixed point of a code over a prime field."""

    kind = "overflow"


class IncompatibleStrategy(FlGradcodeError, TypeError):
    """The wrapped Flower strategy cannot work on one decoded reply."""


class UnsuitableApp(FlGradcodeError, RuntimeError):
    """The clients' app breaks the contract that coding relies on, or lacks the mod."""

    kind = "unsuitable-app"


class VersionMismatch(UnsuitableApp):
    """Server and client have incompatible versions of this library."""

    kind = "version"


class ShardMismatch(FlGradcodeError, ValueError):
    """A node does not hold a requested shard, or its data differ from a manifest."""

    kind = "shard-mismatch"


class InvalidSetting(FlGradcodeError, ValueError):
    """An option or a path that cannot be used."""

    kind = "invalid-setting"


class PrivacyRefused(FlGradcodeError, RuntimeError):
    """An answer that a client's privacy rules forbid: over budget, or a second, different one for the same round."""

    kind = "privacy-refused"


class SecureRefused(FlGradcodeError, RuntimeError):
    """An answer that a node's rules of secure aggregation forbid. Its text says nothing that depends on data."""

    kind = "secure-refused"


class MaskedSumInvalid(FlGradcodeError, ValueError):
    """A decoded masked sum fails a check, and is not used."""


class MasksRemain(MaskedSumInvalid):
    """The masks of a sum do not cancel: a key, a request or a manifest differs between classes."""


class ShardsFailed(MaskedSumInvalid):
    """Some shards failed on all their holders. Only their number is known, so the sum cannot be taken without them."""


class OutOfRange(MaskedSumInvalid):
    """An entry of a decoded sum is larger than any sum of clipped updates."""


class TrainingFailed(FlGradcodeError, RuntimeError):
    """A node's private training ended in an error whose text stays in its log; the next round may succeed."""


class RoundFailed(FlGradcodeError, RuntimeError):
    """A round that had to be decoded could not be, or the connected nodes do not fit the code."""

"""What two holders of a shard disagree about, in sentences."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .._text import numbered

__all__ = ["DISAGREEMENT", "Alike", "Disagreement"]

#: Relative difference between two holders of a shard above which they disagree. Differences between the float
#: arithmetic of two machines stay below.
DISAGREEMENT = 1e-5


@dataclass(frozen=True)
class Disagreement:
    """Two holders of the same shards that sent different updates for them.

    Attributes:
        round: The round that asked for them.
        shards: The shards whose update, or sum of updates, differs.
        holders: The two workers, the one whose copy came first in front.
        apart: Relative difference; infinity if names, shapes or counters differ.
        weights: The numbers of examples that they counted.
        used: Whether the round was decoded, if it was over by then.
    """

    round: int
    shards: tuple[int, ...]
    holders: tuple[int, int]
    apart: float
    weights: tuple[float, float]
    used: bool = False

    def sentences(self, *, stateful: bool, alike: Alike | None) -> str:
        """Returns who disagrees about what, and the rule that the app most likely breaks.

        Args:
            stateful: Whether the function keeps something in `context.state`.
            alike: A worker that sent the same update for two shards.
        """
        one, other = self.holders
        what = "the names, shapes or counters of their arrays differ"
        if math.isfinite(self.apart):
            what = f"relative difference {self.apart:.1e}"
        who = f"Workers {one} and {other} both hold {numbered('shard', self.shards)} and sent different updates"
        if not math.isclose(*self.weights, rel_tol=DISAGREEMENT):
            counted = " and ".join(f"{weight:g}" for weight in self.weights)
            why = (
                f"They counted {counted} examples, so they trained on different data: choose it by "
                "context.node_config['partition-id'] alone, and store the same data for a shard at all its holders."
            )
        elif alike is not None:
            why = (
                f"{alike.sentence} Is data or a model kept from one call to the next, in a variable of the module? "
                "Load what a shard needs at each call, or keep it by partition-id."
            )
        elif stateful:
            why = (
                "train() keeps something in context.state, and a holder that missed a round, or computed the shard in "
                "another one, has kept something else."
            )
        else:
            why = (
                "The update of a shard may depend only on the message, the shard and the seeded generators: is there a "
                "generator of the app's own, a counter or cache in a variable, a file, or a clock?"
            )
        return f"{who} in round {self.round} ({what}). {why}"


@dataclass(frozen=True)
class Alike:
    """A worker that sent the same update for two shards.

    Attributes:
        worker: The worker.
        shards: The two shards.
    """

    worker: int
    shards: tuple[int, int]

    @property
    def sentence(self) -> str:
        """The observation in one sentence."""
        return f"Worker {self.worker} sent the same update for shards {self.shards[0]} and {self.shards[1]}."

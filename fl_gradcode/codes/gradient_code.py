"""The gradient code, an immutable value that holds the encoding matrix `B` and decodes sums with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InvalidCode, NotDecodable
from ._validation import check_workers
from .decoder import IncrementalDecoder
from .encoding_matrix import EncodingMatrix, estimate

__all__ = ["GradientCode"]


@dataclass(frozen=True, eq=False, repr=False)
class GradientCode(EncodingMatrix):
    """A gradient code for n workers and k shards, of which any s workers may straggle.

    Use a constructor (`fractional_repetition`, `cyclic_repetition`, `uncoded`), or pass your own encoding matrix. With
    your own matrix, you assert that the sum decodes with any s stragglers. Only the necessary condition, enough holders
    of every shard, is checked.

    Attributes:
        B: Encoding matrix, shape (n, k), or (n, k, m) for m > 1; float64, or int64 over a prime field; read-only.
        s: Straggler tolerance.
        name: Name of the code's family, for people.
        groups: Disjoint groups of workers that hold disjoint blocks of shards, one tuple of workers a group. Each group
            decodes the sum of its block from any m of its replies. None if the code has no such structure.
        numbers: `REALS`, or a `PrimeField`.
        exact: Whether the sum decodes exactly with any s stragglers. An approximate code only estimates it from n - s
            replies.
    """

    def restrict(self, shards: Sequence[int]) -> GradientCode:
        """Returns the code over some of the shards, in which the other columns of `B` are left out."""
        columns = sorted(set(shards))
        if not columns or columns[0] < 0 or columns[-1] >= self.k:
            raise InvalidCode(f"Shards {columns} are not a non-empty subset of 0..{self.k - 1}.")
        if len(columns) == self.k:
            return self
        B = self.B[:, columns]
        groups = self.groups
        if groups is not None:
            groups = tuple(group for group in groups if B[group[0]].any())
        return replace(self, B=B, groups=groups)

    def incremental(self) -> IncrementalDecoder:
        """Returns a decoder that takes one arrival after another and tells whether the sum can be decoded."""
        return IncrementalDecoder(self)

    def decodable(self, survivors: Iterable[int]) -> bool:
        """Returns whether the replies of `survivors` determine the sum (decoding error at most 1e-8)."""
        return self._add_all(survivors).decodable

    def decoding_vector(self, survivors: Iterable[int]) -> NDArray[np.float64]:
        """Returns the decoding vector a with `a @ B = 1`, which is zero on all workers except the survivors.

        For a code with groups and m = 1, the vector is 1 on the first survivor of each group, in the order given.
        Otherwise it is the shortest solution, or any solution over a prime field. If all rows of B have equal length,
        as in `for_assignment`, the shortest solution amplifies noise least.

        Args:
            survivors: Worker numbers, in order of arrival.

        Returns:
            The vector, shape (n,), or (n, m) for m > 1.

        Raises:
            NotDecodable: The survivors do not determine the sum.
        """
        workers = check_workers(survivors, self.n)
        a = self._add_all(workers).vector()
        if a is None:
            error = self.decoding_error(workers)
            raise NotDecodable(
                f"The replies of {len(workers)} of {self.n} workers do not determine the sum (decoding error "
                f"{error:.2g}){f'; any {self.n - self.s} replies do' if self.exact else ''}."
            )
        return a

    def coverage(self, survivors: Iterable[int]) -> NDArray[np.float64]:
        """Returns the coverage `a @ B` of the best decoding vector, shape (k,).

        It is the share of each shard that the decoded sum contains, and all ones if decoding is exact. For m > 1, the
        share of a shard is the mean over its m blocks.
        """
        return self.coverage_of(self._best_vector(survivors))

    def decoding_error(self, survivors: Iterable[int]) -> float:
        """Returns the decoding error `max |a @ B - 1|` of the best decoding vector; at most 1e-8 if decodable."""
        return self.error_of(self._best_vector(survivors))

    def kappa(self, survivors: Iterable[int]) -> float:
        """Returns the noise amplification of the best decoding vector, which is 1 for repetition; see `kappa_of`."""
        return self.kappa_of(self._best_vector(survivors))

    def decode(self, replies: ArrayLike, survivors: Iterable[int], *, length: int | None = None) -> NDArray[Any]:
        """Returns the decoded sum of all shards' updates.

        Args:
            replies: The replies, shape (len(survivors), ceil(d / m)); row t is the reply of worker survivors[t].
            survivors: Worker numbers, in order of arrival.
            length: Length d of the updates, to cut off the padding that m > 1 may have added.

        Returns:
            The sum, shape (d,). Over the reals, it is float32 if the replies are, else float64. Over a prime field, it
            is float64, or int64 for whole numbers.

        Raises:
            NotDecodable: The survivors do not determine the sum.
        """
        workers = check_workers(survivors, self.n)
        x = np.asarray(replies)
        if x.ndim != 2 or x.shape[0] != len(workers):
            raise InvalidCode(f"Replies have shape {x.shape}; {len(workers)} survivors need one row each.")
        total = self.numbers.decode(x, self.decoding_vector(workers)[workers], order=self.order_of(workers))
        if length is None:
            return total
        if not 0 <= length <= total.size:
            raise InvalidCode(f"length={length} does not fit a decoded vector of {total.size} entries.")
        return total[:length]

    def _best_vector(self, survivors: Iterable[int]) -> NDArray[Any]:
        workers = check_workers(survivors, self.n)
        exact = self._add_all(workers).vector()
        return estimate(self, workers) if exact is None else exact

    def _add_all(self, survivors: Iterable[int]) -> IncrementalDecoder:
        decoder = self.incremental()
        decoder.update(check_workers(survivors, self.n))
        return decoder

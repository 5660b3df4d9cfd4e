"""What is worked on piece by piece, so that memory stays within bounds, has the same bits as in one piece."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from fl_gradcode.codes.prime_field import P, PrimeField
from fl_gradcode.protocol import packing as pack
from fl_gradcode.protocol.encoding import FixedPointEncoding, FloatEncoding

BFLOAT16 = Array(
    "bfloat16", (3, 4), "numpy.ndarray", Array(np.arange(12, dtype=np.uint16).view("V2").reshape(3, 4)).data
)
MODEL = {
    "single": np.full((7, 11), 0.1, np.float32),
    "double": np.full((5, 9), 0.3),
    "column-major": np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
    "counter": np.array(41),
    "nothing": np.zeros((0, 3), np.float32),
    "half": np.full(6, 0.5, np.float16),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_bounds_of_pieces_do_not_matter(dtype: Any) -> None:
    before = ArrayRecord({**{name: Array(np.asarray(values)) for name, values in MODEL.items()}, "brain": BFLOAT16})
    layout = tuple((name, array.dtype, tuple(array.shape)) for name, array in before.items())
    rng = np.random.default_rng(0)
    total = rng.standard_normal(pack.size_of(layout) + 1).astype(dtype)  # and one entry of padding
    whole = pack.rebuild_arrays(layout, before, [total.copy()], 3.0)
    for _ in range(30):
        bounds = np.sort(rng.integers(0, total.size + 1, 4))
        pieces = [piece for piece in np.split(total.copy(), bounds) if piece.size]
        assert pack.rebuild_arrays(layout, before, pieces, 3.0) == whole
    expected = before["double"].numpy().reshape(-1) + total[77:122].astype(np.float64) / dtype(3)
    assert np.allclose(whole["double"].numpy().reshape(-1), expected, rtol=1e-6)


def test_a_sum_over_a_field_decodes_to_the_same_numbers_in_pieces() -> None:
    rng = np.random.default_rng(0)
    replies = [rng.integers(0, P, (1 << 20) + 5, dtype=np.uint32) for _ in range(3)]
    a = rng.integers(0, P, (3, 2))
    pieces = list(PrimeField().decode_in_pieces(replies, a))
    assert len(pieces) > 2
    assert np.array_equal(np.concatenate(pieces), PrimeField().decode(replies, a))


@pytest.mark.parametrize("coefficient", [0, 1, 2, 65535, 65536, P // 2, P // 2 + 1, P - 1])
@pytest.mark.parametrize("k", [1, 3])
def test_fixed_point_is_added_up_exactly(coefficient: int, k: int) -> None:
    """Against Python's integers, at the edges of what fits and where a quotient is nearly a half."""
    room = (P - 1) // 2 // k
    edges = [0, 1, -1, 2, room, -room, room - 1, 1 - room]
    halves = [round((t + 0.5) * P / coefficient) for t in range(-50, 50)] if coefficient else []
    near = [v for h in halves for v in (h - 1, h, h + 1) if abs(v) <= room]
    rng = np.random.default_rng(coefficient % 97)
    numbers = [*edges, *near, *rng.integers(-room, room + 1, 1000).tolist()]
    encoding = FixedPointEncoding(PrimeField(0), k)
    first = [int(x) for x in rng.permutation(numbers)]
    total = encoding.add(None, np.array(first, np.float64), (P - 1,))
    total = encoding.add(total, np.array(numbers, np.float64), (coefficient,))
    expected = [((P - 1) * x + coefficient * y) % P for x, y in zip(first, numbers, strict=True)]
    assert encoding.sent(total).tolist() == expected
    assert total.nbytes == 4 * len(numbers)


@pytest.mark.parametrize("coefficient", [1.0, -0.75, 0.0])
def test_the_first_shard_gives_its_vector_away_and_nothing_else_changes(coefficient: float) -> None:
    update = np.array([1.5, -0.0, 3e-45, -2.5e38], np.float32)
    expected = pack.encode_row(None, update, (coefficient,))
    total, _ = FloatEncoding().add_update(None, update.copy(), (coefficient,))
    assert total.tobytes() == expected.tobytes()


def test_a_long_row_is_encoded_as_one_product() -> None:
    """Longer than what is multiplied at once."""
    rng = np.random.default_rng(0)
    vector = rng.standard_normal((1 << 17) + 3, dtype=np.float32)
    first, second = np.float32(0.3), np.float32(-1.7)
    total = pack.encode_row(pack.encode_row(None, vector, (0.3,)), vector, (-1.7,))
    assert np.array_equal(total, vector * first + vector * second)


def test_flattening_lets_go_of_what_was_returned() -> None:
    before = {"a": Array(np.zeros(3, np.float32)), "b": Array(np.ones(2, np.float32))}
    after = {"a": Array(np.ones(3, np.float32)), "b": Array(np.ones(2, np.float32))}
    layout, update = pack.flatten_update(before, after)
    assert after == {}
    assert [name for name, _, _ in layout] == ["a", "b"]
    assert update.tolist() == [1, 1, 1, 0, 0]

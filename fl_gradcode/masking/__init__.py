"""What masked sums are made of: labelled keys, their streams, the two rings, fixed point, and integer noise."""

from .integer_noise import discrete_gaussian
from .labels import KEY_BYTES, Field, derive, fields, hash_of
from .quantiser import ENTRY_WORDS, Quantiser, RoundedSum, digits_of, fixed_order_norm, restored
from .ring import FIELD, INTEGERS, Ring, ring_named
from .streams import CHECK_WORDS, PARTS, Part, Stream, add_streams, counter_mode, mask_streams, poison, stream

__all__ = [
    "CHECK_WORDS",
    "ENTRY_WORDS",
    "FIELD",
    "INTEGERS",
    "KEY_BYTES",
    "PARTS",
    "Field",
    "Part",
    "Quantiser",
    "Ring",
    "RoundedSum",
    "Stream",
    "add_streams",
    "counter_mode",
    "derive",
    "digits_of",
    "discrete_gaussian",
    "fields",
    "fixed_order_norm",
    "hash_of",
    "mask_streams",
    "poison",
    "restored",
    "ring_named",
    "stream",
]

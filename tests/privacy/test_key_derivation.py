"""Keys and the stream they open: against the numbers of privacy.md, and against HKDF, AES and Box-Muller by hand."""

from __future__ import annotations

import hashlib
import hmac
import math
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from fl_gradcode.privacy.key_derivation import KeyContext, PRFStream

SECRET = bytes(range(32))
CONTEXT = KeyContext("run-1", 3, 2, bytes([0]) * 32, bytes([1]) * 32, bytes([2]) * 32)


def key_by_hand(context: KeyContext, secret: bytes, purpose: str) -> bytes:
    fields = [purpose.encode(), context.run.encode(), b"%d" % context.round, b"%d" % context.shard]
    fields += [context.weights, context.config, context.manifest]
    info = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
    extracted = hmac.new(b"fl-gradcode/dp/v1", secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def words_by_hand(key: bytes, first: int, count: int) -> list[int]:
    """Counter mode from single blocks."""
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    blocks = b"".join(encryptor.update(block.to_bytes(16, "big")) for block in range((first + count) // 2 + 1))
    return [int.from_bytes(blocks[8 * i : 8 * i + 8], "little") >> 11 for i in range(first, first + count)]


def normals_by_hand(key: bytes, n: int, first: int = 0) -> list[float]:
    half = (n + 1) // 2
    words = words_by_hand(key, first, 2 * half)
    radii = [math.sqrt(-2 * math.log((word + 0.5) / 2**53)) for word in words[:half]]
    angles = [2 * math.pi * word / 2**53 for word in words[half:]]
    pairs = [*zip(radii, angles, strict=True)]
    return [*(r * math.cos(t) for r, t in pairs), *(r * math.sin(t) for r, t in pairs)][:n]


def test_gives_the_stream_vector_of_the_design() -> None:
    noise, sample = CONTEXT.derive(SECRET, "noise"), CONTEXT.derive(SECRET, "sample")
    assert noise.hex() == "72c17777078ec9d529c608606be25a07a92d0e4c226690eaf0a9bfe4c623c734"
    assert sample.hex() == "32b09aeba14be5eaa233942d0366875ac719dbe7c58b4a10436ae0b68e0b584e"
    normals = [0.4608001096515249, 1.5802349760863719, 0.3422055557997995, -0.20605857148606269]
    np.testing.assert_allclose(PRFStream(noise).normal(4), normals, rtol=1e-14)
    words = np.frombuffer(bytes.fromhex("df7f89b99d151fd98ed8a676ca3ce847"), "<u8") >> np.uint64(11)
    assert np.array_equal(PRFStream(noise).uniform(2), words * 2.0**-53)
    assert np.flatnonzero(PRFStream(sample).uniform(40) < 0.1).tolist() == [1, 3, 22, 24, 30]


def test_keys_and_numbers_are_those_of_hmac_aes_and_box_muller_by_hand() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        context = KeyContext(
            "é" * int(rng.integers(0, 9)), int(rng.integers(10**6)), int(rng.integers(99)), *map(rng.bytes, (32,) * 3)
        )
        secret = rng.bytes(32)
        for purpose in ("noise", "sample"):
            key = context.derive(secret, purpose)
            assert key == key_by_hand(context, secret, purpose)
            n = int(rng.integers(1, 40))
            assert np.array_equal(PRFStream(key).uniform(n), np.array(words_by_hand(key, 0, n)) * 2.0**-53)
            np.testing.assert_allclose(PRFStream(key).normal(n), normals_by_hand(key, n), rtol=1e-12, atol=1e-15)


def test_a_long_draw_is_made_of_the_same_numbers_as_the_oracle_makes() -> None:
    key, n = CONTEXT.derive(SECRET, "noise"), 70_001  # several blocks, and an odd size
    np.testing.assert_allclose(PRFStream(key).normal(n), normals_by_hand(key, n), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("purpose", ["noise", "sample"])
def test_any_other_field_makes_another_key_and_another_digest(purpose: str) -> None:
    changes = [
        {"run": "run-2"},
        {"run": ""},
        {"round": 4},
        {"shard": 3},
        {"weights": bytes(31) + b"\x01"},
        {"config": bytes(32)},
        {"manifest": bytes([2]) * 31 + b"\x03"},
        # A byte moved to the next field, and fields that read the same side by side.
        {"run": "run-", "round": 13},
        {"run": "run-13", "round": 2, "shard": 2},
        {"round": 32, "shard": 2},
        {"round": 3, "shard": 22},
        {"weights": bytes(31), "config": b"\x00" + bytes([1]) * 32},
        {"config": bytes([1]) * 33, "manifest": bytes([2]) * 31},
        {"config": bytes([1]) * 31, "manifest": b"\x01" + bytes([2]) * 32},
    ]
    contexts = [CONTEXT, *(replace(CONTEXT, **change) for change in changes)]  # type: ignore[arg-type]
    assert len({one.derive(SECRET, purpose) for one in contexts}) == len(contexts)  # type: ignore[arg-type]
    assert len({one.digest for one in contexts}) == len(contexts)
    assert CONTEXT.derive(SECRET, "noise") != CONTEXT.derive(SECRET, "sample")
    assert CONTEXT.derive(SECRET, "noise") != CONTEXT.derive(SECRET[::-1], "noise")


def test_a_million_normals_follow_the_normal_law() -> None:
    z = PRFStream(CONTEXT.derive(SECRET, "noise")).normal(1_000_000)
    assert z.mean() == pytest.approx(-0.00077, abs=1e-5)  # privacy.md, section 13
    assert z.std() == pytest.approx(1.00062, abs=1e-5)
    assert stats.kstest(z, "norm").pvalue > 0.01
    assert abs(float(stats.skew(z))) < 0.01 and abs(float(stats.kurtosis(z))) < 0.02  # four standard errors
    halves = z[:500_000], z[500_000:]  # each pair of Box and Muller has one in each
    assert abs(np.corrcoef(*halves)[0, 1]) < 0.006 and abs(np.corrcoef(halves[0] ** 2, halves[1] ** 2)[0, 1]) < 0.006
    assert np.abs(z).max() < 8.66


def test_uniform_numbers_are_uniform_and_below_one() -> None:
    u = PRFStream(CONTEXT.derive(SECRET, "sample")).uniform(1_000_000)
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 0.01
    assert np.array_equal(u * 2**53, np.rint(u * 2**53))


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 64, 32_767, 32_769])
def test_any_size_is_drawn_and_the_next_call_goes_on(size: int) -> None:
    key = CONTEXT.derive(SECRET, "noise")
    stream = PRFStream(key)
    first, then = stream.normal(size), stream.normal(5)
    assert first.shape == (size,) and first.dtype == np.float64
    np.testing.assert_allclose(then, normals_by_hand(key, 5, first=size + size % 2), rtol=1e-12)
    again = PRFStream(key)
    pieces = np.concatenate([again.uniform(size), again.uniform(0), again.uniform(3)])
    assert np.array_equal(pieces, PRFStream(key).uniform(size + 3))


def test_a_key_of_another_length_is_refused() -> None:
    for length in (0, 16, 31, 33):
        with pytest.raises(ValueError, match=f"has {length} bytes; AES-256 takes 32"):
            PRFStream(bytes(length))

"""A second implementation of the masked reply, written from the formulas, which imports nothing of the library.

HKDF is built from HMAC, X25519 is a Montgomery ladder, AES-256 works on single blocks, and all arithmetic is on Python
integers.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

P = 2**31 - 1
SALT = b"fl-gradcode/secagg/v1"


def lp(*values: Any) -> bytes:
    out = b""
    for value in values:
        field = value if isinstance(value, bytes) else str(value).encode()
        out += struct.pack(">I", len(field)) + field
    return out


def hkdf(secret: bytes, *label: Any) -> bytes:
    extracted = hmac.new(SALT, secret, hashlib.sha256).digest()
    return hmac.new(extracted, lp(*label) + b"\x01", hashlib.sha256).digest()


# ---- X25519 (RFC 7748) ----

_Q = 2**255 - 19


def x25519(scalar: bytes, point: bytes = b"\x09" + bytes(31)) -> bytes:
    k = bytearray(scalar)
    k[0] &= 248
    k[31] = (k[31] & 127) | 64
    number = int.from_bytes(k, "little")
    u = int.from_bytes(point, "little") % 2**255
    x2, z2, x3, z3, swap = 1, 0, u, 1, 0
    for t in range(254, -1, -1):
        bit = number >> t & 1
        if swap ^ bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        da, cb = d * a % _Q, c * b % _Q
        x3, z3 = pow(da + cb, 2, _Q), u * pow(da - cb, 2, _Q) % _Q
        aa, bb = a * a % _Q, b * b % _Q
        e = aa - bb
        x2, z2 = aa * bb % _Q, e * (aa + 121665 * e) % _Q
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, _Q - 2, _Q) % _Q).to_bytes(32, "little")


# ---- AES-256 (FIPS 197) ----


def _times(a: int, b: int) -> int:
    out = 0
    while b:
        out ^= a if b & 1 else 0
        a = (a << 1) ^ (0x11B if a & 0x80 else 0)
        b >>= 1
    return out


def _sbox() -> list[int]:
    table = []
    for value in range(256):
        inverse = next((x for x in range(256) if _times(value, x) == 1), 0)
        out = 0x63
        for shift in range(5):
            out ^= (inverse << shift | inverse >> (8 - shift)) & 255
        table.append(out)
    return table


_S = _sbox()


def _round_keys(key: bytes) -> list[list[int]]:
    words = [list(key[4 * i : 4 * i + 4]) for i in range(8)]
    constant = 1
    for i in range(8, 60):
        word = list(words[-1])
        if i % 8 == 0:
            word = [_S[x] for x in word[1:] + word[:1]]
            word[0] ^= constant
            constant = _times(constant, 2)
        elif i % 8 == 4:
            word = [_S[x] for x in word]
        words.append([x ^ y for x, y in zip(word, words[i - 8], strict=True)])
    return [[x for word in words[4 * r : 4 * r + 4] for x in word] for r in range(15)]


def aes_block(keys: list[list[int]], block: bytes) -> bytes:
    state = [x ^ y for x, y in zip(block, keys[0], strict=True)]
    for number in range(1, 15):
        state = [_S[state[(i + 4 * (i % 4)) % 16]] for i in range(16)]
        if number < 14:
            mixed = []
            for c in range(0, 16, 4):
                column = state[c : c + 4]
                for r in range(4):
                    mine, next_, third, last = (column[(r + shift) % 4] for shift in range(4))
                    mixed.append(_times(mine, 2) ^ _times(next_, 3) ^ third ^ last)
            state = mixed
        state = [x ^ y for x, y in zip(state, keys[number], strict=True)]
    return bytes(state)


def words(key: bytes, count: int) -> list[int]:
    """Little-endian 32-bit words of AES-256 in counter mode from counter 0."""
    keys, out = _round_keys(key), b""
    for counter in range(-(-count // 4)):
        out += aes_block(keys, counter.to_bytes(16, "big"))
    return list(struct.unpack(f"<{len(out) // 4}I", out))[:count]


def elements(key: bytes, length: int, modulus: int, source: Callable[[bytes, int], Sequence[int]] = words) -> list[int]:
    """The stream of a key in the ring; words of 31 bits that are p are replaced from behind the stream."""
    if modulus != P:
        return list(source(key, length))
    drawn = [word % 2**31 for word in source(key, length + 64)]
    out, spare = drawn[:length], length
    missing = [i for i, word in enumerate(out) if word == P]
    while missing:
        for i in missing:
            out[i] = drawn[spare]
            spare += 1
        missing = [i for i in missing if out[i] == P]
    return out


# ---- a round ----


def manifest_digest(body: bytes, public: Sequence[bytes], commitments: Sequence[bytes]) -> bytes:
    content = lp(hashlib.sha256(body).digest())
    for c, (key, commitment) in enumerate(zip(public, commitments, strict=True)):
        content += lp(c) + lp(key) + lp(commitment)
    return hashlib.sha256(content).digest()


def quantised(
    updates: Sequence[Sequence[float]], omegas: Sequence[float], bound: float, bits: int, key: bytes
) -> list[int]:
    drawn = words(key, -(-len(updates[0]) // 2))
    dither = [half for word in drawn for half in (word % 2**16, word >> 16)][: len(updates[0])]
    out = []
    for i, half in enumerate(dither):
        total = 0
        for update, omega in zip(updates, omegas, strict=True):
            total += round(2.0 ** (bits + 16) * omega * max(-bound, min(bound, float(update[i]))))
        out.append((total + half) // 2**16)
    return out


def digits(values: Sequence[float]) -> list[int]:
    out = []
    for value in values:
        whole = round(value * 2**30)
        rest = abs(whole)
        for _ in range(5):
            out.append(rest % 2**15 * (1 if whole >= 0 else -1))
            rest //= 2**15
        out.append(0)
    return out


def reply(
    *,
    modulus: int,
    m: int,
    row: Mapping[int, Sequence[int]],
    edges: Sequence[tuple[int, int]],
    seeds: Mapping[int, bytes],
    public: Sequence[bytes],
    body_digest: bytes,
    manifest: bytes,
    request: bytes,
    integers: Mapping[int, Mapping[str, Sequence[int]]],
) -> bytes:
    """The payload of a worker's reply: for each class of its row, masked integers times coefficients."""
    payload = b""
    for part in ("update", "metrics", "check", "status"):
        length = -(-len(integers[next(iter(row))][part]) // m) * m
        total = [0] * (length // m)
        for c, coefficients in row.items():
            v = [*integers[c][part], *[0] * (length - len(integers[c][part]))]
            for low, high in edges:
                if c not in (low, high):
                    continue
                other = high if c == low else low
                private = hkdf(seeds[c], "class-key", body_digest, c)
                key = hkdf(x25519(private, public[other]), "edge", manifest, low, high, public[low], public[high])
                stream = elements(hkdf(key, "mask", request, part), length, modulus)
                v = [x + y if c == low else x - y for x, y in zip(v, stream, strict=True)]
            for block, coefficient in enumerate(coefficients):
                for i in range(length // m):
                    total[i] += coefficient * v[block * (length // m) + i]
        payload += struct.pack(f"<{len(total)}I", *(x % modulus for x in total))
    return payload

"""The reference's test vectors, and a second implementation that shares no code with the library."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from numpy.typing import NDArray

from fl_gradcode.codes import fractional_repetition, reed_solomon
from fl_gradcode.masking import streams
from fl_gradcode.masking.labels import derive, hash_of
from fl_gradcode.masking.streams import Stream, add_streams, mask_streams, stream
from fl_gradcode.secagg import FIELD, INTEGERS, ShardResult, agreement_tag, encode, request_digest
from fl_gradcode.secagg.keys import data_commitment, dither_key, edge_key, noise_key, private_key, public_key
from fl_gradcode.secagg.manifest import _digest
from tests.secagg import second
from tests.secagg.samples import REQUEST, body_of, class_integers, keys_of, results_for, sealed, seed_of

M0 = hashlib.sha256(b'{"ring":"2^32","test":1}').digest()
# Of an earlier form of the manifest and of the request, which keys and streams take as they are.
M = bytes.fromhex("dee7ca83b2fdd4dacabe8c0ed17bdd02ce3777dc834f2ffeb0fdc06a49e46ce4")
R = bytes.fromhex("f14ac8903e9c1da761cefa6acc65893e9d3fed6ee17f240c541e50a3446f3612")


def public(number: int) -> bytes:
    return public_key(private_key(seed_of(number), M0, number))


def test_keys_of_classes_and_edges() -> None:
    assert M0.hex() == "710c3ccfae4735c45809987e028cccf482efdd1ed774ffed3f2d4906a30a4b76"
    assert private_key(seed_of(0), M0, 0).hex() == "24c82b64866afb0d18f55e3f1d3558acfcec34029563c437926cc81a9ce3acdf"
    assert public(0).hex() == "e31778679bc259b892005ec871cdad572d2696e584e42a0d494a1d0b88b8cc5b"
    assert public(1).hex() == "31afcb399df7c26e00b42e721f97078dd6cd905efa0fa2d2f0740d9377fe0913"
    assert hash_of(M0, 0, public(0), 1, public(1)) == M
    assert hash_of("fl-gradcode/secagg/request/v1", M, "run-1", "train", 3, bytes(32), b"\1" * 32, b"\2" * 32) == R
    keys = {0: public(0), 1: public(1)}
    for ours in (0, 1):  # both ends derive the same key
        found = edge_key(private_key(seed_of(ours), M0, ours), ours, 1 - ours, keys, M)
        assert found.hex() == "cf2aa72eadacabb87e571cb077a1d1596738e5fead0a16739e83212634adf7f4"


def test_vectors_of_the_present_forms() -> None:
    """Those of the page on secure aggregation, which the second implementation gave."""
    commitments = [data_commitment(seed_of(c), M0, c, [(c, "d")]) for c in (0, 1)]
    assert commitments[0].hex() == "52911d75fabc1215e3fd444abec97473e3ffa9c3f5bbcd39a21fed8a0fe3fb1b"
    manifest = _digest(M0, [(public(c), commitments[c]) for c in (0, 1)])
    assert manifest.hex() == "b3cdd3c816e73d79ebaabea77aa51b6fee3dee6a5ae617545242109192126c58"
    found = edge_key(private_key(seed_of(0), M0, 0), 0, 1, {0: public(0), 1: public(1)}, manifest)
    assert found.hex() == "7d7d816b63349e1257e93951e1bf30d20898faa77a49bb92c01cf11d253d64ed"
    request = request_digest(
        manifest=manifest,
        run="run-1",
        kind="train",
        round=3,
        content=bytes(32),
        given=b"\1" * 32,
        quantiser=b"\2" * 32,
        layout=b"\3" * 32,
    )
    assert request.hex() == "a0934a8f53c43038fc50128c8bd27dd8f6cfde9c74e246e01600762e5f38c314"
    (update,) = mask_streams({(0, 1): found}, request, "update")
    assert stream(update.key, 4, INTEGERS).tolist() == [1683995769, 1292273909, 2541066902, 725914367]
    dither = stream(dither_key(seed_of(0), request, 0), 4, INTEGERS)
    assert dither.tolist() == [1049636980, 1148224485, 3908140192, 1113511790]
    noise = noise_key(seed_of(0), request, 0, np.array([1, -2], np.int32))
    assert noise.hex() == "6429f97b8f22498e8aa49b5fa5cd8bb694a6cb1bcca82c380f43d12c8091b814"
    tag = agreement_tag(seed_of(0), request, 5, np.array([1, 2], np.uint32))
    assert tag.hex() == "c36135165d66dadf61fe4663fd58c00d2b621e8c211f49507568b8f410466230"


def test_mask_streams() -> None:
    edge = {(0, 1): bytes.fromhex("cf2aa72eadacabb87e571cb077a1d1596738e5fead0a16739e83212634adf7f4")}
    (update,), (check,) = mask_streams(edge, R, "update"), mask_streams(edge, R, "check")
    assert stream(update.key, 4, INTEGERS).tolist() == [337542877, 1906783201, 3688247770, 4110115942]
    assert stream(update.key, 4, FIELD).tolist() == [337542877, 1906783201, 1540764122, 1962632294]
    assert stream(check.key, 4, INTEGERS).tolist() == [1407621054, 916807938, 422641270, 1314206315]
    assert update.plus == (0,) and update.minus == (1,)


def test_a_word_that_is_no_element_is_replaced_from_behind_the_stream() -> None:
    key = hashlib.sha256(b"reject59349").digest()
    assert int(stream(key, 50028, INTEGERS)[50025]) == 0x7FFFFFFF
    assert stream(key, 50028, FIELD)[-4:].tolist() == [356486423, 1035545214, 1475775413, 1935052088]
    # Added and subtracted, it cancels too.
    vectors: dict[int, NDArray[np.uint32]] = {c: np.full(50028, 5, np.uint32) for c in (0, 1)}
    add_streams(vectors, [Stream(key, plus=(0,), minus=(1,))], FIELD)
    assert vectors[0][50025] == 1035545214 + 5
    assert ((vectors[0].astype(np.int64) + vectors[1]) % FIELD.modulus == 10).all()


def test_replacements_that_are_no_elements_are_replaced_by_the_words_after_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = [7, second.P, 3, second.P, second.P, 11, second.P, 12, 13]
    found = second.elements(b"", 4, second.P, lambda key, count: [*raw, *[1] * count])
    assert found == [7, 12, 3, 11]  # words 4 and 5 replace; word 4 is p, so word 6, which is p, so word 7

    class Raw:
        """A cipher whose stream is known."""

        def __init__(self, _: bytes) -> None:
            self.left = [*raw, *[1] * 9]

        def update(self, zeros: memoryview) -> bytes:
            taken, self.left = self.left[: len(zeros) // 4], self.left[len(zeros) // 4 :]
            return b"".join(word.to_bytes(4, "little") for word in taken)

        def update_into(self, zeros: memoryview, buffer: bytearray) -> None:
            buffer[: len(zeros)] = self.update(zeros)

    monkeypatch.setattr(streams, "counter_mode", Raw)
    for chunk in (1, 2, 3, 100):
        monkeypatch.setattr(streams, "_CHUNK", chunk)
        assert stream(b"", 4, FIELD).tolist() == found


def test_streams_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    key = hashlib.sha256(b"reject59349").digest()
    whole = stream(key, 60_000, FIELD)
    monkeypatch.setattr("fl_gradcode.masking.streams._CHUNK", 997)
    assert (stream(key, 60_000, FIELD) == whole).all()


def test_the_second_implementation_knows_its_primitives() -> None:
    # RFC 7748, section 5.2; FIPS 197, appendix C.3; RFC 5869 is met by the vectors below.
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    assert second.x25519(scalar, point).hex() == "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    keys = second._round_keys(bytes(range(32)))
    assert second.aes_block(keys, bytes.fromhex("00112233445566778899aabbccddeeff")).hex() == (
        "8ea2b7ca516745bfeafc49904b496089"
    )
    assert second.hkdf(seed_of(0), "class-key", M0, 0) == private_key(seed_of(0), M0, 0)
    assert second.words(derive(seed_of(0), "x"), 9) == stream(derive(seed_of(0), "x"), 9, INTEGERS).tolist()


@pytest.mark.parametrize(
    ("code", "modulus"),
    [
        (fractional_repetition(8, 1), 2**32),
        (fractional_repetition(6, 1, k=5), 2**32),
        (reed_solomon(5, 1), second.P),
        (reed_solomon(6, 1, m=2), second.P),
    ],
    ids=str,
)
def test_a_second_implementation_sends_the_same_bytes(code, modulus) -> None:
    body = body_of(code, size=5, largest_weight=10.0, colluders=1, min_classes=2)
    manifest = sealed(body)
    results = {
        j: ShardResult(one.update * 5, 1.0 + j, one.metrics) for j, one in results_for(body).items()
    }  # some entries are clipped
    classes = body.classes
    seeds = {c: seed_of(c) for c in range(len(classes))}
    keys = [second.x25519(second.hkdf(seeds[c], "class-key", hashlib.sha256(body.text).digest(), c)) for c in seeds]
    digest = second.manifest_digest(body.text, keys, [bytes(32)] * len(keys))
    assert digest == manifest.digest
    integers = {}
    for c, shards in enumerate(classes.members):
        ours = [results[j] for j in shards]
        update = second.quantised(
            [one.update.tolist() for one in ours],
            [one.weight / 10.0 for one in ours],
            1.0,
            body.quantiser.fraction_bits,
            second.hkdf(seeds[c], "dither", REQUEST, shards[0]),
        )
        clipped = sum(abs(x) > 1 for one in ours for x in one.update.tolist())
        each = [
            second.digits([one.weight, float(clipped if number == 0 else 0), *one.metrics.tolist()])
            for number, one in enumerate(ours)
        ]
        metrics = [sum(column) for column in zip(*each, strict=True)]
        integers[c] = {"update": update, "metrics": metrics, "check": [len(shards)] * 4, "status": [0]}
    for worker in range(classes.n):
        row = {c: classes.matrix[worker, c].tolist() for c in classes.sent_by(worker)}
        expected = second.reply(
            modulus=modulus,
            m=classes.m,
            row=row,
            edges=body.graph.edges,
            seeds=seeds,
            public=keys,
            body_digest=body.digest,
            manifest=digest,
            request=REQUEST,
            integers=integers,
        )
        ours_ = {j: results[j] for c in row for j in classes.members[c]}
        assert encode(keys_of(manifest, worker), REQUEST, ours_).payload() == expected


def test_a_failed_class_adds_a_stream_of_its_own_to_all_but_the_count_of_failures() -> None:
    body = body_of(fractional_repetition(8, 1), size=5)
    results = dict[int, ShardResult | None](results_for(body))
    results[4] = None
    failed = class_integers(body, 0, results)
    for part, words in failed.items():
        added = second.elements(second.hkdf(seed_of(0), "poison", REQUEST, part), len(words), 2**32)
        left = [(int(x) - y) % 2**32 for x, y in zip(words, added, strict=True)]
        if part in ("update", "metrics"):
            assert left == [0] * len(words)
        elif part == "check":
            assert left == [2] * 4
        elif part == "status":
            assert words.tolist() == [1]


def test_the_dither_s_key_is_bound_to_class_and_request() -> None:
    assert dither_key(seed_of(1), R, 4) == second.hkdf(seed_of(1), "dither", R, 4)

"""What a server, a stranger's manifest or a broken key can try, and what it gets."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fl_gradcode.codes import fractional_repetition, reed_solomon
from fl_gradcode.errors import InvalidSetting, MasksRemain, NotCertified, OutOfRange, SecureRefused, ShardsFailed
from fl_gradcode.masking import streams
from fl_gradcode.masking.labels import derive
from fl_gradcode.secagg import (
    ClassIntegers,
    ClassKeys,
    Manifest,
    ManifestBody,
    MaskedReply,
    Quantiser,
    ShardResult,
    agreement_tag,
    class_keys,
    decode,
    decoding,
    encode,
    masked_reply,
    request_digest,
)
from fl_gradcode.secagg.manifest import canonical, parsed
from tests.secagg.samples import REQUEST, body_of, class_integers, keys_of, replies_of, results_for, sealed, seed_of

FRC = fractional_repetition(8, 1)


def one_reply_a_class(manifest: Manifest, replies: list[MaskedReply]) -> list[MaskedReply]:
    return [replies[workers[0]] for workers in manifest.body.classes.holders]


# ---- what the server sees ----


def test_the_transcript_is_the_same_for_inputs_with_equal_sums_and_transported_keys() -> None:
    """Move what changed in the inputs into the streams: every byte that reaches the server is then the same."""
    body = body_of(FRC, metrics=0, size=6)
    manifest, ring = sealed(body), body.classes.ring
    first = dict(enumerate(integers_of(body, results_for(body, seed=1))))
    second = dict(enumerate(integers_of(body, results_for(body, seed=2))))
    parts = first[0].keys()
    for part in parts:  # class 3 makes the sums equal
        total = {c: first[c][part].astype(np.int64) - second[c][part] for c in first}
        second[3][part] = ((second[3][part] + sum(total.values())) % ring.modulus).astype(np.uint32)
    edge_keys = {edge: derive(seed_of(99), *edge) for edge in body.graph.edges}
    streams = {part: {edge: edge_stream(key, part, body) for edge, key in edge_keys.items()} for part in parts}
    # A spanning path 0 - 1 - 2 - 3 carries the difference of each class to the next.
    moved = {part: dict(edges) for part, edges in streams.items()}
    for part in parts:
        carried = np.zeros(len(streams[part][body.graph.edges[0]]), np.int64)
        for low, high in ((0, 1), (1, 2), (2, 3)):
            carried = carried + first[low][part].astype(np.int64) - second[low][part]
            moved[part][low, high] = (streams[part][low, high] + carried) % ring.modulus
    for part in parts:
        for c in first:
            sent = masked(first[c][part], c, streams[part], ring.modulus)
            assert (sent == masked(second[c][part], c, moved[part], ring.modulus)).all()
    assert all((first[c]["update"] != second[c]["update"]).any() for c in first)
    # And the streams are what a reply is masked by.
    keys = keys_of(manifest, 0)
    keys._found.update(edge_keys)
    results = results_for(body, seed=1)
    reply = encode(keys, REQUEST, {j: results[j] for j in body.classes.members[0]})
    for part in parts:
        assert (reply.parts[part] == masked(first[0][part], 0, streams[part], ring.modulus)).all()


def integers_of(body: ManifestBody, results: dict[int, ShardResult]) -> list[dict[Any, Any]]:
    return [class_integers(body, c, results) for c in range(len(body.classes))]


def edge_stream(key: bytes, part: Any, body: ManifestBody) -> np.ndarray:
    (found,) = streams.mask_streams({(0, 1): key}, REQUEST, part)
    return streams.stream(found.key, body.lengths()[part], body.classes.ring).astype(np.int64)


def masked(integers: np.ndarray, c: int, streams: dict[tuple[int, int], np.ndarray], modulus: int) -> np.ndarray:
    total = integers.astype(np.int64)
    for (low, high), one in streams.items():
        total = total + one * ((c == low) - (c == high))
    return total % modulus


def test_what_a_server_reads_from_one_class_looks_uniform() -> None:
    body = body_of(FRC, size=20_000, metrics=0)
    zeros = {j: ShardResult(np.zeros(20_000, np.float32), 1.0, np.zeros(0)) for j in range(8)}
    words = replies_of(sealed(body), zeros)[0].parts["update"]
    counts = np.bincount(words >> 24, minlength=256)
    assert ((counts - 20_000 / 256) ** 2 / (20_000 / 256)).sum() < 360  # chi-square, 255 degrees: 1e-5
    assert np.unique(words).size > 19_900


# ---- wrong keys, other requests, lost edges ----


def assert_refused(manifest: Manifest, replies: list[MaskedReply]) -> None:
    with pytest.raises(MasksRemain):
        decode(manifest, replies)


@pytest.mark.parametrize("code", [FRC, reed_solomon(6, 1), reed_solomon(6, 1, m=2)], ids=str)
def test_a_wrong_key_another_request_or_a_lost_edge_never_passes_the_check_words(code: Any) -> None:
    body = body_of(code, size=3, metrics=0, colluders=0, min_classes=2)
    manifest, results = sealed(body), results_for(body_of(code, size=3, metrics=0, colluders=0, min_classes=2))
    good = replies_of(manifest, results)
    classes = body.classes
    edges = list(body.graph.edges)
    rng = np.random.default_rng(0)
    for trial in range(1000 if code.m == 1 else 100):
        worker = int(rng.integers(classes.n))
        shards = [j for c in classes.sent_by(worker) for j in classes.members[c]]
        ours = {j: results[j] for j in shards}
        keys = keys_of(manifest, worker)
        touching = [edge for edge in edges if not {*classes.sent_by(worker)}.isdisjoint(edge)]
        outer = [edge for edge in touching if not {*edge} <= {*classes.sent_by(worker)}] or touching
        edge = outer[int(rng.integers(len(outer)))]
        request = REQUEST
        if trial % 3 == 0:
            keys._found[edge] = rng.bytes(32)
        elif trial % 3 == 1:
            request = rng.bytes(32)
        else:
            fewer = replace(body.graph)
            fewer.__dict__["edges"] = tuple(one for one in edges if one != edge)
            object.__setattr__(
                keys, "manifest", Manifest(replace(body, graph=fewer), manifest.public_keys, manifest.commitments)
            )
        bad = encode(keys, request, ours)
        relabelled = MaskedReply(worker, manifest.digest, REQUEST, None, bad.parts)
        # All replies but those that could replace the bad one.
        others = [
            one for one in good if one.worker != worker and not (code.groups and _same_group(code, one.worker, worker))
        ]
        arrived = [relabelled, *others][: code.n - code.s if code.groups is None else None]
        assert_refused(manifest, arrived)


def _same_group(code: Any, one: int, other: int) -> bool:
    return any({one, other} <= {*group} for group in code.groups or ())


def test_replies_to_other_requests_or_manifests_are_named() -> None:
    body = body_of(FRC)
    manifest, results = sealed(body), results_for(body_of(FRC))
    replies = replies_of(manifest, results)
    with pytest.raises(MasksRemain, match="Worker 3 answered another request than worker 0"):
        decode(manifest, [*replies[:3], replace(replies[3], request=bytes(32))])
    with pytest.raises(MasksRemain, match="Worker 1 has another manifest"):
        decode(manifest, [replies[0], replace(replies[1], manifest=bytes(32))])


def test_nothing_is_decoded_before_the_check_words_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update under masks that remain is not touched, so neither its range nor its metrics are complained of."""
    body = body_of(FRC)
    manifest = sealed(body)
    replies = replies_of(manifest, results_for(body))
    bad = {part: words.copy() for part, words in replies[0].parts.items()}
    for words in bad.values():
        words += np.uint32(1 << 30)
    opened: list[int] = []
    added = decoding._added

    def watched(vectors: Any, ring: Any) -> Any:
        opened.append(vectors[0].size)
        return added(vectors, ring)

    monkeypatch.setattr(decoding, "_added", watched)
    assert_refused(manifest, [replace(replies[0], parts=bad), *replies[1:4]])
    assert set(opened) == {body.lengths()["check"], body.lengths()["status"]}


def test_an_entry_that_no_sum_can_have_is_out_of_range() -> None:
    body = body_of(FRC)
    manifest = sealed(body)
    replies = replies_of(manifest, results_for(body))
    liar = {part: words.copy() for part, words in replies[0].parts.items()}
    liar["update"][2] += np.uint32(1 << 29)
    with pytest.raises(OutOfRange, match="8 shards can add up to"):
        decode(manifest, [replace(replies[0], parts=liar), *replies[1:4]])


# ---- what fails depends on data, so it must not show per node ----


def trap(body: ManifestBody, kind: str) -> ShardResult | None:
    update, metrics = np.zeros(body.size, np.float32), np.zeros(body.numbers)
    if kind == "raises":
        return None
    if kind == "weight of 1e30":
        return ShardResult(update, 1e30, metrics)
    if kind == "negative weight":
        return ShardResult(update, -1.0, metrics)
    if kind == "weight is NaN":
        return ShardResult(update, float("nan"), metrics)
    if kind == "huge metric":
        return ShardResult(update, 1.0, metrics + 1e30)
    if kind == "other layout":
        return ShardResult(update[:-1], 1.0, metrics)
    if kind == "integers":
        return ShardResult(update.astype(np.int64), 1.0, metrics)
    update[1] = {"NaN": np.nan, "infinity": np.inf, "-infinity": -np.inf}[kind]
    return ShardResult(update, 1.0, metrics)


KINDS = [
    *("raises", "weight of 1e30", "negative weight", "weight is NaN", "huge metric", "other layout", "integers"),
    *("NaN", "infinity", "-infinity"),
]


@pytest.mark.parametrize("clip", ["entries", "norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_fails_says_so_only_in_the_sum(kind: str, clip: str) -> None:
    body = body_of(FRC, largest_weight=10.0, clip=clip)
    manifest, results = sealed(body), dict[int, ShardResult | None](results_for(body))
    results[5] = trap(body, kind)
    replies = replies_of(manifest, results)
    # All holders still send the same bytes of the same length, and nobody refuses.
    plain = replies_of(manifest, results_for(body))
    for one in body.classes.holders:
        assert len({replies[worker].payload() for worker in one}) == 1
    assert {len(one.payload()) for one in replies} == {len(plain[0].payload())}
    # Every class but the failed one sends what it would send anyway.
    changed = [one.worker for one, other in zip(replies, plain, strict=True) if one.payload() != other.payload()]
    assert changed == list(body.classes.holders[body.classes.members.index((1, 5))])
    with pytest.raises(ShardsFailed, match="1 of 8 shards failed"):
        decode(manifest, replies)
    results[2] = None
    with pytest.raises(ShardsFailed, match="2 of 8 shards failed"):
        decode(manifest, replies_of(manifest, results))


def test_holders_that_fail_on_different_shards_differ_in_their_number_alone() -> None:
    """Poison is the same at all holders, so their difference would show the metrics of a shard."""
    body = body_of(FRC)
    results = dict[int, ShardResult | None](results_for(body))
    (shards,) = {body.classes.members[0]}
    one, other = (class_integers(body, 0, {**results, **dict.fromkeys(failed)}) for failed in (shards[:1], shards))
    for part in one:
        assert (part == "status") == (one[part] != other[part]).any(), part


def test_a_failed_class_is_poisoned_and_not_zero() -> None:
    """If NaN counted as 0, the sums of two requests would differ by one class's update."""
    body = body_of(FRC, metrics=0)
    manifest, results = sealed(body), results_for(body)
    bad = replies_of(manifest, {**results, 5: trap(body, "NaN")})
    total = sum(one.parts["update"].astype(np.int64) for one in one_reply_a_class(manifest, bad)) % 2**32
    total -= (total >> 31) << 32
    assert (np.abs(total) > body.quantiser.limit(8)).mean() > 0.5


def test_a_metric_that_is_not_finite_is_counted_and_spoils_itself_alone() -> None:
    body = body_of(FRC, metrics=3)
    manifest, results = sealed(body), results_for(body)
    results[5].metrics[1] = np.nan
    results[6].metrics[2] = -np.inf
    (found,) = decode(manifest, replies_of(manifest, results))
    assert np.isnan(found.metrics).tolist() == [False, True, True]
    assert found.weight == 8


# ---- the quantiser ----


def test_holders_who_are_told_different_clips_answer_different_requests() -> None:
    """One holder with a clip that hides its update and one with the true clip gave the update by subtraction."""
    given: dict[str, Any] = {
        "run": "r",
        "kind": "train",
        "round": 1,
        "content": bytes(32),
        "given": bytes(32),
        "layout": bytes(32),
    }
    one, other = (Quantiser(body_of(FRC).classes.ring, 8, bound).digest for bound in (1.0, 0.5))
    requests = [request_digest(manifest=bytes(32), quantiser=digest, **given) for digest in (one, other)]
    assert requests[0] != requests[1]
    body = body_of(FRC, metrics=0, size=500)
    manifest, results = sealed(body), results_for(body)
    pair = [
        encode(keys_of(manifest, worker), request, {j: results[j] for j in body.classes.members[0]})
        for worker, request in zip(body.classes.holders[0], requests, strict=True)
    ]
    apart = (pair[0].parts["update"] - pair[1].parts["update"]).view(np.int32)
    assert np.median(np.abs(apart.astype(float))) > 2**28  # nothing of the update, which is below 2^24


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), 5e-324, 1e-30, 2.0**-21, 2.0**21, 1e300, float("inf")])
def test_clips_outside_the_bounds_are_refused(bound: float) -> None:
    with pytest.raises(InvalidSetting, match=r"clipping bound .* must be in 2\^-20..2\^20"):
        body_of(FRC, bound=bound)


# ---- the manifest ----


def changed(body: ManifestBody, **values: Any) -> bytes:
    return canonical({**parsed(body.text), **{key.replace("_", "-"): value for key, value in values.items()}})


def test_a_body_names_a_family_and_has_no_list_of_edges() -> None:
    body = body_of(FRC, colluders=2)
    assert "edges" not in json.loads(body.text)
    with pytest.raises(InvalidSetting, match="'edges' is not known"):
        ManifestBody.from_bytes(canonical({**parsed(body.text), "edges": []}))
    # A weaker graph than the colluders it promises is read, and not certified.
    for graph in (["path"], ["harary", 2], ["circulant", 2]):
        with pytest.raises(NotCertified):
            ManifestBody.from_bytes(changed(body, graph=graph)).certificate()
    with pytest.raises(NotCertified):
        body_of(FRC, colluders=1).certificate(colluders=2)  # by the owner's own number
    with pytest.raises(NotCertified):
        body.certificate(min_classes=5)
    assert body.certificate(colluders=1).colluders == 2


def test_a_node_recomputes_classes_and_holders() -> None:
    body = body_of(FRC)
    values = parsed(body.text)
    split = [[j] for j in range(8)]
    for wrong in (
        {"classes": split},
        {"classes": [*values["classes"][:-1], [3]]},
        {"rows": [[[0, 2]], *values["rows"][1:]]},
        {"rows": values["rows"][1:]},
        {"rows": [[], *values["rows"][1:]]},
        {"holders": [[0], *values["holders"][1:]]},
        {"holders": [[4, 0], *values["holders"][1:]]},
        {"holders": [[], *values["holders"][1:]], "sending": "shardwise"},
        {"holders": [[0, 4, 9], *values["holders"][1:]]},
        {"holders": values["holders"][1:]},
        {"ring": "2^31"},
        {"sending": "both"},
        {"k": 9},
        {"colluders": -1},
        {"colluders": "2"},
        {"min_classes": 1},
        {"cohorts": 9},
        {"protocol": "fl-gradcode/secagg/v0"},
        {"check_words": 0},
        {"quantiser": ["entries", "1.0", 4, "0x1.0000000000000p+0", "0x0.0p+0"]},
        {"quantiser": ["entries", "0x1.0000000000000p+0", 0, "0x1.0000000000000p+0", "0x0.0p+0"]},
        {"arrays": [["w", "float32"]]},
    ):
        with pytest.raises(InvalidSetting):
            ManifestBody.from_bytes(changed(body, **wrong))
    more = ManifestBody.from_bytes(changed(body, holders=[[0, 1, 4], *values["holders"][1:]]))
    assert more.classes.supports[1] == (0, 1)  # counted where it colludes
    with pytest.raises(NotCertified):
        more.certificate(colluders=2)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":1.0}',
        b'{"a":true}',
        b'{"a":null}',
        b'{"a":{"b":1}}',
        b'{"a":[1, 2]}',
        b'{"a":1,"a":1}',
        b'{"b":1,"a":1}',
        b'{"a":NaN}',
        b'{"a":1e3}',
        b'{"a":01}',
        b'{"a":"\xc3\xa9"}',
        b'{"a":9007199254740993}',
        b' {"a":1}',
        b"[1]",
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_only_one_form_of_json_is_read(text: bytes) -> None:
    with pytest.raises(InvalidSetting):
        parsed(text)


def test_numbers_from_ten_on_keep_their_place() -> None:
    """Objects with whole numbers as keys changed their order when they were read and written again."""
    body = body_of(fractional_repetition(26, 1))
    assert len(body.classes) == 13
    assert ManifestBody.from_bytes(body.text).text == body.text
    assert canonical(parsed(body.text)) == body.text
    with pytest.raises(InvalidSetting, match="must be a text"):
        canonical({1: 2})  # type: ignore[dict-item]


def test_another_manifest_than_the_pinned_one_is_refused() -> None:
    manifest = sealed(body_of(FRC))
    stranger = Manifest(manifest.body, manifest.public_keys, (bytes([1]) * 32, *manifest.commitments[1:]))
    assert Manifest.from_bytes(stranger.to_bytes()).digest != manifest.digest
    with pytest.raises(SecureRefused, match="another one than this node has pinned"):
        Manifest.from_bytes(stranger.to_bytes(), digest=manifest.digest)
    replaced = Manifest(manifest.body, (manifest.public_keys[1], *manifest.public_keys[1:]), manifest.commitments)
    with pytest.raises(SecureRefused, match="another public key of class 0"):
        keys_of(replaced, 0)
    with pytest.raises(InvalidSetting, match="for each class"):
        Manifest(manifest.body, manifest.public_keys[1:], manifest.commitments[1:])
    for text in (b'{"body":"{}"}', b'{"body":1,"classes":[]}', b'{"body":"{}","classes":[["00"]]}'):
        with pytest.raises(InvalidSetting):
            Manifest.from_bytes(text)


def test_a_copied_public_key_gives_no_shared_key_and_one_of_small_order_is_refused() -> None:
    manifest = sealed(body_of(FRC))
    for bad in (bytes(32), (1).to_bytes(32, "little")):
        found = Manifest(manifest.body, (manifest.public_keys[0], bad, *manifest.public_keys[2:]), manifest.commitments)
        keys = class_keys(found, 0, {0: seed_of(0)})
        with pytest.raises(SecureRefused, match="class 1 gives no secret"):
            keys.edge_keys([0])
    copied = Manifest(
        manifest.body,
        (manifest.public_keys[0], manifest.public_keys[2], *manifest.public_keys[2:]),
        manifest.commitments,
    )
    mine = class_keys(copied, 0, {0: seed_of(0)}).edge_keys([0])
    theirs = class_keys(copied, 2, {2: seed_of(2)}).edge_keys([2])
    assert not {*mine.values()} & {*theirs.values()}


# ---- parts of classes ----


def test_only_whole_classes_of_this_worker_are_sent() -> None:
    body = body_of(FRC)
    manifest, results = sealed(body), results_for(body)
    keys = keys_of(manifest, 0)
    for shards in ([0], [0, 4, 1], [1, 5]):
        with pytest.raises(SecureRefused, match="whole classes"):
            encode(keys, REQUEST, {j: results[j] for j in shards})
    with pytest.raises(SecureRefused, match="replies are coded"):
        encode(keys, REQUEST, {0: results[0]}, shard=0)
    single = sealed(body_of(FRC, sending="shardwise"))
    with pytest.raises(SecureRefused, match="replies are shardwise"):
        encode(keys_of(single, 0), REQUEST, {j: results[j] for j in (0, 4)})
    with pytest.raises(SecureRefused, match="does not hold class 1"):
        encode(keys_of(single, 0), REQUEST, {1: results[1]}, shard=1)
    with pytest.raises(SecureRefused, match="not those of worker 1"):
        class_keys(manifest, 1, {0: seed_of(0)})


def test_a_mask_is_used_once() -> None:
    """Integers that are masked twice show, next to those masked once, the mask itself."""
    body = body_of(FRC)
    keys, results = keys_of(sealed(body), 0), results_for(body)
    made = ClassIntegers(body, 0, seed_of(0), REQUEST)
    made.add(0, results[0])
    for shard in (0, 1):
        with pytest.raises(SecureRefused, match="still lacks"):
            made.add(shard, results[shard])
    with pytest.raises(SecureRefused, match="are missing"):
        made.parts()
    made = ClassIntegers(body, 0, seed_of(0), REQUEST)
    for shard in (4, 0):
        made.add(shard, results[shard])
    integers = {0: made.parts()}
    at_once = encode(keys, REQUEST, {0: results[0], 4: results[4]})
    assert masked_reply(keys, REQUEST, integers).payload() == at_once.payload()
    with pytest.raises(SecureRefused, match="masked already"):
        masked_reply(keys, REQUEST, integers)
    with pytest.raises(SecureRefused, match="made once"):
        made.parts()
    with pytest.raises(SecureRefused, match="does not send a message of classes"):
        masked_reply(keys, REQUEST, {1: class_integers(body, 1, results)})


def test_secrets_are_not_shown() -> None:
    keys: ClassKeys = keys_of(sealed(body_of(FRC)), 0)
    keys.edge_keys([0])
    text = repr(keys)
    assert seed_of(0).hex() not in text and repr(seed_of(0)) not in text
    assert not any(repr(key) in text for key in keys._found.values())


def test_tags_name_their_worker() -> None:
    """A server that shows a node its own tag as its fellow's is found out."""
    q = np.arange(5, dtype=np.uint32)
    tags = {
        agreement_tag(seed_of(0), REQUEST, 0, q),
        agreement_tag(seed_of(0), REQUEST, 1, q),
        agreement_tag(seed_of(1), REQUEST, 0, q),
        agreement_tag(seed_of(0), hashlib.sha256(b"other").digest(), 0, q),
        agreement_tag(seed_of(0), REQUEST, 0, q + 1),
    }
    assert len(tags) == 5
    assert agreement_tag(seed_of(0), REQUEST, 0, q) in tags

"""Secure aggregation with coding: masks on classes of shards that cancel in every sum that decodes."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from ..masking import FIELD, INTEGERS, Quantiser, Ring, discrete_gaussian
    from .answered import Answered, AnsweredRequests
    from .certificate import Certificate, certify, choose_graph
    from .classes import Sending, ShardClasses, classes_for
    from .dealer import (
        DIGEST_FILE,
        MANIFEST_FILE,
        check_data,
        deal,
        holders_in,
        manifest_entry,
        read_manifest,
        seeds_of,
    )
    from .decoding import DecodedSum, decode
    from .disclosure import Leakage, leakage
    from .encoding import ClassIntegers, MaskedReply, Parts, ShardResult, encode, masked_reply
    from .graph import ClassGraph
    from .keys import agreement_tag
    from .manifest import ClassKeys, Manifest, ManifestBody, class_keys, make_body, read_body
    from .noise import counted_shards, sensitivity
    from .request import Entry, Received, content_digest, exact_text, given_digest, layout_digest, request_digest
    from .settings import SecureAggregation
    from .tags import TAG_BYTES, shown_tag, tags_by_place, tags_in

__all__ = [
    "DIGEST_FILE",
    "FIELD",
    "INTEGERS",
    "MANIFEST_FILE",
    "TAG_BYTES",
    "Answered",
    "AnsweredRequests",
    "Certificate",
    "ClassGraph",
    "ClassIntegers",
    "ClassKeys",
    "DecodedSum",
    "Entry",
    "Leakage",
    "Manifest",
    "ManifestBody",
    "MaskedReply",
    "Parts",
    "Quantiser",
    "Received",
    "Ring",
    "SecureAggregation",
    "Sending",
    "ShardClasses",
    "ShardResult",
    "agreement_tag",
    "certify",
    "check_data",
    "choose_graph",
    "class_keys",
    "classes_for",
    "content_digest",
    "counted_shards",
    "deal",
    "decode",
    "discrete_gaussian",
    "encode",
    "exact_text",
    "given_digest",
    "holders_in",
    "layout_digest",
    "leakage",
    "make_body",
    "manifest_entry",
    "masked_reply",
    "read_body",
    "read_manifest",
    "request_digest",
    "seeds_of",
    "sensitivity",
    "shown_tag",
    "tags_by_place",
    "tags_in",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".masking": [
            "FIELD",
            "INTEGERS",
            "Quantiser",
            "Ring",
            "discrete_gaussian",
        ],
        "answered": [
            "Answered",
            "AnsweredRequests",
        ],
        "certificate": [
            "Certificate",
            "certify",
            "choose_graph",
        ],
        "classes": [
            "Sending",
            "ShardClasses",
            "classes_for",
        ],
        "dealer": [
            "DIGEST_FILE",
            "MANIFEST_FILE",
            "check_data",
            "deal",
            "holders_in",
            "manifest_entry",
            "read_manifest",
            "seeds_of",
        ],
        "decoding": [
            "DecodedSum",
            "decode",
        ],
        "disclosure": [
            "Leakage",
            "leakage",
        ],
        "encoding": [
            "ClassIntegers",
            "MaskedReply",
            "Parts",
            "ShardResult",
            "encode",
            "masked_reply",
        ],
        "graph": [
            "ClassGraph",
        ],
        "keys": [
            "agreement_tag",
        ],
        "manifest": [
            "ClassKeys",
            "Manifest",
            "ManifestBody",
            "class_keys",
            "make_body",
            "read_body",
        ],
        "noise": [
            "counted_shards",
            "sensitivity",
        ],
        "request": [
            "Entry",
            "Received",
            "content_digest",
            "exact_text",
            "given_digest",
            "layout_digest",
            "request_digest",
        ],
        "settings": [
            "SecureAggregation",
        ],
        "tags": [
            "TAG_BYTES",
            "shown_tag",
            "tags_by_place",
            "tags_in",
        ],
    },
)

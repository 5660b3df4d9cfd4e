"""Set-up of secure aggregation through the server: identities, three signed messages, and what a node keeps of them."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .agreement import BODY_FILE, agree, agreed_body, check_identities, is_enrolled
    from .attempt import Enrolment
    from .exchange import Answer, Request
    from .identities import (
        ALLOW_LIST,
        IDENTITY_FILE,
        Identity,
        allow_list,
        allow_list_digest,
        make_identity,
        read_identity,
    )
    from .node import EnrolledNode
    from .relay import Relay
    from .statements import ClassKey, Confirmation, Hello, Setup

__all__ = [
    "ALLOW_LIST",
    "BODY_FILE",
    "IDENTITY_FILE",
    "Answer",
    "ClassKey",
    "Confirmation",
    "EnrolledNode",
    "Enrolment",
    "Hello",
    "Identity",
    "Relay",
    "Request",
    "Setup",
    "agree",
    "agreed_body",
    "allow_list",
    "allow_list_digest",
    "check_identities",
    "is_enrolled",
    "make_identity",
    "read_identity",
]

# A node answers a message of a round without the server's half.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "agreement": ["BODY_FILE", "agree", "agreed_body", "check_identities", "is_enrolled"],
        "exchange": ["Answer", "Request"],
        "identities": [
            "ALLOW_LIST",
            "IDENTITY_FILE",
            "Identity",
            "allow_list",
            "allow_list_digest",
            "make_identity",
            "read_identity",
        ],
        "node": ["EnrolledNode"],
        "attempt": ["Enrolment"],
        "relay": ["Relay"],
        "statements": ["ClassKey", "Confirmation", "Hello", "Setup"],
    },
)

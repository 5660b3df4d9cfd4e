#!/bin/sh
# Make the key by which one SuperNode proves who it is.
#
#     make-node-key.sh FILE          (such as: make-node-key.sh keys/node-3)
#
# FILE is the private key: it never leaves the node. FILE.pub is registered at the SuperLink, once.
set -eu

if [ $# -ne 1 ]; then
    echo "Usage: $0 FILE   (such as: $0 keys/node-3)" >&2
    exit 2
fi
if [ -e "$1" ]; then
    echo "$1 is there already, and a node is known by its key: move it away if you mean to replace it." >&2
    exit 1
fi
umask 077
(umask 022 && mkdir -p "$(dirname "$(dirname "$1")")") # others, such as the unit's user, must be able to pass
mkdir -p "$(dirname "$1")"
ssh-keygen -q -t ecdsa -b 384 -N "" -C "$(basename "$1")" -f "$1"
chmod 644 "$1.pub"
echo "Private key: $1 stays on the node. Register $1.pub: flwr supernode register $1.pub SUPERLINK"

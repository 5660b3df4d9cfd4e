#!/bin/sh
# Make a certificate authority and a TLS certificate of the SuperLink, signed by it.
#
#     make-certificates.sh FOLDER NAME-OR-ADDRESS...
#     make-certificates.sh certificates fl.example.org 192.0.2.10
#
# FOLDER gets ca.key, ca.crt, server.key and server.crt. Give every name and IP address under which nodes reach the
# SuperLink: by another one they refuse to connect. 127.0.0.1 and ::1 are added: the SuperLink's own ServerApps come from
# there. An authority that is in FOLDER already is kept, and a new server certificate is made: that is how it is renewed.
# Days are set by CA_DAYS (3650) and SERVER_DAYS (365).
set -eu

if [ $# -lt 2 ]; then
    echo "Usage: $0 FOLDER NAME-OR-ADDRESS...   (such as: $0 certificates fl.example.org 192.0.2.10)" >&2
    exit 2
fi
folder=$1
shift
ca_days=${CA_DAYS:-3650}
server_days=${SERVER_DAYS:-365}
umask 077

names=IP:127.0.0.1,IP:::1
for name in "$@"; do
    case $name in
        *:*[!0-9A-Fa-f:.]* | *[!0-9A-Fa-f:.]*:* | *.*:* | *[!A-Za-z0-9.:*_-]* | '')
            echo "'$name' is neither a DNS name nor an IP address: give names and addresses one by one, without port." >&2
            exit 2
            ;;
        *:*) kind=IP ;; # IPv6
        *[!0-9.]*) kind=DNS ;;
        *) kind=IP ;; # IPv4
    esac
    case ,$names, in *",$kind:$name,"*) ;; *) names=$names,$kind:$name ;; esac
done

failed() {
    echo "openssl could not $1: $(sed -n 's/.*error:[0-9A-F]*://p' "$folder/openssl.log" | head -n 1)" >&2
    exit 1
}

if [ -e "$folder/ca.crt" ] && [ ! -e "$folder/ca.key" ]; then
    echo "$folder has ca.crt and not its ca.key: bring ca.key back to renew, or take a new folder for a new authority" >&2
    exit 1
fi
(umask 022 && mkdir -p "$(dirname "$folder")") # others, such as the units' user, must be able to pass
mkdir -p "$folder"
# Written under other names first: if anything fails, the old pair stays.
trap 'rm -f "$folder/new.key" "$folder/new.csr" "$folder/new.crt" "$folder/new.ext" "$folder/openssl.log"' EXIT
if [ ! -e "$folder/ca.key" ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:secp384r1 -nodes -days "$ca_days" \
        -subj "/CN=fl-gradcode authority" \
        -addext "basicConstraints=critical,CA:TRUE,pathlen:0" -addext "keyUsage=critical,keyCertSign,cRLSign" \
        -keyout "$folder/ca.key" -out "$folder/ca.crt" 2>"$folder/openssl.log" || failed "make the authority"
fi

printf '%s\n' "basicConstraints=critical,CA:FALSE" "keyUsage=critical,digitalSignature" \
    "extendedKeyUsage=serverAuth" "authorityKeyIdentifier=keyid" "subjectAltName=$names" >"$folder/new.ext"
{
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:secp384r1 -nodes -subj "/CN=SuperLink" \
        -keyout "$folder/new.key" -out "$folder/new.csr" &&
        openssl x509 -req -days "$server_days" -in "$folder/new.csr" -CA "$folder/ca.crt" -CAkey "$folder/ca.key" \
            -set_serial "0x$(openssl rand -hex 16)" -extfile "$folder/new.ext" -out "$folder/new.crt" &&
        openssl verify -x509_strict -CAfile "$folder/ca.crt" "$folder/new.crt"
} >"$folder/openssl.log" 2>&1 || failed "sign a certificate for $names"
chown --reference="$folder" "$folder/new.key" "$folder/new.crt" 2>/dev/null || true # of whom it was given to
mv "$folder/new.key" "$folder/server.key"
mv "$folder/new.crt" "$folder/server.crt"
chmod 644 "$folder/ca.crt" "$folder/server.crt"

echo "Authority:   $folder/ca.crt goes to every node; $folder/ca.key signs certificates: keep it off the network."
echo "Certificate: $folder/server.crt for $names, $(openssl x509 -in "$folder/server.crt" -noout -enddate | sed 's/.*=/until /')"

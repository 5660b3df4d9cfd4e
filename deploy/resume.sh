#!/bin/sh
# Run a Flower app until it is completed. A run whose ServerApp or SuperLink died cannot be continued by Flower: it is run
# again, and with a checkpoint it goes on with the round after the last one that was done.
#
#     resume.sh APP SUPERLINK [OPTION OF flwr run]...
#     resume.sh . lab --run-config "code='fractional' checkpoint='/var/lib/fl-gradcode/superlink/run.checkpoint'"
#
# ATTEMPTS (10): give up after so many failed runs. PAUSE (30): seconds between two. POLL (10): seconds between two looks.
# While the SuperLink is away it waits. Ends with 0 when a run is completed, 3 when somebody stopped it, 1 when it gave up or
# the SuperLink did not take the run.
set -eu

if [ $# -lt 2 ]; then
    echo "Usage: $0 APP SUPERLINK [OPTION OF flwr run]...   (such as: $0 . lab --run-config \"checkpoint='/path'\")" >&2
    exit 2
fi
if ! command -v flwr >/dev/null; then
    echo "$0: there is no flwr in PATH: export PATH=/opt/fl-gradcode/bin:\$PATH, or where you have installed it." >&2
    exit 2
fi
app=$1
superlink=$2
shift 2
attempts=${ATTEMPTS:-10}
pause=${PAUSE:-30}
poll=${POLL:-10}

say() { printf '%s %s\n' "$(date '+%F %T')" "$*"; }

# What the last answer of `flwr ... --format json` says under a key, on one line.
value() { printf '%s\n' "$answer" | sed -n "s/.*\"$1\": *\"\{0,1\}\(.*[^\",]\).*/\1/p" | head -n 1 | sed 's/\\n/ /g; s/\\"/"/g'; }

attempt=0
while [ "$attempt" -lt "$attempts" ]; do
    answer=$(flwr run "$app" "$superlink" --format json "$@" 2>&1) || true
    run=$(value run-id)
    if [ -z "$run" ]; then
        say "not submitted: $(value error-message)"
        case $answer in
            *"SuperLink is unavailable"*) sleep "$pause" && continue ;;
            *) exit 1 ;;
        esac
    fi
    say "run $run is submitted"
    trap 'say "run $run goes on without us; stop it with: flwr stop $run $superlink"; exit 130' INT TERM
    while :; do
        answer=$(flwr ls "$superlink" --run-id "$run" --format json 2>&1) || true
        status=$(value status)
        case $status:$answer in
            finished:completed:*) say "run $run is completed" && exit 0 ;;
            finished:stopped:*) say "run $run was stopped by somebody" && exit 3 ;;
            finished:*) break ;;
            :*"not found"*) status="lost: the SuperLink does not know it any more" && break ;;
        esac
        sleep "$poll"
    done
    trap - INT TERM
    say "run $run is $status"
    flwr log "$run" "$superlink" --show 2>&1 | grep -a ERROR | tail -n 3 || true
    attempt=$((attempt + 1))
    if [ "$attempt" -lt "$attempts" ]; then sleep "$pause"; fi
done
say "given up after $attempts failed runs"
exit 1

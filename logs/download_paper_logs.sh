#!/bin/sh
# The authors' eight saved logs (github.com/shikaiqiu/supercollapse, folder logs) into logs/paper/, to lay over our own.
#   sh download_paper_logs.sh [NAME ...]        names without .pkl; default: all eight
# Run it again to go on after an interruption: what is complete and readable is kept. PAPER_LOGS_URL is another source.
set -u
url=${PAPER_LOGS_URL:-https://raw.githubusercontent.com/shikaiqiu/supercollapse/main/logs}
cd "$(dirname "$0")" || exit 1
mkdir -p logs/paper
[ $# -gt 0 ] || set -- mlp c5m chess mlp_const c5m_const chess_const mlp_schedules c5m_schedules
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
failed=0

readable() { "$python" -c 'import sys; from figures import table; table.load(sys.argv[1])' "$1"; }

for name in "$@"; do
    file=logs/paper/$name.pkl
    part=logs/paper/$name.part.pkl
    if [ -s "$file" ] && readable "$file" 2>/dev/null; then
        echo "$file: already there"
        continue
    fi
    headers=$(curl --silent --show-error --fail --location --head "$url/$name.pkl") || headers=
    size=$(echo "$headers" | tr -d '\r' | awk 'tolower($1) == "content-length:" { size = $2 } END { print size }')
    if [ -z "$size" ]; then
        echo "error: $url/$name.pkl cannot be reached, or does not say its size; check the network or set PAPER_LOGS_URL" >&2
        failed=1
        continue
    fi
    have=0
    [ ! -f "$part" ] || have=$(wc -c < "$part")
    [ "$have" -le "$size" ] || rm -f "$part"
    if [ "$have" -ne "$size" ]; then
        curl --fail --location --retry 5 --continue-at - --progress-bar --output "$part" "$url/$name.pkl" ||
            { echo "error: $name.pkl broke off; run this again to go on (or delete $part to start over)" >&2; failed=1; continue; }
    fi
    have=$(wc -c < "$part")
    if [ "$have" -ne "$size" ]; then
        echo "error: $part has $have bytes, wanted $size; delete it and run this again" >&2
        failed=1
    elif ! readable "$part"; then
        echo "error: $part has the right size but is no readable log; delete it and run this again" >&2
        failed=1
    else
        mv "$part" "$file"
        echo "$file: $size bytes"
    fi
done
exit $failed

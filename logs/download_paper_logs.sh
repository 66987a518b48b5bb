#!/bin/sh
# The authors' eight saved logs (github.com/shikaiqiu/supercollapse, folder logs) into logs/paper/, to compare with ours.
#   sh logs/download_paper_logs.sh [NAME ...]        names without .pkl; default: all eight
# The same command continues an interrupted download. A file that is there and readable is kept.
# Environment: PAPER_LOGS_URL names another source, PYTHON another interpreter.
set -u
url=${PAPER_LOGS_URL:-https://raw.githubusercontent.com/shikaiqiu/supercollapse/main/logs}
cd "$(dirname "$0")/.." || exit 1 # the checkout, where Python finds the package analysis
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
[ $# -gt 0 ] || set -- mlp c5m chess mlp_const c5m_const chess_const mlp_schedules c5m_schedules

readable() { # prints the reason where it is not
    "$python" -c 'import sys
from analysis import table
try:
    table.load(sys.argv[1])
except table.LogError as error:
    sys.exit(str(error))' "$1"
}
size_of() { if [ -e "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }

download() { # one log; returns 1 after a message
    file=logs/paper/$1.pkl part=logs/paper/$1.part.pkl
    if [ -s "$file" ] && readable "$file" 2>/dev/null; then
        echo "$file: already there"
        return
    fi
    headers=$(curl --silent --show-error --fail --location --head "$url/$1.pkl") || headers=
    size=$(echo "$headers" | tr -d '\r' | awk 'tolower($1) == "content-length:" {size = $2} END {print size}')
    if [ -z "$size" ]; then
        echo "error: cannot reach $url/$1.pkl; check the name and the connection, or set PAPER_LOGS_URL" >&2
        return 1
    fi
    mkdir -p logs/paper
    [ "$(size_of "$part")" -le "$size" ] || rm "$part" # larger than the file: it is of another one
    if [ "$(size_of "$part")" -lt "$size" ] &&
        ! curl --fail --location --retry 5 --continue-at - --progress-bar --output "$part" "$url/$1.pkl"; then
        echo "error: the download of $1.pkl stopped; run this again to continue, or delete $part to start over" >&2
        return 1
    fi
    if [ "$(size_of "$part")" -ne "$size" ]; then
        echo "error: $part has $(size_of "$part") bytes, wanted $size; delete it and run this again" >&2
        return 1
    fi
    if ! readable "$part"; then
        echo "error: $part has the right size but is not a readable log; delete it and run this again" >&2
        return 1
    fi
    mv "$part" "$file"
    echo "$file: $size bytes"
}

failed=0
for name in "$@"; do
    download "$name" || failed=1
done
exit $failed

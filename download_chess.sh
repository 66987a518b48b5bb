#!/usr/bin/env bash
# Tokenised Lichess games, some 20 GB, into chess/ (or the folder named). Start it again to go on after an interruption.
set -euo pipefail
exec "$(dirname "$0")/token_files/download.sh" chess "${1:-$(dirname "$0")/chess}" \
    '{"dtype": "uint8", "vocab_size": 54, "bos": 0, "eos": 1, "pad_id": 0}' test.bin meta.pkl train.bin

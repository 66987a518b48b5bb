#!/usr/bin/env bash
# The paper's tokenised Lichess games, about 20 GB, into chess/ beside this script (or into the folder given).
# The same command continues an interrupted download.
set -euo pipefail
checkout=$(dirname "$0")
exec "$checkout/token_files/download.sh" chess "${1:-$checkout/chess}" \
    '{"dtype": "uint8", "vocab_size": 54, "bos": 0, "eos": 1, "pad_id": 0}' test.bin meta.pkl train.bin

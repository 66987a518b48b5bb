#!/usr/bin/env bash
# Tokenised CIFAR-5M, 6 GB, into cifar5m/ (or the folder named). Start it again to go on after an interruption.
set -euo pipefail
exec "$(dirname "$0")/token_files/download.sh" cifar5m "${1:-$(dirname "$0")/cifar5m}" \
    '{"dtype": "uint8", "vocab_size": 256, "image": [32, 32]}' test.bin train.bin

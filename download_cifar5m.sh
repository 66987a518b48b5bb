#!/usr/bin/env bash
# The paper's tokenised CIFAR-5M images, about 6 GB, into cifar5m/ beside this script (or into the folder given).
# The same command continues an interrupted download.
set -euo pipefail
checkout=$(dirname "$0")
exec "$checkout/token_files/download.sh" cifar5m "${1:-$checkout/cifar5m}" \
    '{"dtype": "uint8", "vocab_size": 256, "image": [32, 32]}' test.bin train.bin

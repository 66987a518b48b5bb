#!/usr/bin/env bash
# Downloads a tokenised data set; used by download_chess.sh and download_cifar5m.sh:  download.sh NAME DIR META FILE...
# META is the content of meta.json. A file gets its final name after its size and checksum are verified. The same command continues
# an interrupted download. Environment: TOKENIZED_URL names another server, PYTHON another interpreter.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd) name=$1 dir=$2 meta=$3
shift 3
base=${TOKENIZED_URL:-https://storage.googleapis.com}/$name-tokenized
python=${PYTHON:-$checkout/.venv/bin/python}
command -v "$python" >/dev/null || python=python3

fail() { # after an error no empty folder is left
    rmdir "$dir" 2>/dev/null || true
    echo "download_$name: $*" >&2
    exit 1
}
size_of() { if [[ -e $1 ]]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }
header() { awk -v name="$1" 'tolower($1) == name ":" {print $2}' <<<"$headers" | tr -d '\r'; }
md5_of() { "$python" -c 'import base64, hashlib, sys
print(base64.b64encode(hashlib.file_digest(open(sys.argv[1], "rb"), "md5").digest()).decode())' "$1"; }

command -v curl >/dev/null || fail 'the program curl is needed; install it'
for file in "$@"; do
    if [[ -e $dir/$file ]]; then
        echo "$dir/$file: already there, $(size_of "$dir/$file") bytes"
        continue
    fi
    headers=$(curl --fail --silent --show-error --location --head --retry 2 "$base/$file") ||
        fail "cannot reach $base/$file; check the connection and run this again, or make the data with prepare_$name.py"
    size=$(header content-length | tail -1) part=$dir/$file.part
    [[ $size =~ ^[0-9]+$ ]] || fail "$base/$file: the server does not tell the size of the file"
    mkdir -p "$dir"
    [[ $(size_of "$part") -le $size ]] || rm "$part" # larger than the file: it is of another one
    free=$(df -Pk "$dir" | awk 'NR == 2 {print $4}')
    ((size - $(size_of "$part") <= free * 1024)) || fail "$dir/$file takes $size bytes, but $dir has only $((free * 1024)) free"
    echo "$dir/$file: $size bytes, $(size_of "$part") of them already there"
    if [[ $(size_of "$part") -lt $size ]]; then
        curl --fail --location --retry 5 --continue-at - --output "$part" "$base/$file" ||
            fail "stopped after $(size_of "$part") of $size bytes; run this again to continue"
    fi
    [[ $(size_of "$part") -eq $size ]] || fail "$part has $(size_of "$part") of $size bytes; run this again to continue"
    md5=$(header x-goog-hash | sed -n 's/.*md5=//p' | tail -1)
    if [[ -n $md5 && $md5 != $(md5_of "$part") ]]; then
        rm "$part"
        fail "$dir/$file has a wrong checksum and is deleted; run this again"
    fi
    mv "$part" "$dir/$file"
done
if [[ ! -e $dir/meta.json ]]; then
    echo "$meta" >"$dir/meta.json.part"
    mv "$dir/meta.json.part" "$dir/meta.json"
fi
dir=$(cd "$dir" && pwd)
cd "$checkout" # where Python finds the package token_files
"$python" -m token_files "$dir"

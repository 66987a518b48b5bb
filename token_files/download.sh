#!/usr/bin/env bash
# Fetch a tokenised data set, for download_chess.sh and download_cifar5m.sh:  download.sh NAME DIR META FILE...
# A file gets its name once it is whole and its checksum agrees. Started again, a download goes on where it stopped.
set -euo pipefail
here=$(dirname "$0") name=$1 dir=$2 meta=$3
shift 3
base=${TOKENIZED_URL:-https://storage.googleapis.com}/$name-tokenized
python=${PYTHON:-$here/.venv/bin/python}
command -v "$python" >/dev/null || python=python3

die() { echo "download_$name: $*" >&2; exit 1; }
bytes() { if [[ -e $1 ]]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }
field() { awk -v name="$1" 'tolower($1) == name ":" {print $2}' <<<"$head" | tr -d '\r'; } # of the HTTP header

command -v curl >/dev/null || die 'needs the program curl'
mkdir -p "$dir"
for file in "$@"; do
    if [[ -e $dir/$file ]]; then
        echo "$dir/$file: here already, $(bytes "$dir/$file") bytes"
        continue
    fi
    head=$(curl --fail --silent --show-error --location --head --retry 2 "$base/$file") ||
        die "cannot reach $base/$file; check the connection and start again, or make the data with prepare_$name.py"
    size=$(field content-length | tail -1) part=$dir/$file.part
    [[ $size =~ ^[0-9]+$ ]] || die "$base/$file: the server does not say how large it is"
    [[ $(bytes "$part") -le $size ]] || rm "$part" # of something else
    free=$(df -Pk "$dir" | awk 'NR == 2 {print $4}')
    ((size - $(bytes "$part") <= free * 1024)) || die "$dir/$file takes $size bytes, only $((free * 1024)) are free in $dir"
    echo "$dir/$file: $size bytes, $(bytes "$part") of them here"
    if [[ $(bytes "$part") -lt $size ]]; then
        curl --fail --location --retry 5 --continue-at - --output "$part" "$base/$file" ||
            die "stopped after $(bytes "$part") of $size bytes; start again to go on"
    fi
    [[ $(bytes "$part") -eq $size ]] || die "$part has $(bytes "$part") of $size bytes; start again to go on"
    md5=$(field x-goog-hash | sed -n 's/.*md5=//p' | tail -1)
    if [[ -n $md5 && $md5 != $("$python" -c 'import base64, hashlib, sys
print(base64.b64encode(hashlib.file_digest(open(sys.argv[1], "rb"), "md5").digest()).decode())' "$part") ]]; then
        rm "$part"
        die "$dir/$file was damaged on the way and is deleted; start again"
    fi
    mv "$part" "$dir/$file"
done
if [[ ! -e $dir/meta.json ]]; then
    echo "$meta" >"$dir/meta.json.part"
    mv "$dir/meta.json.part" "$dir/meta.json"
fi
"$python" -m token_files "$dir"

"""What the preparations share: a data set's folder is claimed, worked in, and completed at once. The work is in prepare_*.py."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

FILES = ('train.bin', 'test.bin')


def write_atomically(path: Path, content: bytes):
    """Write a file that is there as a whole or not at all, whatever happens."""
    part = path.with_name(path.name + '.part')
    with open(part, 'wb') as f:
        f.write(content)
        to_disk(f)
    os.replace(part, path)


def check_distinct(paths):
    """Raise ValueError if an input is named twice, which would bring test data into the training set."""
    twice = [path for path, n in Counter(os.path.realpath(path) for path in paths).items() if n > 1]
    if twice:
        raise ValueError(f'{twice[0]}: is named twice among the inputs; name it once')


def to_disk(f):
    f.flush()
    os.fsync(f.fileno())


def read_json(path: Path):
    return json.loads(path.read_text()) if path.exists() else None


@contextmanager
def workplace(out: Path, source: dict, **also):
    """The folder for unfinished work on the data set in `out`, or None if it is complete; deleted after success.

    source says what the work is made from, `also` what only its last step needs. Work on the same source goes on where a killed
    run left it. Raises ValueError if `out` holds, or another run is making, anything else.
    """
    folder, manifest = out / '.preparing', out / '.preparing' / 'manifest.json'
    meta, there = read_json(out / 'meta.json') or {}, [name for name in (*FILES, 'meta.json', 'meta.pkl') if (out / name).exists()]
    whole = all(name in there and (out / name).stat().st_size == meta.get('tokens', {}).get(name) for name in FILES)
    if whole and meta.get('source') == source | also:
        shutil.rmtree(folder, ignore_errors=True)
        print(f'{out} holds this data set already', file=sys.stderr)
        yield None
        return
    begun = read_json(manifest)
    if begun not in (None, source):
        raise ValueError(f'{folder}: begun with other inputs or options; delete it, or choose another --out')
    if begun is None and there:
        raise ValueError(f'{out}: holds {", ".join(there)}, of another data set or not whole; move it, or choose another --out')
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
        except BlockingIOError as e:
            raise ValueError(f'{out}: another run is preparing it; wait for that one') from e
        write_atomically(manifest, json.dumps(source).encode())
        yield folder
    shutil.rmtree(folder)


def check_room(out: Path, size: int):
    """Raise OSError before a result of `size` bytes is begun that the disk cannot hold."""
    free = shutil.disk_usage(out).free + sum((out / f'{name}.part').stat().st_size for name in FILES
                                             if (out / f'{name}.part').exists())
    if free < size:
        raise OSError(28, f'no room: the result takes {size / 1e9:.3g} GB, {free / 1e9:.3g} GB are free', str(out))


def complete(out: Path, meta: dict):
    """Give train.bin.part and test.bin.part their names and write meta.json, with counts and checksums, last."""
    meta = {**meta, 'dtype': 'uint8', 'tokens': {}, 'sha256': {}}
    for name in FILES:
        with open(out / f'{name}.part', 'rb') as f:
            meta['sha256'][name] = hashlib.file_digest(f, 'sha256').hexdigest()
            meta['tokens'][name] = f.tell()  # all are uint8
    for name in FILES:
        os.replace(out / f'{name}.part', out / name)
    write_atomically(out / 'meta.json', json.dumps(meta, indent=1).encode())
    return meta


def run(name: str, out: Path, work):
    """Call work() for a command line: what can go wrong ends in one line and a non-zero exit code."""
    try:
        work()
    except OSError as e:
        sys.exit(f'{name}: {e.filename or out}: {e.strerror or e}; free some room or choose another --out and start again: '
                 'what was finished is kept')
    except ValueError as e:
        sys.exit(f'{name}: {e}')
    except KeyboardInterrupt:
        sys.exit(f'{name}: stopped; the same command goes on from here')

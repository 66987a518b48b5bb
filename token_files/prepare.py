"""What prepare_*.py share: checks, the folder of unfinished files, and writing meta.json."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from token_files.atomic import atomic_write

SPLITS = ('train.bin', 'test.bin')
FILES = (*SPLITS, 'meta.pkl', 'meta.json')
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_no_duplicates(paths) -> None:
    """Raise ValueError if an input is given twice, which would bring test data into the training set."""
    path, times = Counter(map(os.path.realpath, paths)).most_common(1)[0]
    if times > 1:
        raise ValueError(f'{path}: is given {times} times; give each input once')


@contextmanager
def clear_errors(path):
    """Turn an error of reading this input into a ValueError with one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f'{path}: no such file') from error
    except Exception as error:  # archives, parquet pages and connections raise errors of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        advice = 'check the connection, then run the same command again' if '://' in str(path) else 'download it again'
        raise ValueError(f'{path}: cannot be read ({reason}); {advice}') from error


def make_data_set(out: Path, source: dict, write) -> None:
    """Make the data set of `source` in the folder `out`, or nothing if `out` holds it already.

    write(folder) writes train.bin and test.bin, and perhaps meta.pkl, into the folder `OUT/.preparing`, and returns the content of
    meta.json with `source` in it. Then the files are renamed into `out`, and meta.json is written last: if it exists, the data
    set is complete. A killed run leaves `OUT/.preparing` for the next one.

    Raises ValueError if `out` holds any other data set, or if another process is making one there.
    """
    folder = out / '.preparing'
    there = [name for name in FILES if (out / name).exists()]
    if {*SPLITS, 'meta.json'} <= set(there) and json.loads((out / 'meta.json').read_text()).get('source') == source:
        shutil.rmtree(folder, ignore_errors=True)  # of a run killed after its last file was renamed
        print(f'{out} holds this data set already', file=sys.stderr)
        return
    killed_while_renaming = folder.exists() and 'meta.json' not in there
    if there and not killed_while_renaming:
        raise ValueError(f'{out}: holds {", ".join(there)} of another or an incomplete data set; move it, or choose another --out')
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it when the process ends, however that happens
        except BlockingIOError as error:
            raise ValueError(f'{out}: another process is preparing it; wait for that one') from error
        started = time.time()
        meta = {**write(folder), 'dtype': 'uint8', 'tokens': {}, 'sha256': {}}
        for name in SPLITS:
            with open(folder / name, 'rb') as file:
                meta['sha256'][name] = hashlib.file_digest(file, 'sha256').hexdigest()
                meta['tokens'][name] = file.tell()
                os.fsync(file.fileno())  # on disk before it gets its final name, so that a power cut cannot lose it
        for name in (*SPLITS, 'meta.pkl'):
            if (folder / name).exists():
                os.replace(folder / name, out / name)
        atomic_write(out / 'meta.json', json.dumps(meta, indent=1))
    shutil.rmtree(folder)
    print(f'{out}: {sum(meta["tokens"].values()):,} tokens ({time.time() - started:.0f} s)', file=sys.stderr)


def run_command(name: str, out: Path, work) -> None:
    """Call work() for a command line. An expected error ends the program with one line and exit code 1."""
    try:
        work()
    except OSError as error:
        hint = '; free some space or choose another --out, then run the same command again' if error.errno in DISK_FULL else ''
        sys.exit(f'{name}: {error.filename or out}: {error.strerror or error}{hint}')
    except ValueError as error:
        sys.exit(f'{name}: {error}')
    except KeyboardInterrupt:
        sys.exit(f'{name}: stopped; run the same command again to finish the work')

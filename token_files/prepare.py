"""What the preparations share: one data set's folder, its unfinished files, and its last step. The work is in prepare_*.py.

All unfinished files are in `OUT/.preparing`. At the end they are renamed into OUT, `meta.json` last: where it stands, the data set
is complete.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from token_files.atomic import atomic_write

SPLITS = ('train.bin', 'test.bin')
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
META = ('meta.pkl', 'meta.json')  # renamed in this order


def check_no_duplicates(paths) -> None:
    """Raise ValueError if an input is given twice, which would bring test data into the training set."""
    twice = [path for path, n in Counter(os.path.realpath(path) for path in paths).items() if n > 1]
    if twice:
        raise ValueError(f'{twice[0]}: is given twice; give each input once')


def read_json(path: Path):
    """The content of a JSON file, None where there is no file."""
    return json.loads(path.read_text()) if path.exists() else None


def is_complete(out: Path, source: dict) -> bool:
    """True if `out` holds the whole data set made from `source`."""
    meta = read_json(out / 'meta.json') or {}
    sizes = {name: (out / name).stat().st_size for name in SPLITS if (out / name).exists()}
    return bool(sizes) and sizes == meta.get('tokens') and meta.get('source') == source  # a uint8 token is one byte


@contextmanager
def preparation(out: Path, source: dict):
    """Yield the folder for unfinished files, which is deleted after success; None if `out` holds this data set already.

    `source` says what the data set is made from; `finish` writes it to meta.json. Raises ValueError if `out` holds any other data
    set, or if another process is preparing one there. Inputs must have been checked before.
    """
    folder = out / '.preparing'
    if is_complete(out, source):
        shutil.rmtree(folder, ignore_errors=True)  # of a run killed after its last file was renamed
        print(f'{out} holds this data set already', file=sys.stderr)
        yield None
        return
    there = [name for name in (*SPLITS, *META) if (out / name).exists()]
    killed_while_renaming = folder.exists() and 'meta.json' not in there
    if there and not killed_while_renaming:
        raise ValueError(f'{out}: holds {", ".join(there)} of another or an incomplete data set; move it, or choose another --out')
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it when the process ends, however that happens
        except BlockingIOError as error:
            raise ValueError(f'{out}: another process is preparing it; wait for that one') from error
        for name in (*SPLITS, *META):  # of a killed run
            (folder / name).unlink(missing_ok=True)
        yield folder
    shutil.rmtree(folder)


def check_free_space(folder: Path, size: int) -> None:
    """Raise OSError if the disk of `folder` has less than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(errno.ENOSPC, f'disk full: the result takes {size / 1e9:.3g} GB, {free / 1e9:.3g} GB are free', str(folder))


def finish(folder: Path, out: Path, meta: dict) -> dict:
    """Rename train.bin and test.bin from `folder` into `out`, then meta.json. Returns `meta` with counts and checksums added."""
    meta = {**meta, 'dtype': 'uint8', 'tokens': {}, 'sha256': {}}
    for name in SPLITS:
        with open(folder / name, 'rb') as file:
            meta['sha256'][name] = hashlib.file_digest(file, 'sha256').hexdigest()
            meta['tokens'][name] = file.tell()
    atomic_write(folder / 'meta.json', json.dumps(meta, indent=1))
    for name in (*SPLITS, *META):
        if (folder / name).exists():
            os.replace(folder / name, out / name)
    return meta


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

"""A corpus that is on every machine: the Python sources of an installed package as characters.

    python -m experiments.package_text pandas      -> pandas_text/train.bin, test.bin, meta.json

requirements.lock pins pandas 3.1.1 (BSD 3-clause licence, 1,440 files, 24 MB), so that the text is the same everywhere. One token
is one ASCII character (others become '?'). Files come in the order of the SHA-256 of their paths, the same on each machine; the
first of them, up to TEST characters, are the test set: no file is in both. Either set is then cut into pieces of PIECE characters,
the sequences of a model with L = PIECE, which are shuffled: a batch of neighbours would be of one file, and the loss follow it.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

import numpy as np

from token_files import prepare

VOCABULARY = [chr(i) for i in range(128)]
TEST = 400_000  # characters, a little more as files are whole
PIECE = 128


def folder_of(package):
    """Where an installed package lies. Raises ValueError."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f'{package}: no such package is installed here')
    return Path(found.submodule_search_locations[0])


def texts(root):
    """Yield the Python sources below a folder, each ended by a newline, shuffled by their paths."""
    names = sorted((file.relative_to(root).as_posix() for file in root.rglob('*.py')),
                   key=lambda name: hashlib.sha256(name.encode()).digest())
    for name in names:
        yield (root / name).read_text(encoding='utf-8', errors='replace').encode('ascii', 'replace').rstrip() + b'\n'


def shuffled(text):
    """Its whole pieces in an order that is always the same."""
    pieces = np.frombuffer(text, np.uint8)[:len(text) // PIECE * PIECE].reshape(-1, PIECE)
    return np.random.default_rng(0).permutation(pieces).tobytes()


def make(package, out):
    """Write the data set; nothing if `out` holds it already."""
    root = folder_of(package)
    distribution = importlib.metadata.packages_distributions().get(package, [package])[0]
    source = {'package': package, 'version': importlib.metadata.version(distribution), 'test': TEST, 'piece': PIECE}
    with prepare.workplace(out, source) as folder:
        if folder is None:
            return
        parts, size = {'test': [], 'train': []}, 0
        for text in texts(root):
            parts['test' if size < TEST else 'train'].append(text)
            size += len(text)
        if not parts['train']:
            raise ValueError(f'{package}: {size} characters are too few to train on with a test set of {TEST}')
        for name, part in parts.items():
            with open(out / f'{name}.bin.part', 'wb') as file:
                file.write(shuffled(b''.join(part)))
                prepare.to_disk(file)
        prepare.complete(out, {'source': source, 'vocab_size': len(VOCABULARY), 'vocabulary': VOCABULARY})
    print(f'{out}: {size:,} characters')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('package', help='as it is imported, e.g. pandas')
    parser.add_argument('--out', type=Path, help='the folder (default: PACKAGE_text)')
    args = parser.parse_args()
    out = args.out or Path(f'{args.package}_text')
    prepare.run('package_text', out, lambda: make(args.package, out))


if __name__ == '__main__':
    main()

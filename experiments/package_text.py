"""A text corpus that needs no download: the Python sources of an installed package, one character a token.

    python -m experiments.package_text pandas      # writes pandas_text/train.bin, test.bin and meta.json

requirements.lock pins pandas (BSD 3-clause licence, 1,440 files, 24 MB), so that the text is the same on every machine. A token is
an ASCII character; other characters become '?'. Whole files are the test set, at least TEST_CHARACTERS in total: no file is in both
sets. Each set is cut into pieces of PIECE characters, the sequence length of the model, and the pieces are shuffled. Without
this, a batch would hold neighbours from one file, and the loss would follow the files.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

import numpy as np

from token_files import prepare

VOCABULARY = [chr(i) for i in range(128)]
TEST_CHARACTERS = 400_000
PIECE = 128  # characters


def read_sources(root: Path):
    """Yield the text of each Python file below a folder, ending in one newline.

    The order is that of the SHA-256 of the paths: it mixes the subpackages, and is the same on every machine.
    """
    names = [file.relative_to(root).as_posix() for file in root.rglob('*.py')]
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        text = (root / name).read_text(encoding='utf-8', errors='replace')
        yield text.encode('ascii', 'replace').rstrip() + b'\n'


def shuffle_pieces(text: bytes) -> bytes:
    """The whole pieces of a text in random order, always the same one."""
    pieces = np.frombuffer(text, np.uint8)[: len(text) // PIECE * PIECE].reshape(-1, PIECE)
    return np.random.default_rng(0).permutation(pieces).tobytes()


def make(package: str, out: Path) -> None:
    """Write the data set into `out`, or nothing if it is there already. Raises ValueError or OSError with one line."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f'{package}: no such package is installed')
    distribution = importlib.metadata.packages_distributions().get(package, [package])[0]
    source = {'package': package, 'version': importlib.metadata.version(distribution), 'test': TEST_CHARACTERS, 'piece': PIECE}

    def write(folder):
        sets, size = {'test': [], 'train': []}, 0
        for text in read_sources(Path(found.submodule_search_locations[0])):
            sets['test' if size < TEST_CHARACTERS else 'train'].append(text)
            size += len(text)
        if not sets['train']:
            raise ValueError(f'{package}: {size} characters are too few; the test set alone takes {TEST_CHARACTERS}')
        for name, texts in sets.items():
            (folder / f'{name}.bin').write_bytes(shuffle_pieces(b''.join(texts)))
        return {'source': source, 'vocab_size': len(VOCABULARY), 'vocabulary': VOCABULARY}

    prepare.make_data_set(out, source, write)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('package', help='its import name, e.g. pandas')
    parser.add_argument('--out', type=Path, help='the folder to write (default: PACKAGE_text)')
    args = parser.parse_args()
    out = args.out or Path(f'{args.package}_text')
    prepare.run_command('package_text', out, lambda: make(args.package, out))


if __name__ == '__main__':
    main()

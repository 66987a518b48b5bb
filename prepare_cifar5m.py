"""CIFAR-5M images as token files, one grey pixel a token: train.bin, test.bin and meta.json in one folder.

    python prepare_cifar5m.py cifar5m_part*.npz        # the six parts from github.com/preetum/cifar5m

A part is an .npz file whose array X is [images, 32, 32, 3] uint8. It is read in blocks straight from the archive, so memory stays
below 100 MB. docs/data.md says how images become tokens, and which are the test set.
"""

import argparse
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from token_files import prepare

IMAGE = (32, 32, 3)
PIXELS = 32 * 32  # tokens of an image
BLOCK_IMAGES = 4096  # converted at a time: 12 MB of colour


def open_images(path: Path):
    """(stream at the first value of X, number of images, CRC-32 of X) of a part, from its header.

    Raises ValueError naming the file if it is not a whole .npz file, or if X is missing or has a wrong shape or dtype.
    """
    with prepare.clear_errors(path):
        archive = zipfile.ZipFile(path)
        entry = archive.getinfo('X.npy')
        stream = archive.open(entry)
        np.lib.format.read_magic(stream)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)  # the version that NumPy writes for any image array
    if is_fortran or shape[1:] != IMAGE or dtype != np.uint8:
        raise ValueError(f'{path}: X is {list(shape)} {dtype}{" in Fortran order" * is_fortran}; '
                         'wanted [images, 32, 32, 3] uint8 in C order')
    return stream, shape[0], entry.CRC


def grey(colour: np.ndarray) -> np.ndarray:
    """Mean over the channels, truncated: [n, 3] uint8 -> [n] uint8. The integer division is exact."""
    total = colour[:, 0].astype(np.uint16) + colour[:, 1] + colour[:, 2]  # 7 times as fast as colour.sum(1)
    return (total // 3).astype(np.uint8)


def grey_images(path: Path):
    """Yield the grey images of a part in blocks [at most BLOCK_IMAGES, 1024]. Raises ValueError if the part is damaged."""
    stream, count, _ = open_images(path)
    with stream, prepare.clear_errors(path):
        for start in range(0, count, BLOCK_IMAGES):
            n = min(BLOCK_IMAGES, count - start)
            colour = np.frombuffer(stream.read(3 * n * PIXELS), np.uint8)  # at the end zipfile compares the checksum
            yield grey(colour.reshape(n * PIXELS, 3)).reshape(n, PIXELS)


def write_splits(paths: list[Path], is_test: np.ndarray, folder: Path) -> None:
    """Write train.bin and test.bin into `folder`. is_test [all images] says which images are the test set."""
    first = 0  # number of the first image of the block, counted over all parts
    with (open(folder / 'train.bin', 'wb') as train, open(folder / 'test.bin', 'wb') as test,
          tqdm(total=len(is_test), unit=' images', unit_scale=True) as bar):
        for images in (block for path in paths for block in grey_images(path)):
            chosen = is_test[first : first + len(images)]
            train.write(images[~chosen])
            test.write(images[chosen])
            first += len(images)
            bar.update(len(images))


def make(paths: list[Path], out: Path, seed: int = 2357, test_images: int = 2000) -> None:
    """Write the data set of these parts into `out`. Raises ValueError or OSError with one line."""
    prepare.check_no_duplicates(paths)
    parts = [[path.name, *open_images(path)[1:]] for path in paths]  # name, number of images, CRC-32
    total = sum(count for _, count, _ in parts)
    if not 0 < test_images < total:
        raise ValueError(f'--test-images is {test_images}, but there are {total} images; wanted 1 to {total - 1}')
    source = {'parts': parts, 'seed': seed, 'test_images': test_images}

    def write(folder):
        is_test = np.zeros(total, bool)
        is_test[np.random.default_rng(seed).choice(total, test_images, replace=False)] = True
        write_splits(paths, is_test, folder)
        return {'vocab_size': 256, 'image': list(IMAGE[:2]), 'images': {'train': total - test_images, 'test': test_images},
                'split': f'{test_images} images drawn with seed {seed} are the test set, order kept', 'source': source}

    prepare.make_data_set(out, source, write)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('parts', nargs='+', type=Path, help='.npz files, in this order')
    parser.add_argument('--out', type=Path, default=Path('cifar5m'))
    parser.add_argument('--seed', type=int, default=2357, help='of the choice of test images')
    parser.add_argument('--test-images', type=int, default=2000)
    args = parser.parse_args()
    prepare.run_command('prepare_cifar5m', args.out, lambda: make(args.parts, args.out, args.seed, args.test_images))


if __name__ == '__main__':
    main()

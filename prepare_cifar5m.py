"""CIFAR-5M images as token files, one grey pixel a token: train.bin, test.bin and meta.json in one folder.

    python prepare_cifar5m.py cifar5m_part*.npz        # the six parts from github.com/preetum/cifar5m

A part is an .npz file whose array X is [images, 32, 32, 3] uint8. Each image becomes 1,024 tokens in raster order: the mean of the
three channels, truncated, so that ids are 0 … 255. The test set is --test-images images, drawn from all parts without replacement
with --seed. Both sets keep the order of the parts.

The images are read in blocks straight from the archive, so memory stays below 100 MB. The disk holds no more than the result.
A run that is killed leaves no train.bin, and the same command starts again: all six parts take a minute or two on one core.
"""

import argparse
import sys
import time
import tokenize  # NumPy does not catch its TokenError when the header of an array is damaged
import zipfile
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from token_files import prepare
from token_files.atomic import flush_to_disk

IMAGE = (32, 32, 3)
IMAGE_BYTES = 32 * 32 * 3
PIXELS = 32 * 32  # tokens of an image
BLOCK_IMAGES = 4096  # converted at a time: 12 MB of colour
DAMAGED = (zipfile.BadZipFile, zlib.error, tokenize.TokenError, ValueError, EOFError, OSError)


def open_images(path: Path):
    """(stream at the first value of X, shape, dtype, CRC-32 of X) of a part, without reading the images.

    Raises ValueError naming the file if it is not a whole .npz file or has no array X.
    """
    try:
        archive = zipfile.ZipFile(path)
        entry = archive.getinfo('X.npy')
        stream = archive.open(entry)
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read_header(stream)
    except FileNotFoundError as error:
        raise ValueError(f'{path}: no such file') from error
    except KeyError as error:
        raise ValueError(f'{path}: has no array X; it has {", ".join(archive.namelist()) or "none"}') from error
    except DAMAGED as error:
        raise ValueError(f'{path}: cut short or not an .npz file ({error}); download it again') from error
    if is_fortran:
        raise ValueError(f'{path}: X is in Fortran order; save it again with np.ascontiguousarray(X)')
    return stream, shape, dtype, entry.CRC


def inspect(path: Path) -> tuple[int, int]:
    """(number of images, CRC-32 of X) of a part, from its header. Raises ValueError if shape or dtype is wrong."""
    stream, shape, dtype, crc = open_images(path)
    stream.close()
    if len(shape) != 4 or shape[1:] != IMAGE or dtype != np.uint8 or shape[0] == 0:
        raise ValueError(f'{path}: X is {list(shape)} {dtype}; wanted [images, 32, 32, 3] uint8')
    return shape[0], crc


def grey(colour: np.ndarray) -> np.ndarray:
    """Mean over the channels, truncated: [n, 3] uint8 -> [n] uint8. The integer division is exact."""
    total = colour[:, 0].astype(np.uint16)
    total += colour[:, 1]
    total += colour[:, 2]
    return (total // 3).astype(np.uint8)


def grey_images(path: Path, count: int):
    """Yield the `count` grey images of a part in blocks [at most BLOCK_IMAGES, 1024]. Raises ValueError if the part is damaged."""
    stream, *_ = open_images(path)
    with stream:
        try:
            for start in range(0, count, BLOCK_IMAGES):
                n = min(BLOCK_IMAGES, count - start)
                data = stream.read(n * IMAGE_BYTES)
                if len(data) < n * IMAGE_BYTES:
                    raise ValueError(f'X ends after {start + len(data) // IMAGE_BYTES} of {count} images')
                yield grey(np.frombuffer(data, np.uint8).reshape(-1, 3)).reshape(n, PIXELS)
            if stream.read(1):  # reading to the end makes zipfile compare the checksum
                raise ValueError(f'X goes on after its {count} images')
        except DAMAGED as error:
            raise ValueError(f'{path}: damaged ({error}); download it again') from error


def write_splits(paths: list[Path], counts: list[int], is_test: np.ndarray, folder: Path) -> None:
    """Write train.bin and test.bin into `folder`. is_test [all images] says which images are the test set."""
    first = 0  # number of the first image of the block, counted over all parts
    with (open(folder / 'train.bin', 'wb') as train, open(folder / 'test.bin', 'wb') as test,
          tqdm(total=len(is_test), unit=' images', unit_scale=True) as bar):
        for path, count in zip(paths, counts, strict=True):
            for images in grey_images(path, count):
                chosen = is_test[first : first + len(images)]
                train.write(images[~chosen])
                test.write(images[chosen])
                first += len(images)
                bar.update(len(images))
        flush_to_disk(train)
        flush_to_disk(test)


def make(paths: list[Path], out: Path, seed: int = 2357, test_images: int = 2000) -> None:
    """Write the data set of these parts into `out`. Raises ValueError or OSError with one line."""
    prepare.check_no_duplicates(paths)
    counts, checksums = zip(*map(inspect, paths), strict=True)
    total = sum(counts)
    if not 0 < test_images < total:
        raise ValueError(f'--test-images is {test_images}, but there are {total} images; wanted 1 to {total - 1}')
    source = {'parts': [[path.name, count, crc] for path, count, crc in zip(paths, counts, checksums, strict=True)], 'seed': seed,
              'test_images': test_images}
    with prepare.preparation(out, source) as folder:
        if folder is None:
            return
        started = time.time()
        prepare.check_free_space(folder, total * PIXELS)
        is_test = np.zeros(total, bool)
        is_test[np.random.default_rng(seed).choice(total, test_images, replace=False)] = True
        write_splits(paths, counts, is_test, folder)
        prepare.finish(folder, out, {
            'vocab_size': 256, 'image': list(IMAGE[:2]), 'images': {'train': total - test_images, 'test': test_images},
            'split': f'{test_images} images drawn with seed {seed} are the test set, order kept', 'source': source})
    print(f'{out}: {total:,} images ({time.time() - started:.0f} s)', file=sys.stderr)


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

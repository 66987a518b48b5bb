"""CIFAR-5M images to token files, a grey pixel a token: train.bin, test.bin and meta.json in one folder.

    python prepare_cifar5m.py cifar5m_part*.npz        # parts from github.com/preetum/cifar5m

A part is an .npz whose array X is [images, 32, 32, 3] uint8 (and Y the labels, which are not used). Each image becomes
1,024 tokens, ids 0 … 255, in raster order: the mean of the three channels, truncated. --test-images of all images,
drawn without replacement by --seed, are the test set, the rest the training set, both in the order of the parts.

A part is read block by block straight out of its archive, and the result written where it belongs, so memory stays
under 200 MB and disk at the size of the result. Killed and started again, a run keeps the parts it had finished and
ends in the same bytes.
"""

import argparse
import json
import sys
import time
import tokenize  # NumPy lets its errors through when a header is damaged
import zipfile
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from token_files import prepare

IMAGE = (32, 32, 3)
BYTES = 32 * 32 * 3
PIXELS = 32 * 32  # tokens of an image
BLOCK = 4096  # images converted at a time: 12 MB of colour


def open_array(path: Path, name: str):
    """(stream at the first value, shape, dtype, CRC-32 of the array) of one array in an .npz, unread.

    Raises ValueError naming the file if it is no whole archive or has no such array.
    """
    try:
        archive = zipfile.ZipFile(path)
        info = archive.getinfo(f'{name}.npy')
        stream = archive.open(info)
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except FileNotFoundError as e:
        raise ValueError(f'{path}: no such file') from e
    except KeyError as e:
        raise ValueError(f'{path}: has no array {name}; it has {", ".join(archive.namelist()) or "none"}') from e
    except (zipfile.BadZipFile, zlib.error, tokenize.TokenError, ValueError, EOFError, OSError) as e:
        raise ValueError(f'{path}: cut short or no .npz ({e}); fetch it again') from e
    if fortran:
        raise ValueError(f'{path}: {name} is in Fortran order; save it again with np.ascontiguousarray({name})')
    return stream, shape, dtype, info.CRC


def count_images(path: Path) -> tuple[int, int]:
    """(images, CRC-32 of X) of a part, from its header. Raises ValueError if shape, dtype or the number of labels is wrong."""
    stream, shape, dtype, crc = open_array(path, 'X')
    stream.close()
    if len(shape) != 4 or shape[1:] != IMAGE or dtype != np.uint8 or shape[0] == 0:
        raise ValueError(f'{path}: X is {list(shape)} {dtype}; wanted [images, 32, 32, 3] uint8')
    if 'Y.npy' in zipfile.ZipFile(path).namelist():
        labels, labelled, *_ = open_array(path, 'Y')
        labels.close()
        if labelled[:1] != shape[:1]:
            raise ValueError(f'{path}: {shape[0]} images in X, but {labelled} labels in Y; fetch it again')
    return shape[0], crc


def grey(colour: np.ndarray) -> np.ndarray:
    """[n, 3] uint8 -> [n] uint8: the mean over channels, truncated. (An integer sum divided by 3 is exactly that.)"""
    total = colour[:, 0].astype(np.uint16)
    total += colour[:, 1]
    total += colour[:, 2]
    return (total // 3).astype(np.uint8)


def blocks(path: Path, count: int):
    """Yield the grey images of a part, [at most BLOCK, 1024]. Raises ValueError if it holds less than promised or is damaged."""
    stream, *_ = open_array(path, 'X')
    with stream:
        try:
            for start in range(0, count, BLOCK):
                n = min(BLOCK, count - start)
                data = stream.read(n * BYTES)
                if len(data) < n * BYTES:
                    raise ValueError(f'{path}: X ends after {start + len(data) // BYTES} of {count} images; fetch it again')
                yield grey(np.frombuffer(data, np.uint8).reshape(-1, 3)).reshape(n, PIXELS)
            if stream.read(1):  # also makes the archive compare its checksum
                raise ValueError(f'{path}: X goes on after its {count} images')
        except (zipfile.BadZipFile, zlib.error, EOFError) as e:
            raise ValueError(f'{path}: damaged ({e}); fetch it again') from e


def make(paths: list[Path], out: Path, seed=2357, test_images=2000):
    """The whole way from parts to a data set in `out`. Raises ValueError or OSError, one clear line each."""
    prepare.check_distinct(paths)
    counts, checksums = zip(*map(count_images, paths), strict=True)
    total = sum(counts)
    if not 0 < test_images < total:
        raise ValueError(f'{test_images} test images out of {total}: set --test-images between 1 and {total - 1}')
    test = np.sort(np.random.default_rng(seed).choice(total, test_images, replace=False))
    source = {'parts': [[path.name, n, crc] for path, n, crc in zip(paths, counts, checksums, strict=True)], 'seed': seed,
              'test_images': test_images}
    with prepare.workplace(out, source) as folder:
        if folder is None:
            return
        prepare.check_room(out, total * PIXELS)
        done, started = prepare.read_json(folder / 'done.json') or 0, time.time()
        for name in prepare.FILES:
            (out / f'{name}.part').touch()
        if sum((out / f'{name}.part').stat().st_size for name in prepare.FILES) < sum(counts[:done]) * PIXELS:
            done = 0  # killed between giving the one and the other file its name
        if done:
            print(f'{done} of {len(paths)} parts were prepared before', file=sys.stderr)
        first = sum(counts[:done])  # of the images still to do
        with (open(out / 'train.bin.part', 'r+b') as train, open(out / 'test.bin.part', 'r+b') as testing,
              tqdm(total=total, initial=first, unit=' images', unit_scale=True) as bar):
            before = int(np.searchsorted(test, first))  # test images among those done
            for f, images in ((train, first - before), (testing, before)):
                f.truncate(f.seek(images * PIXELS))
            for part in range(done, len(paths)):
                for images in blocks(paths[part], counts[part]):
                    chosen = np.zeros(len(images), bool)
                    low, high = np.searchsorted(test, [first, first + len(images)])
                    chosen[test[low:high] - first] = True
                    train.write(images[~chosen])
                    testing.write(images[chosen])
                    first += len(images)
                    bar.update(len(images))
                for f in (train, testing):
                    prepare.to_disk(f)
                prepare.write_atomically(folder / 'done.json', json.dumps(part + 1).encode())
        meta = {'vocab_size': 256, 'image': list(IMAGE[:2]), 'images': {'train': total - test_images, 'test': test_images},
                'split': f'{test_images} images drawn with seed {seed} are the test set, order kept', 'source': source}
        prepare.complete(out, meta)
    print(f'{total:,} images in {out} ({time.time() - started:.0f} s)', file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('parts', nargs='+', type=Path, help='.npz files, in this order')
    parser.add_argument('--out', type=Path, default=Path('cifar5m'))
    parser.add_argument('--seed', type=int, default=2357, help='of the choice of test images')
    parser.add_argument('--test-images', type=int, default=2000)
    args = parser.parse_args()
    prepare.run('prepare_cifar5m', args.out, lambda: make(args.parts, args.out, args.seed, args.test_images))


if __name__ == '__main__':
    main()

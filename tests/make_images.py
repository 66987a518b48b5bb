"""Writes parts in the form of CIFAR-5M, cut from the photographs in scikit-image. For tests and small runs.

    python tests/make_images.py DIR --parts 1 --images 1000448      # one part of the true size: 3.07 GB

An image is a window of 32 by 32 pixels in a photograph at one of four scales, mirrored in half of the cases. --seed determines it.
The format is that of np.savez, but it is written in blocks, which needs little memory.
"""

import argparse
import zipfile
from pathlib import Path

import numpy as np
import skimage
from PIL import Image
from tqdm import tqdm

PHOTOGRAPHS = ['astronaut.png', 'chelsea.png', 'coffee.png', 'hubble_deep_field.jpg', 'motorcycle_left.png', 'retina.jpg',
               'rocket.jpg']  # fmt: skip
BLOCK = 4096


def photographs() -> list[np.ndarray]:
    folder, views = Path(skimage.__file__).parent / 'data', []
    for name in PHOTOGRAPHS:
        image = Image.open(folder / name).convert('RGB')
        for scale in (2, 4, 6, 8):
            views.append(np.asarray(image.resize((image.width // scale, image.height // scale), Image.Resampling.BOX)))
    return views


def windows(count: int, seed: int):
    """Yield blocks [at most BLOCK, 32, 32, 3] uint8, `count` images in all."""
    rng, views = np.random.default_rng(seed), photographs()
    for start in range(0, count, BLOCK):
        block = np.empty((min(BLOCK, count - start), 32, 32, 3), np.uint8)
        for image, view, y, x, mirrored in zip(block, rng.integers(len(views), size=BLOCK), *rng.random((2, BLOCK)),
                                               rng.random(BLOCK) < 0.5, strict=False):
            v = views[view]
            top, left = int(y * (v.shape[0] - 31)), int(x * (v.shape[1] - 31))
            window = v[top : top + 32, left : left + 32]
            image[:] = window[:, ::-1] if mirrored else window
        yield block


def write_part(path: Path, count: int, seed: int):
    with zipfile.ZipFile(path, 'w', allowZip64=True) as archive:
        with archive.open('X.npy', 'w', force_zip64=True) as f:
            np.lib.format.write_array_header_1_0(f, {'descr': '|u1', 'fortran_order': False, 'shape': (count, 32, 32, 3)})
            for block in tqdm(windows(count, seed), total=-(-count // BLOCK), desc=path.name, unit=' blocks', disable=None):
                f.write(block)
        with archive.open('Y.npy', 'w') as f:
            np.lib.format.write_array(f, np.random.default_rng(seed).integers(10, size=count))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('dir', type=Path)
    parser.add_argument('--parts', type=int, default=2)
    parser.add_argument('--images', type=int, default=4000, help='a part')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    for i in range(args.parts):
        write_part(args.dir / f'cifar5m_part{i}.npz', args.images, args.seed + i)


if __name__ == '__main__':
    main()

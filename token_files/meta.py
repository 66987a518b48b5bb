"""The optional description of a data set: `meta.json`, or the `meta.pkl` of the published ones. Every key is optional.

    vocab_size  ids lie in [0, vocab_size)          pad_id    targets with this id carry no loss
    dtype       'uint8' (the default) or 'uint16'   bos       id that opens every document
    vocabulary  the text of every id, in order      image     [rows, columns] of one sequence of pixels
    tokens      {file: number of tokens}            sha256    {file: checksum}
"""

import json
import pickle
from pathlib import Path

MAX_BYTES = 1 << 20  # a vocabulary of 50,000 words takes about half of this
SCALARS = ('vocab_size', 'pad_id', 'bos', 'dtype')  # must agree where meta.json and meta.pkl both give them


def is_id(value) -> bool:
    return type(value) is int and 0 <= value <= 65536


def is_list_of_strings(value) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def is_image_shape(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)


def is_dict(value) -> bool:
    return isinstance(value, dict)


# key: (the check that its value must pass, what is wanted)
KEYS = {
    'vocab_size': (is_id, 'an integer in 0 … 65536'),
    'pad_id': (is_id, 'an integer in 0 … 65536'),
    'bos': (is_id, 'an integer in 0 … 65536'),
    'dtype': (('uint8', 'uint16').__contains__, '"uint8" or "uint16"'),
    'vocabulary': (is_list_of_strings, 'a list of strings'),
    'image': (is_image_shape, '[rows, columns]'),
    'tokens': (is_dict, '{file: count}'),
    'sha256': (is_dict, '{file: checksum}'),
}


class PlainUnpickler(pickle.Unpickler):
    """Loads numbers, strings and containers only. A pickle that names a class or function is refused before that runs."""

    def find_class(self, module, name):
        raise ValueError(f'it asks for {module}.{name}')


def load(path: Path) -> dict:
    """The dictionary in one meta file. Raises ValueError with the file and the reason."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f'{path}: {size} bytes; the description of a data set has at most {MAX_BYTES}')
    try:
        with open(path, 'rb') as file:
            meta = PlainUnpickler(file).load() if path.suffix == '.pkl' else json.load(file)
    except Exception as error:  # a damaged pickle can raise almost any exception; the message names the file and the reason
        raise ValueError(f'{path}: cannot be read ({error}); wanted a dict of plain numbers, strings, lists and dicts') from error
    if not isinstance(meta, dict):
        raise ValueError(f'{path}: holds a {type(meta).__name__}; wanted a dict')
    return meta


def read_meta(folder: Path) -> dict:
    """The description of a data set: the keys of `meta.json` over those of `meta.pkl`; {} where there is neither.

    Raises ValueError with the file, the key and what was wanted.
    """
    meta = {}
    for path in (folder / 'meta.pkl', folder / 'meta.json'):
        if not path.exists():
            continue
        found = load(path)
        for key in SCALARS:
            if key in meta and key in found and meta[key] != found[key]:
                raise ValueError(f'{path}: {key} is {found[key]!r}, but {meta[key]!r} in meta.pkl; delete the wrong one')
        meta |= found
    if 'itos' in meta and 'vocabulary' not in meta:  # the key for id → text in published meta.pkl files
        texts = dict(enumerate(meta['itos'])) if isinstance(meta['itos'], list) else meta['itos']
        meta['vocabulary'] = [str(texts.get(i, '?')) for i in range(meta.get('vocab_size', len(texts)))]
    check(meta, folder)
    return meta


def check(meta: dict, folder: Path) -> None:
    """Raise ValueError at the first key whose value has the wrong form."""
    for key, (is_right, wanted) in KEYS.items():
        if meta.get(key) is not None and not is_right(meta[key]):
            raise ValueError(f'{folder}/meta.json: {key}={str(meta[key])[:40]!r} is wrong; wanted {wanted}')
    words = meta.get('vocabulary')
    if words is not None and len(words) != meta.get('vocab_size'):
        raise ValueError(f'{folder}/meta.json: vocabulary has {len(words)} entries, but vocab_size is {meta.get("vocab_size")}; '
                         'they must agree')

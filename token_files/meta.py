"""The optional description of a data set: `meta.json`, or the `meta.pkl` of the published ones. Every key is optional."""

import json
import pickle
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, PositiveInt, ValidationError

Id = Annotated[int, Field(ge=0, le=65536)]


class Meta(BaseModel, strict=True):
    """What is known of a data set. Other keys of its meta files are ignored."""

    vocab_size: Id | None = None  # ids lie in [0, vocab_size)
    pad_id: Id | None = None  # targets with this id carry no loss; None: every target counts
    bos: Id | None = None  # id that opens every document
    dtype: Literal['uint8', 'uint16'] = 'uint8'  # of files without a header
    vocabulary: list[str] | None = None  # the text of every id, in order
    image: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None  # rows, columns of one sequence of pixels
    tokens: dict[str, int] = {}  # number of tokens by file name
    sha256: dict[str, str] = {}  # checksum by file name


class PlainUnpickler(pickle.Unpickler):
    """Loads numbers, strings and containers only. A pickle that names a class or function is refused before that runs."""

    def find_class(self, module, name):
        raise ValueError(f'it asks for {module}.{name}')


def load(path: Path) -> dict:
    """The dictionary in one meta file. Raises ValueError with the file and the reason."""
    try:
        with open(path, 'rb') as file:
            meta = PlainUnpickler(file).load() if path.suffix == '.pkl' else json.load(file)
        if not isinstance(meta, dict):
            raise ValueError(f'it holds a {type(meta).__name__}')
        if 'itos' in meta:  # the key for {id: text} in published meta.pkl files
            meta['vocabulary'] = [str(text) for _, text in sorted(meta['itos'].items())]
    except Exception as error:  # a damaged pickle can raise almost any exception; the message names the file and the reason
        raise ValueError(f'{path}: cannot be read ({error}); wanted a dict of plain numbers, strings, lists and dicts') from error
    return meta


def read_meta(folder: Path) -> Meta:
    """The description of a data set. Keys of `meta.json` take the place of those of `meta.pkl`.

    Raises ValueError with the file, the key, what was wanted and what came.
    """
    meta = {}
    for path in (folder / 'meta.pkl', folder / 'meta.json'):
        meta |= load(path) if path.exists() else {}
    try:
        return Meta.model_validate(meta)
    except ValidationError as error:
        first = error.errors()[0]
        key = '.'.join(map(str, first['loc']))
        raise ValueError(f'{folder}/meta.json: {key}={str(first["input"])[:40]!r} is wrong: {first["msg"]}') from error

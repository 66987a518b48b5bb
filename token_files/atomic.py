"""Atomic writes."""
import os
from pathlib import Path


def atomic_write(path, content):
    path = Path(path)
    part = path.with_name(path.name + '.part')
    with open(part, 'wb') as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)

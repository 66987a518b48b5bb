"""`python -m token_files DIR`: check a data set and describe it. The work is done in describe.py."""

import argparse
import sys
from pathlib import Path

from token_files.describe import describe

parser = argparse.ArgumentParser(prog='python -m token_files', description='check and describe a data set')
parser.add_argument('dir', type=Path)
try:
    describe(parser.parse_args().dir)
except (ValueError, OSError) as error:
    sys.exit(f'token_files: {error}')

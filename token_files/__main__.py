"""`python -m token_files DIR [--config NAME]`: check a data set and describe it. The work is done in describe.py."""

from token_files.describe import main

if __name__ == '__main__':
    main()

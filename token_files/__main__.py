"""`python -m token_files DIR`: see files.py."""
from token_files.files import main

if __name__ == '__main__':
    main()

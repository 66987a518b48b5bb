"""Files of tokens on disk: read, check, describe and prepare them."""

"""Files of token ids on disk: open and check them, describe them, and what the preparation and download scripts share."""

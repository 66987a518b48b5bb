"""The paper's sweeps as W&B sweep files, and run.py, which runs one of them on this machine."""

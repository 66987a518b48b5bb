"""What the training script uses: configuration, compiled programs, run folder, checkpoints, W&B, devices."""

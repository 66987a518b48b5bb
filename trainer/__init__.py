"""What the training script stands on: configuration, compiled programs, run folder, checkpoints, W&B, devices."""

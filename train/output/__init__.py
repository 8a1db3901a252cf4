"""What a run leaves behind: its folder, checkpoints and TensorBoard events."""

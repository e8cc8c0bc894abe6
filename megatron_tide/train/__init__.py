"""Loss -> checkpoints: the step, the loop around it, the DeepSpeed engine under it, and what is saved."""

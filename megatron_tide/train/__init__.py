"""Loss -> checkpoints: the step, the loop around it, the DeepSpeed engine under it, and its checkpoints."""

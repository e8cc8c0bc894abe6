"""One script per claim, each against a peer or a plain reference in the same run."""

"""What is trained on top of a backbone: one-step dense heads and probes."""

"""What is done between two steps of a sampler: measurements, inversion, completion, composition."""

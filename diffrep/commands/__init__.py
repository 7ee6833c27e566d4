"""The commands of ``diffrep``, one module each: a dataclass whose `run` calls what a notebook would call."""

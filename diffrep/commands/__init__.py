"""The commands of ``diffrep``, one module each: dataclasses whose `run` calls the same public functions a notebook would."""

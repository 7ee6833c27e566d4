"""The former place of `diffrep.commands.image_runs`, for those who import from here."""

from diffrep.commands.image_runs import output_names

__all__ = ["output_names"]

"""Samplers: every solver of the field as a table of linear updates, on any model of the project."""

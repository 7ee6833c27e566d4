"""Doctests of docstrings become fenced blocks: without "Examples:" above them the parser takes them for quotations."""

from __future__ import annotations

import re
from typing import Any

import griffe


class FenceDoctests(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring and ">>> " in obj.docstring.value:
            obj.docstring.value = re.sub(
                r"^(>>> .*(?:\n(?!\n).+)*)", r"```pycon\n\1\n```", obj.docstring.value, flags=re.M
            )

"""A CLIP tokenizer with a small vocabulary: every byte, and one token for each word that captions use."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in GPT-2's and CLIP's vocabularies, in their order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]


def word_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that build each word from its left end, the earlier words first.

    The last character of a word carries the end mark, so the merges of a prefix never swallow a whole word.

    >>> word_merges(["car", "cat"])
    [('c', 'a'), ('ca', 'r</w>'), ('ca', 't</w>')]
    """
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        while len(symbols) > 1:
            merges.setdefault((symbols[0], symbols[1]))
            symbols[:2] = [symbols[0] + symbols[1]]
    return list(merges)


def reachable_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """`word_merges` in an order in which every word really comes out as one token.

    Byte-pair encoding applies the earliest merge that fits anywhere in a word, so a merge that was meant for the
    start of one word ("a" + "n" of "and") can spoil the middle of another ("plane"). Such words get their own
    merges for what they break into.

    Raises:
        ValueError: a word is empty or not made of lower-case ASCII letters.
    """
    words = list(dict.fromkeys(words))
    if bad := [w for w in words if not (w.isascii() and w.isalpha() and w.islower())]:
        raise ValueError(f"words are lower-case ASCII letters, found {bad[0]!r}")
    merges = word_merges(words)
    for _ in range(len(words)):
        broken = {word: symbols for word in words if len(symbols := encode_word(word, merges)) > 1}
        if not broken:
            break
        for symbols in broken.values():
            pair = (symbols[0], symbols[1])
            if pair not in merges:
                merges.append(pair)
    return merges


def encode_word(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encode one lower-case ASCII word."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    symbols = [*word[:-1], f"{word[-1]}</w>"]
    while len(symbols) > 1:
        pairs = list(pairwise(symbols))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined: list[str] = []
        for symbol in symbols:
            if joined and (joined[-1], symbol) == best:
                joined[-1] += symbol
            else:
                joined.append(symbol)
        symbols = joined
    return symbols


def write_tokenizer(folder: str | os.PathLike[str], words: Iterable[str], *, length: int) -> int:
    """Write the files of a `CLIPTokenizer` in which each word is one token; returns the size of the vocabulary.

    Args:
        length: tokens of a caption, with start and end: ``model_max_length``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    merges = reachable_merges(words)
    symbols = byte_symbols()
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), *(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate([*dict.fromkeys(tokens), START, END])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {
        "add_prefix_space": False,
        **special,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": length,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return len(vocabulary)

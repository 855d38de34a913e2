"""Prompts with a gap: the spellings by which editors mark what is before and behind the cursor."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

# (before, behind, end) of each family's markers.
_MARKERS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # qwen, codegemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # starcoder, granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # santacoder
    # deepseek, with a wide bar
    ("<\uff5cfim▁begin\uff5c>", "<\uff5cfim▁hole\uff5c>", "<\uff5cfim▁end\uff5c>"),
    ("<PRE>", "<SUF>", "<MID>"),  # codellama
    ("[PREFIX]", "[SUFFIX]", ""),  # codestral, the text behind the cursor first
)
# A name has no "<": no character is looked at for two of many markers without a line's end.
_FILE = re.compile(r"<\|file_sep\|>([^\n<]{0,1000})\n|<filename>([^\n<]{0,1000})\n")


@dataclass(frozen=True, slots=True)
class Gap:
    """A prompt's parts."""

    before: str
    after: str
    files: tuple[tuple[str, str], ...] = ()  # name and text of others


def gap_of(prompt: str) -> Gap | None:
    """Return the parts of a prompt with markers, or None for one without.

    Both orders are read: before, behind; and behind, before. Files that stand before the markers,
    as qwen's models take them, come apart.
    """
    for first, second, end in _MARKERS:
        at, behind = prompt.find(first), prompt.find(second)
        if at < 0 or behind < 0:
            continue
        stop = prompt.rfind(end) if end else len(prompt)
        if stop < max(at, behind):
            continue
        lead = prompt[: min(at, behind)]
        if at < behind:
            before = prompt[at + len(first) : behind]
            after = prompt[behind + len(second) : stop]
        else:
            after = prompt[behind + len(second) : at]
            before = prompt[at + len(first) : stop]
        if first == "<PRE>":  # codellama's have a space beside them
            before, after = before.removeprefix(" ").removesuffix(" "), after.removesuffix(" ")
        return Gap(before, after, _files(lead))
    return None


def _files(lead: str) -> tuple[tuple[str, str], ...]:
    """Return name and text of the files before the markers; the last one is the gap's own."""
    heads = list(_FILE.finditer(lead))
    files = [
        (head[1] or head[2] or "", lead[head.end() : following.start()].strip("\n"))
        for head, following in pairwise(heads)
    ]
    if heads and (rest := lead[heads[-1].end() :].strip("\n")):
        files.append((heads[-1][1] or heads[-1][2] or "", rest))
    return tuple((name, text) for name, text in files if text.strip())

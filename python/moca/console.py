"""What is shown on a terminal: names and texts of others cannot command it."""

from __future__ import annotations

import logging
import os
import re
import sys

# Control characters, line and paragraph separators, marks that turn the direction of writing (as
# in Trojan Source, arXiv 2111.00169), and halves of surrogate pairs.
_COMMANDS = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text in one line, with escapes such as ``\\x1b`` for what a terminal obeys."""
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_lines(text: str) -> str:
    """The text with its lines, else as `printable` makes it."""
    return "\n".join(map(printable, text.split("\n")))


def say(text: str) -> None:
    """Print lines of a result, with escapes for what the terminal's encoding has not.

    A reader that has seen enough of it, as ``head`` has, is no error.
    """
    encoding = sys.stdout.encoding or "utf-8"
    shown = printable_lines(text).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(shown, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be said


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


def show_warnings_printable() -> None:
    """Warnings that no handler of the program's takes are shown as `printable_lines` makes them."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Printable())

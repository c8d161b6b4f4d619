"""What is shown: nothing commands the terminal, and no terminal stops what is said."""

import io
import logging
import subprocess
import sys

from moca.console import say, show_warnings_printable


def test_what_the_encoding_of_a_terminal_has_not_is_escaped(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    say("café …\n\x1b[2J\udce9")
    assert terminal.buffer.getvalue() == b"caf\xe9 \\u2026\n\\x1b[2J\\udce9\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    code = "import sys; from moca.console import say; sys.stdin.read(); say('a'); say('b')"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_warnings_are_printable(capsys, monkeypatch):
    monkeypatch.setattr(logging, "lastResort", logging._StderrHandler(logging.WARNING))
    show_warnings_printable()
    logger = logging.Logger("of nobody")
    logger.warning("%s is not\nread", "a\x1b[2J")
    assert capsys.readouterr().err == "a\\x1b[2J is not\nread\n"

"""The `moca` command: cpt, contrast, embed, search, eval and quickstart.

Every subcommand takes a YAML file, `key=value` overrides, or both. Heavy modules are imported only
after the configuration has been read and checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moca.config import (
    ConfigError,
    ContrastConfig,
    CptConfig,
    EmbedConfig,
    EvalConfig,
    QuickstartConfig,
    load_config,
)
from moca.console import printable_lines, say, show_warnings_printable


def _cpt(config: CptConfig) -> None:
    from moca.pretrain import pretrain
    from moca.processes import leave_process_group

    pretrain(config)
    leave_process_group()
    say(f"model: {config.output}/model")


def _contrast(config: ContrastConfig) -> None:
    from moca.contrast import contrast
    from moca.processes import leave_process_group

    contrast(config)
    leave_process_group()
    say(f"model: {config.output}/model")


def _embed(config: EmbedConfig) -> None:
    from moca.embed import build_index

    count = build_index(config)
    say(f'{count} documents in {config.output}; try: moca search {config.output} "your query"')


def _eval(config: EvalConfig) -> None:
    from moca.retrieval import evaluate_model, format_table

    say(format_table(evaluate_model(config)))


def _quickstart(config: QuickstartConfig) -> None:
    from moca.quickstart.run import quickstart

    report = quickstart(config)
    say(f"report: {report}")


COMMANDS: dict[str, tuple[type, Callable, str]] = {
    "cpt": (CptConfig, _cpt, "stage 1: continual pre-training on interleaved documents"),
    "contrast": (ContrastConfig, _contrast, "stage 2: contrastive fine-tuning on pairs"),
    "embed": (EmbedConfig, _embed, "embed documents into an index folder"),
    "eval": (EvalConfig, _eval, "metrics over held-out pairs, MMEB tasks and BEIR folders"),
    "quickstart": (QuickstartConfig, _quickstart, "the whole system on real data, in minutes"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("moca", description="Bidirectional multimodal embeddings.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (config, _, summary) in COMMANDS.items():
        keys = ", ".join(field.name for field in dataclasses.fields(config))
        command = commands.add_parser(name, help=summary, description=f"{summary}. Keys: {keys}.")
        command.add_argument(
            "settings",
            nargs="*",
            metavar="CONFIG.yaml | key=value",
            help="a YAML file first, then keys that override it",
        )
    find = commands.add_parser("search", help="the best hits of an index for a query")
    find.add_argument("index", help="a folder written by `moca embed`")
    find.add_argument("query", help="what to look for: words, or the path of a picture")
    find.add_argument("-k", type=int, default=5, help="how many hits (default 5)")
    find.add_argument("--model", help="where the index's model lies now, if it has been moved")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (130 after Ctrl-C, 2 for a bad configuration)."""
    parsed = _parser().parse_args(arguments)
    show_warnings_printable()
    try:
        if parsed.command == "search":
            return _search(parsed)
        config_type, run, _ = COMMANDS[parsed.command]
        path, overrides = None, parsed.settings
        if overrides and "=" not in overrides[0]:
            path, *overrides = overrides
        run(load_config(config_type, path, overrides))
    except KeyboardInterrupt as interrupt:
        print(f"moca: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130
    except (ConfigError, ValueError, OSError, RuntimeError) as error:
        print(printable_lines(f"moca {parsed.command}: {error}"), file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _search(parsed: argparse.Namespace) -> int:
    from moca.data.sources import picture_suffixes
    from moca.embed import search

    query: str | Path = parsed.query
    # Not Path.is_file, which refuses names that are too long for a file.
    if os.path.isfile(query) and Path(query).suffix.lower() in picture_suffixes():
        query = Path(query)
        print(f"the query is the picture {printable_lines(parsed.query)}", file=sys.stderr)
    for hit in search(parsed.index, query, parsed.k, parsed.model):
        say(f"{hit.score:6.3f}  {hit.name}\n        {hit.text}")
    return 0

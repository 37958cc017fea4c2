"""Command-line parsers that report errors in one line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from ldm.errors import USER_ERROR
from ldm.files.messages import did_you_mean


def training_arguments(description: str) -> argparse.ArgumentParser:
    """Build a parser for --config, section.key=value words, and --local_rank, which the deepspeed launcher adds."""
    parser = OneLineParser(description)
    parser.add_argument("--config", required=True, help="YAML file of the run, as in configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


class OneLineParser(argparse.ArgumentParser):
    """A parser without abbreviations of options. An error is one line, which suggests the nearest option."""

    def __init__(self, description: str) -> None:
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=style, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (-[\w-]+)[^:]*: ", r"\1: ", message)  # without the option's other names
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            near = did_you_mean(unknown[1], self._option_string_actions)
            hint = f"did you mean {near}?" if near else "--help lists all"
            message = f"unknown option {unknown[1]}, {hint}"
        self.exit(USER_ERROR, f"error: {' '.join(message.split())}\n")


def hyphenated(words: Sequence[str]) -> list[str]:
    """Replace underscores in options (--n_samples=2) by hyphens (--n-samples=2)."""
    return [re.sub(r"\A--[A-Za-z][\w-]*(?==|\Z)", lambda option: option[0].replace("_", "-"), word) for word in words]

"""`detector-config`: look at a configuration, check it, or write the schema that gives editors completion."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from detector.cli.common import run_command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="config", description="Show, check or describe configurations.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="the whole resolved configuration as YAML, every default spelled out")
    show.add_argument("recipe", type=Path, help="a recipe file, or the name of one that ships with the package")
    show.add_argument("overrides", nargs="*", metavar="key=value")
    validate = commands.add_parser("validate", help="check recipes; nothing is loaded or run")
    validate.add_argument("recipes", nargs="+", type=Path)
    schema = commands.add_parser("schema", help="the JSON schema of recipes, for completion in editors")
    schema.add_argument("--out", type=Path, help="write it here instead of printing it")
    commands.add_parser("list", help="the recipes that ship with the package")
    options = parser.parse_args(arguments)
    return run_command(lambda: _COMMANDS[options.command](options))


def _show(options: argparse.Namespace) -> int:
    from detector.config.load import dump, load_config

    print(dump(load_config(options.recipe, options.overrides)), end="")
    return 0


def _validate(options: argparse.Namespace) -> int:
    from detector.config.load import load_config
    from detector.errors import ConfigError

    failed = 0
    for recipe in options.recipes:
        try:
            load_config(recipe)
            print(f"{recipe}: ok")
        except ConfigError as error:
            print(error)
            failed += 1
    return 2 if failed else 0


def _schema(options: argparse.Namespace) -> int:
    from detector.config.load import schema

    text = json.dumps(schema(), indent=1) + "\n"
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text, encoding="utf-8")
    return 0


def _list(_: argparse.Namespace) -> int:
    from detector.config.load import recipe_names

    print("\n".join(recipe_names()))
    return 0


_COMMANDS = {"show": _show, "validate": _validate, "schema": _schema, "list": _list}

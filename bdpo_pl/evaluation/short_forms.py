"""Short spellings for jsonargparse: switches without a value, models in any position, judges and attacks by short name.

Full spellings pass unchanged. The parser's own types determine which options are switches and groups.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser, Namespace

from bdpo_pl.evaluation.attacks import choice
from bdpo_pl.evaluation.judges import registry

_JUDGE, _KIND, _HELP, _CONFIG = "--judge", "--judge.kind", "--judge.help", "--config"
# Name of the parser's argument for the text, which differs between releases.
_TEXT = ("cfg_str", "content", "config")
_ALONE = ("-h", "--help", "--print_config")


class EvaluationParser(ArgumentParser):
    """Parser of jsonargparse, for the command line and files of an evaluation."""

    def parse_args(self, args: Sequence[str] = (), *rest: object, **kwargs: object) -> Namespace:
        """Parse `args`, which may contain short spellings; `--judge.help NAME` prints a judge's options and exits."""
        ordered = _in_order(self, list(args))
        for arg in ordered:
            name, _, judge = arg.partition("=")
            if name == _HELP and judge in registry.ALIASES:
                _parser_of(judge).print_help()
                self.exit()
        return super().parse_args(ordered, *rest, **kwargs)

    def parse_string(self, *args: str, **kwargs: Any) -> Namespace:
        """Parse the text of a file, in which a judge may be a name or a mapping with a `kind`."""
        if args:
            args = (_text_in_full(self, args[0]), *args[1:])
        else:
            kwargs = {key: _text_in_full(self, value) if key in _TEXT else value for key, value in kwargs.items()}
        return super().parse_string(*args, **kwargs)


def _text_in_full(parser: ArgumentParser, text: str) -> str:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # the parser reports the syntax error
    if not isinstance(content, dict):
        return text
    return yaml.safe_dump(_in_full(parser, content), allow_unicode=True, sort_keys=False)


def class_of(named: object, aliases: Mapping[str, str]) -> Any:
    """Expand a short name, or a mapping with a `kind` beside the options, into a `class_path` with `init_args`."""
    if isinstance(named, str):
        return {"class_path": aliases.get(named, named)}
    if isinstance(named, dict) and "class_path" in named:
        return {**named, "class_path": aliases.get(named["class_path"], named["class_path"])}
    if isinstance(named, dict) and "kind" in named:
        options = {key: value for key, value in named.items() if key != "kind"}
        return {"class_path": aliases.get(named["kind"], named["kind"]), "init_args": options}
    return named


def _in_full(parser: ArgumentParser, content: dict[str, Any]) -> dict[str, Any]:
    content = dict(content)
    if content.get("judge") is not None:
        content["judge"] = class_of(content["judge"], registry.ALIASES)
    attacks = content.get("attacks")
    if isinstance(attacks, dict):
        more = attacks.get("more")
        attacks = {**attacks, "more": [class_of(one, choice.ALIASES) for one in more]} if more else dict(attacks)
        alone = [name for name, value in attacks.items() if value is True and _is_group(parser, f"--attacks.{name}")]
        content["attacks"] = {**attacks, **{name: {} for name in alone}}
    return content


def _in_order(parser: ArgumentParser, args: list[str]) -> list[str]:
    """Reorder `args` for argparse: files, models from any position, the judge, and each option with its value.

    Files come first, because a file would replace models that were named before it. The judge comes before its options,
    because they need its class.
    """
    files: list[str] = []
    judge: list[str] = []
    models: list[str] = []
    options: list[str] = []
    rest = list(args)
    while rest:
        name, has_value, value = rest.pop(0).partition("=")
        if not name.startswith("-"):
            models.append(name + has_value + value)
            continue
        if name == _HELP and not has_value and rest and not rest[0].startswith("-"):
            has_value, value = "=", rest.pop(0)
        if name in _ALONE or name.endswith(".help"):
            options.append(name + has_value + value)
            continue
        if not has_value:
            given, used = _value(parser, name, rest)
            if given is None:
                options.append(name)
                continue
            value, rest = given, rest[used:]
        value = _group(parser, name, value)
        if name in (_JUDGE, _KIND):
            judge.append(f"{_JUDGE}={_judge(value)}")
        else:
            (files if name == _CONFIG else options).append(f"{name}={value}")
    return files + models + judge + options


def _parser_of(judge: str) -> ArgumentParser:
    """Return a parser with the options of the judge of this short name; jsonargparse shows those of classes only."""
    parser = ArgumentParser(add_help=False)
    module, _, name = registry.ALIASES[judge].rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    add = parser.add_class_arguments if isinstance(kind, type) else parser.add_function_arguments
    options = add(kind, "judge", as_group=False)
    parser.usage = f"{_KIND} {judge} " + ("[--judge.OPTION VALUE ...]" if options else "(it has no options)")
    return parser


def _judge(value: str) -> str:
    if value.startswith("{"):
        try:
            return json.dumps(class_of(yaml.safe_load(value), registry.ALIASES))
        except yaml.YAMLError:
            return value  # the parser reports the syntax error
    return registry.ALIASES.get(value, value)


def _value(parser: ArgumentParser, name: str, rest: Sequence[str]) -> tuple[str | None, int]:
    """Return (the value that follows an option, the number of arguments it uses); a switch or group alone is true."""
    given = rest[0] if rest else None
    if _is_switch(parser, name) or _is_group(parser, name):
        is_value = given is not None and (given in ("true", "false", "null") or given.startswith("{"))
        return (given, 1) if is_value else ("true", 0)
    return given, 1


def _group(parser: ArgumentParser, name: str, value: str) -> str:
    """Expand true to all defaults, for a group of options that is off by default."""
    return {"true": "{}", "false": "null"}.get(value, value) if _is_group(parser, name) else value


def _type(parser: ArgumentParser, name: str) -> Any:
    return getattr(parser._option_string_actions.get(name), "_typehint", None)


def _is_switch(parser: ArgumentParser, name: str) -> bool:
    return _type(parser, name) is bool


def _is_group(parser: ArgumentParser, name: str) -> bool:
    kinds = get_args(_type(parser, name))
    return len(kinds) == 2 and type(None) in kinds and any(map(dataclasses.is_dataclass, kinds))

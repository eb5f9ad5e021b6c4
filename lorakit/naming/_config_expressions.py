"""Whether PEFT's matching of a config's regular expressions ends, before PEFT does it in this process.

PEFT matches with `re`, which cannot be stopped. The package `regex` cannot stand in for it here: it answers at once for
many expressions that take `re` years, such as (a+)+$. So `re` itself tries them in a process that can be ended.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lorakit.errors import PatternError
from lorakit.naming.matching import is_literal, shown

_SECONDS = 5.0

# Prints the index of each expression before it is tried. What is no expression is for PEFT to say.
_TRY = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
expressions, names = json.load(sys.stdin)
for index, (expression, method) in enumerate(expressions):
    print(index, flush=True)
    try:
        match = getattr(re.compile(expression), method)
    except (re.error, RecursionError, OverflowError, ValueError):
        continue
    for name in names:
        match(name)
"""


class _Expression(NamedTuple):
    text: str  # as in the config
    form: str  # what PEFT makes of it, with {} in its place
    method: str = "match"

    def sent(self) -> tuple[str, str]:
        return self.form.replace("{}", self.text), self.method


def check_expressions(config: Mapping[str, Any], module_names: Iterable[str]) -> None:
    """Check that PEFT can match every regular expression of a config with every module of a model.

    Starts a process, unless all of them are plain names.
    Raises: PatternError for one that takes more than 5 seconds.
    """
    found = [expression for expression in _expressions(config) if not is_literal(expression.text)]
    if not found:
        return
    sent = json.dumps([[expression.sent() for expression in found], list(module_names)])
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRY], input=sent.encode(), capture_output=True, timeout=_SECONDS
        )
        failed, tried = child.returncode != 0, child.stdout
    except subprocess.TimeoutExpired as stopped:
        failed, tried = True, stopped.stdout or b""
    except OSError as error:
        raise PatternError(
            f"The config has regular expressions, such as {shown(found[0].text)}, and no process can be started to try "
            f"whether they end: {error}. List the names of modules instead."
        ) from error
    if failed:
        text = found[int((tried.split() or [b"0"])[-1])].text
        raise PatternError(
            f"The regular expression {shown(text)} of the adapter's config takes too long for the names of the base "
            f"model's modules. Write it without repetitions inside repetitions, or list the modules' names."
        )


def _expressions(config: Mapping[str, Any]) -> list[_Expression]:
    """What PEFT reads as regular expressions in a config, and how it matches them."""
    targets = [config.get(name) for name in ("target_modules", "exclude_modules")]  # lists of them are names
    found = [_Expression(text, "{}", "fullmatch") for text in targets if isinstance(text, str)]
    layers = config.get("layers_pattern")
    forms = {
        r"(^|.*\.){}($|\..*)": config.get("modules_to_save"),
        r"(?:^|.*?\.){}\.(?P<idx>\d+)\.": [layers] if isinstance(layers, str) else layers,
    }
    for form, texts in forms.items():
        found += [_Expression(text, form) for text in _strings(texts)]
    for name in ("rank_pattern", "alpha_pattern"):
        found += [_Expression(text, r"(.*\.)?({})$") for text in _strings(config.get(name))]
    return found


def _strings(values: Any) -> list[str]:
    """The strings of a list, or of the keys of an object; a config may hold anything."""
    return [value for value in values if isinstance(value, str)] if isinstance(values, list | set | dict) else []

"""Hydra for the tools: recipes, groups, literal values, one voice for all ranks."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_star.config.strict import parse
from nemo_star.runtime.launch import quiet_unless_first

PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = PROJECT_ROOT / "recipes"
CONF = PROJECT_ROOT / "conf"
_HYDRA_OVERRIDES = (
    # Hydra keeps a folder with a log per run by default; a tool leaves nothing behind.
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)

Config = TypeVar("Config")


class GroupsSearchPath(SearchPathPlugin):
    """Finds the groups in conf/ for every recipe; `hydra.searchpath` would forbid that one recipe inherits another."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("nemo_star", f"file://{CONF}")


def compose(
    cls: type[Config], arguments: Sequence[str], *, tool: str, literal_keys: Sequence[str] = ()
) -> Config | None:
    """The recipe that a command line asks for, parsed; None where Hydra only had to print (--help, --cfg).

    Args:
        tool: name of its default recipe and of its help text (conf/hydra/help).
        literal_keys: keys whose values on the command line are text, not Hydra values: taken to the letter.

    Raises:
        ValueError: keys or values that `cls` refuses.
        SystemExit: Hydra could not compose; it has said why.
    """
    Plugins.instance().register(GroupsSearchPath)
    if not OmegaConf.has_resolver("project"):
        OmegaConf.register_new_resolver("project", lambda: str(PROJECT_ROOT))
    if {"-m", "--multirun"} & set(arguments):
        raise ValueError("--multirun is not supported: start the tool once for each setting")
    composed: list[DictConfig] = []
    main = hydra.main(version_base="1.3", config_path=str(RECIPES), config_name=tool)(composed.append)
    quoted = [quote_literal(argument, literal_keys) for argument in arguments]
    argv, sys.argv = sys.argv, [sys.argv[0], *quoted, *_HYDRA_OVERRIDES, f"hydra/help={tool}"]
    try:
        with quiet_unless_first():
            main()
    finally:
        sys.argv = argv
    if not composed:
        return None
    try:
        values: Any = OmegaConf.to_container(composed[0], resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(str(error)) from error
    return parse(cls, values)


def quote_literal(argument: str, literal_keys: Sequence[str]) -> str:
    """`key=text` as an override that gives the key exactly this text, whatever Hydra's grammar would make of it."""
    key, separator, text = argument.partition("=")
    if not separator or key.lstrip("+") not in literal_keys:
        return argument
    return f"{key}={quote(text)}"


def quote(text: str) -> str:
    """`text` as a quoted string of Hydra's grammar that OmegaConf does not interpolate.

    OmegaConf reads `${` as an interpolation unless a backslash precedes it, and halves the backslashes before it.
    Inside Hydra's quotes, backslashes escape only in front of a quote or at the end, where they are halved too.
    """
    text = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
    text = re.sub(r"(\\+)('|\Z)", lambda found: found[1] * 2 + found[2], text)
    return "'" + text.replace("'", r"\'") + "'"


def compose_group(cls: type[Config], group: str, name: str) -> Config:
    """One choice of a group in conf/, parsed, for a program that has no command line to compose."""
    with hydra.initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        values: Any = OmegaConf.to_container(hydra.compose(overrides=[f"+{group}={name}"])[group])
    return parse(cls, values)

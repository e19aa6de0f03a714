"""Hydra for the tools: recipes, groups, literal values, one voice for all ranks."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_star.config.help import describe_keys
from nemo_star.config.strict import parse
from nemo_star.runtime.launch import quiet_unless_first
from nemo_star.runtime.locations import checkout, data_folder
from nemo_star.runtime.program import started_as

RECIPES = data_folder("recipes")
CONF = data_folder("conf")
_HYDRA_OVERRIDES = (
    # Hydra keeps a folder with a log per run by default; a tool leaves nothing behind.
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)
_FLAGS_WITH_VALUE = frozenset("--cfg -c --config-name -cn --config-dir -cd --config-path -cp --package -p".split())
_RESOLVING = "ValueError raised while resolving interpolation: "

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
        tool: name of its default recipe and of its help text (conf/hydra/help), to which the keys of `cls` are added.
        literal_keys: keys whose values on the command line are text, not Hydra values: taken to the letter.

    Raises:
        ValueError: keys or values that `cls` refuses.
        SystemExit: Hydra could not compose; it has said why.
    """
    Plugins.instance().register(GroupsSearchPath)
    if not OmegaConf.has_resolver("project"):
        OmegaConf.register_new_resolver("project", _project)
    if {"-m", "--multirun"} & set(arguments):
        raise ValueError("--multirun is not supported: start the tool once for each setting")
    composed: list[DictConfig] = []
    main = hydra.main(version_base="1.3", config_path=str(RECIPES), config_name=tool)(composed.append)
    overrides = [quote_literal(argument, literal_keys) for argument in arguments]
    own = [*_HYDRA_OVERRIDES, f"hydra/help={tool}"]
    if {"-h", "--help"} & set(arguments):
        own += _help_overrides(cls, tool)
    first = _first_override(overrides)
    overrides[first:first] = own  # argparse takes positional arguments from one place only, flags before or after it
    argv, sys.argv = sys.argv, [sys.argv[0], *overrides]
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
        reason = str(error).splitlines()[0]  # what follows is about OmegaConf's own types
        raise ValueError(f"{error.full_key}: {reason.removeprefix(_RESOLVING)}") from error
    return parse(cls, values)


def _first_override(arguments: Sequence[str]) -> int:
    """The place of the first argument that is neither a flag of Hydra's nor what one takes; without any, the end."""
    for place, (before, argument) in enumerate(zip(("", *arguments), arguments, strict=False)):
        if not argument.startswith("-") and before not in _FLAGS_WITH_VALUE:
            return place
    return len(arguments)


def _project() -> str:
    """`${project:}` in a recipe: the folder of the checkout, whose files the demo's recipes name."""
    folder = checkout()
    if folder is None:
        raise ValueError(
            "this recipe names files of a checkout, and nemo_star is installed without one: give checkpoint=DIR and "
            "context_file=FILE"
        )
    return str(folder)


def _help_overrides(cls: type, tool: str) -> list[str]:
    """What conf/hydra/help/<tool>.yaml leaves open: how this process was started, and the keys of `cls`."""
    alone, under_torchrun = started_as(tool.replace("_", "-"))
    texts = {"app_name": alone, "header": under_torchrun, "footer": describe_keys(cls, groups=CONF)}
    # Hydra fills in the template by string.Template, to which a dollar is the start of a name.
    return [f"hydra.help.{name}={quote(text.replace('$', '$$'))}" for name, text in texts.items()]


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

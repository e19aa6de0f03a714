"""Record what the project calls of Transformer Engine, release by release, from given wheels or source archives.

    python tools/te_signatures.py transformer_engine-*.whl > tests/data/te_signatures.json

Nothing is installed, imported or downloaded: the Python sources in the archives are parsed. Archives come from
`pip download --no-deps transformer-engine==VERSION` (the plain wheel holds transformer_engine/pytorch).
"""

import argparse
import ast
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_star.runtime.launch import run_as_tool

FUNCTIONS = {
    "DotProductAttention": "pytorch/attention/dot_product_attention/dot_product_attention.py",
    "fused_attn_fwd": "pytorch/cpp_extensions/fused_attn.py",
    # What Megatron builds of it on our behalf.
    "Linear": "pytorch/module/linear.py",
    "LayerNormLinear": "pytorch/module/layernorm_linear.py",
    "RMSNorm": "pytorch/module/rmsnorm.py",
    "apply_rotary_pos_emb": "pytorch/attention/rope.py",
}
NAMES = {
    "FusedAttnBackend": "pytorch/cpp_extensions/fused_attn.py",
    "QKVLayout": "pytorch/cpp_extensions/fused_attn.py",
    "AttnBiasType": "pytorch/cpp_extensions/fused_attn.py",
    "AttnMaskType": "pytorch/cpp_extensions/fused_attn.py",
    "AttnMaskTypes": "pytorch/constants.py",
}
"""Tables of words that a call may use: a dictionary, an enum or a tuple."""
METHODS = ("__init__", "forward")


def files_of(archive: Path) -> Iterator[tuple[str, str]]:
    """(path, text) of the Python files and metadata in a wheel or a source archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if name.endswith((".py", "METADATA")):
                    yield name, wheel.read(name).decode()
        return
    with tarfile.open(archive) as source:
        for member in source:
            file = source.extractfile(member) if member.name.endswith((".py", "PKG-INFO")) else None
            if file:
                yield member.name, file.read().decode()


def parameters(function: ast.FunctionDef) -> list[list[Any]]:
    """[name, kind as in inspect.Parameter, whether it has a default] of each parameter."""
    spec = function.args
    positional = [*spec.posonlyargs, *spec.args]
    required = len(positional) - len(spec.defaults)
    rows: list[list[Any]] = []
    for index, argument in enumerate(positional):
        kind = "POSITIONAL_ONLY" if index < len(spec.posonlyargs) else "POSITIONAL_OR_KEYWORD"
        rows.append([argument.arg, kind, index >= required])
    if spec.vararg:
        rows.append([spec.vararg.arg, "VAR_POSITIONAL", False])
    for argument, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True):
        rows.append([argument.arg, "KEYWORD_ONLY", default is not None])
    if spec.kwarg:
        rows.append([spec.kwarg.arg, "VAR_KEYWORD", False])
    return rows


def words(value: ast.AST) -> list[str]:
    """The words of a table: keys of a dictionary, members of an enum, items of a tuple."""
    if isinstance(value, ast.Dict):
        return [key.value for key in value.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
    if isinstance(value, ast.ClassDef):
        assignments = [item for item in value.body if isinstance(item, ast.Assign)]
        return [target.id for item in assignments for target in item.targets if isinstance(target, ast.Name)]
    return [item.value for item in ast.walk(value) if isinstance(item, ast.Constant) and isinstance(item.value, str)]


def record(archive: Path) -> tuple[str, dict[str, Any]]:
    """(version, signatures and tables) of one release.

    Raises:
        ValueError: the archive is not one of Transformer Engine, or has changed beyond recognition.
    """
    trees: dict[str, ast.Module] = {}
    version = None
    for name, text in files_of(archive):
        if name.endswith(("METADATA", "PKG-INFO")) and version is None:
            version = next(line.split()[1] for line in text.splitlines() if line.startswith("Version:"))
        for path in {*FUNCTIONS.values(), *NAMES.values()}:
            if name.endswith(f"transformer_engine/{path}"):
                trees[path] = ast.parse(text)
    found: dict[str, Any] = {}
    for path, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and FUNCTIONS.get(node.name) == path:
                found[node.name] = parameters(node)
            elif isinstance(node, ast.ClassDef) and FUNCTIONS.get(node.name) == path:
                methods = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name in METHODS]
                found |= {f"{node.name}.{method.name}": parameters(method) for method in methods}
            elif isinstance(node, ast.ClassDef) and NAMES.get(node.name) == path:
                found[node.name] = words(node)
            elif isinstance(node, ast.Assign) and NAMES.get(ast.unparse(node.targets[0])) == path:
                found[ast.unparse(node.targets[0])] = words(node.value)
    missing = [name for name in (*FUNCTIONS, *NAMES) if not {name, f"{name}.__init__"} & set(found)]
    if version is None or missing:
        raise ValueError(f"{archive}: found no {', '.join(missing) or 'version'} in it")
    return version, dict(sorted(found.items()))


def as_text(releases: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for each signature and table, so that a difference between releases shows as one line."""
    blocks = []
    for version, found in releases.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in found.items()]
        blocks.append(f" {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("archives", nargs="+", type=Path, help="wheels or source archives of transformer-engine")
    releases = dict(record(archive) for archive in parser.parse_args().archives)
    ordered = sorted(releases, key=lambda version: [int(part) for part in version.split(".") if part.isdigit()])
    print(as_text({version: releases[version] for version in ordered}))
    return 0


if __name__ == "__main__":
    run_as_tool(main)

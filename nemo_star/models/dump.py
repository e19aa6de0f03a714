"""Each layer's output of one request on disk, to find where two runs part.

A file is one forward pass of one rank: `positions` [s] int64 and `layer_N` [s, h] for the layers of its stage, with the
phase as metadata, and how many of the first tokens run again with a block that is not theirs. What is the same on
several ranks is written by the first of them. Files are read by position id, so that runs at different layouts, block
sizes or methods can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_star.attention.step import AttentionState, PrefillStep
from nemo_star.models.stage import Stage
from nemo_star.parallel.groups import Groups

Outputs = dict[tuple[str, str], dict[int, Tensor]]
"""(phase, layer) -> position -> output [h]."""


class LayerDump:
    """Writes the passes of one stage until `close`.

    Raises:
        ValueError: the folder exists; on each rank that writes.
    """

    def __init__(self, folder: Path, stage: Stage, state: AttentionState, groups: Groups) -> None:
        self._folder = folder
        self._state = state
        state.completes_prefill = True
        self._groups = groups
        self._pass = 0
        self._tensors: dict[str, Tensor] = {}
        layers = stage.model.decoder.layers
        self._hooks = [stage.rotary.register_forward_pre_hook(self._begin)]
        for layer in layers:
            name = f"layer_{layer.layer_number}"
            self._hooks.append(layer.register_forward_hook(lambda *given, name=name: self._keep(name, given[-1])))
        self._hooks.append(layers[-1].register_forward_hook(lambda *_: self._write()))

    def close(self) -> None:
        self._state.completes_prefill = False
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        self._tensors = {"positions": arguments[0].cpu()}

    def _keep(self, name: str, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self._tensors[name] = hidden[:, 0].detach().cpu().contiguous()

    def _write(self) -> None:
        self._pass += 1
        step = self._state.step
        phase = "prefill" if isinstance(step, PrefillStep) else "decode"
        again = len(self._tensors["positions"]) - step.block.tokens if isinstance(step, PrefillStep) else 0
        groups = self._groups
        if groups.tp.rank() or (phase == "decode" and groups.cp.rank()):
            return
        name = f"{self._pass:06d}.{phase}.pp{groups.pp.rank()}.cp{groups.cp.rank()}.safetensors"
        save_file(self._tensors, self._folder / name, metadata={"phase": phase, "again": str(again)})


def read_dump(folder: Path) -> Outputs:
    """All outputs of a folder. A position that ran more than once (a recomputed anchor, an overlap) counts as it ran
    with its own block.

    Raises:
        ValueError: the folder holds no dump.
    """
    found: Outputs = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            phase, again = stored.metadata()["phase"], int(stored.metadata()["again"])
            positions = stored.get_tensor("positions").tolist()[again:]
            for name in set(stored.keys()) - {"positions"}:
                rows = found.setdefault((phase, name), {})
                for position, output in zip(positions, stored.get_tensor(name)[again:], strict=True):
                    rows.setdefault(position, output)
    if not found:
        raise ValueError(f"{folder} holds no dump: make one with nemo-star generate debug.dump={folder}")
    return found


def compare_dumps(first: Outputs, second: Outputs) -> Iterator[tuple[str, str, int, float, float, int]]:
    """For each phase and layer that both have: (phase, layer, positions in both, largest and mean absolute difference,
    the position of the largest)."""
    for phase, layer in sorted(first.keys() & second.keys(), key=lambda key: (key[0] != "prefill", int(key[1][6:]))):
        a, b = first[phase, layer], second[phase, layer]
        shared = sorted(a.keys() & b.keys())
        if shared:
            one, other = (torch.stack([rows[position] for position in shared]).double() for rows in (a, b))
            difference = (one - other).abs()
            worst = int(difference.amax(dim=1).argmax())
            yield phase, layer, len(shared), float(difference.max()), float(difference.mean()), shared[worst]

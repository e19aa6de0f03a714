"""What stands in a CUDA graph's place on CPU: operations of torch, recorded once and run again on the same tensors.

As in a graph, nothing of Python runs again: a number that was read on the host, or copied from it, is that of the
recording. What a graph could not hold is refused.
"""

import torch
from torch.distributed import Work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REFUSED = ("aten.item", "aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal")
"""They bring a number of the device to the host."""


class RecordedStep:
    """`engine/graphs.py: StepGraph`."""

    def __init__(self):
        self.calls = []
        self.replays = 0

    def record(self, run):
        with _Recorder(self.calls):
            return run()

    def replay(self):
        self.replays += 1
        for function, arguments, keywords, results in self.calls:
            again = function(*arguments, **keywords)
            for result, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(new, torch.Tensor) and not _share(result, new):
                    result.copy_(new)
                elif isinstance(new, torch.ScriptObject):
                    Work.unbox(new).wait()


class _Recorder(TorchDispatchMode):
    def __init__(self, calls):
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not str(function).startswith(REFUSED), f"{function} in a step that is recorded"
        # A list of Python's becomes a tensor; a single number (Megatron's `masked_input[mask] = 0`) goes with a kernel.
        assert str(function) != "aten.lift_fresh.default" or args[0].dim() == 0, "a copy from the host"
        results = function(*args, **(kwargs or {}))
        self._calls.append((function, args, kwargs or {}, results))
        return results


def _share(one, other):
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()

import importlib.util
import json
import sys

import pytest
from golden import GOLDEN
from launch import ROOT
from safetensors.torch import load_file


@pytest.fixture(scope="session")
def golden_cases():
    """Recorded cases of the published reference, by id; README beside the data."""
    return {case["id"]: case for case in json.loads((GOLDEN / "cases.json").read_text())}


@pytest.fixture(scope="session")
def golden_logits():
    return load_file(GOLDEN / "logits.safetensors")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The golden data's model (256 tokens of vocabulary, no tokenizer), converted."""
    from nemo_star.checkpoint.convert import import_checkpoint

    target = tmp_path_factory.mktemp("tiny") / "checkpoint"
    import_checkpoint(GOLDEN / "models" / "tiny-a", target)
    return target


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The bundled demo model, converted."""
    from nemo_star.checkpoint.convert import import_checkpoint

    target = tmp_path_factory.mktemp("demo") / "checkpoint"
    import_checkpoint(ROOT / "assets" / "demo_model", target)
    return target


@pytest.fixture(scope="session")
def groups():
    """Process groups of one process, for tests in the test process."""
    from nemo_star.parallel.groups import create_groups, initialize_alone
    from nemo_star.parallel.layout import Layout

    initialize_alone()
    return create_groups(Layout(tp=1, cp=1, dp=1, pp=1))


def pytest_configure():
    """Models in the test process are on CPU: Megatron goes without Transformer Engine there, where one is installed."""
    if importlib.util.find_spec("transformer_engine") is not None:
        sys.modules["transformer_engine"] = None


@pytest.fixture(scope="session")
def transformer_engine():
    """(what was found, the package): for kernels, which want no Megatron; hidden again outside of them."""
    from nemo_star.runtime.transformer_engine import find_transformer_engine

    hidden = sys.modules.pop("transformer_engine", "nothing hidden") is None
    found, package = find_transformer_engine(), sys.modules.get("transformer_engine")
    if hidden:
        sys.modules["transformer_engine"] = None
    return found, package


def pytest_collection_modifyitems(items):
    import torch

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for name, usual in (("gpu", 1), ("multigpu", 2)):
        for item in items:
            marker = item.get_closest_marker(name)
            needed = marker.args[0] if marker and marker.args else usual
            if marker and devices < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), found {devices}"))

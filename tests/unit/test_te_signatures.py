"""tools/te_signatures.py on archives made here."""

import io
import json
import tarfile
import zipfile

import pytest
from launch import ROOT, run_tool

TOOL = ROOT / "tools/te_signatures.py"
SOURCES = {
    "pytorch/attention/dot_product_attention/dot_product_attention.py": (
        "class DotProductAttention(Base):\n"
        "    def __init__(self, heads: int, scale=None, *, name: str = 'a', **more): ...\n"
        "    def forward(self, q, /, k): ...\n"
        "    def other(self): ...\n"
    ),
    "pytorch/cpp_extensions/fused_attn.py": (
        "from elsewhere import *\n"
        "QKVLayout = {'sbhd_sbhd_sbhd': X.Y}\n"
        "AttnBiasType = {'no_bias': X.Z}\n"
        "AttnMaskType = {'no_mask': X.M, 'causal': X.C}\n"
        "class FusedAttnBackend(IntEnum):\n    FP8 = int(1)\n    F16_arbitrary_seqlen = int(2)\n"
        "def fused_attn_fwd(is_training, q, *rest, window=(-1, -1)): ...\n"
    ),
    "pytorch/constants.py": "AttnMaskTypes = ('no_mask', 'causal')\n",
    "pytorch/module/linear.py": "class Linear:\n    def __init__(self, inputs): ...\n",
    "pytorch/module/layernorm_linear.py": "class LayerNormLinear:\n    def __init__(self, inputs): ...\n",
    "pytorch/module/rmsnorm.py": "class RMSNorm:\n    def __init__(self, size=None): ...\n",
    "pytorch/attention/rope.py": "def apply_rotary_pos_emb(t, freqs): ...\n",
}
METADATA = "Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.10.1\n"


@pytest.fixture(params=["wheel", "sdist"])
def archive(request, tmp_path):
    files = {f"transformer_engine/{path}": text for path, text in SOURCES.items()}
    if request.param == "wheel":
        path = tmp_path / "transformer_engine-2.10.1-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for name, text in {**files, "transformer_engine-2.10.1.dist-info/METADATA": METADATA}.items():
                wheel.writestr(name, text)
        return path
    path = tmp_path / "transformer_engine-2.10.1.tar.gz"
    with tarfile.open(path, "w:gz") as source:
        for name, text in {**files, "PKG-INFO": METADATA}.items():
            member = tarfile.TarInfo(f"transformer_engine-2.10.1/{name}")
            member.size = len(text)
            source.addfile(member, io.BytesIO(text.encode()))
    return path


def test_signatures_and_words_are_read_from_the_sources(archive):
    done = run_tool(TOOL, archive)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["2.10.1"]
    assert found["DotProductAttention.__init__"] == [
        ["self", "POSITIONAL_OR_KEYWORD", False],
        ["heads", "POSITIONAL_OR_KEYWORD", False],
        ["scale", "POSITIONAL_OR_KEYWORD", True],
        ["name", "KEYWORD_ONLY", True],
        ["more", "VAR_KEYWORD", False],
    ]
    assert found["DotProductAttention.forward"][:2] == [
        ["self", "POSITIONAL_ONLY", False],
        ["q", "POSITIONAL_ONLY", False],
    ]
    assert found["fused_attn_fwd"][2:] == [["rest", "VAR_POSITIONAL", False], ["window", "KEYWORD_ONLY", True]]
    assert found["AttnMaskType"] == found["AttnMaskTypes"] == ["no_mask", "causal"]
    assert found["FusedAttnBackend"] == ["FP8", "F16_arbitrary_seqlen"]
    assert "DotProductAttention.other" not in found


def test_another_package_is_refused(tmp_path):
    path = tmp_path / "other.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("other/__init__.py", "")
    done = run_tool(TOOL, path)
    assert done.returncode == 1
    assert "other.whl: found no DotProductAttention, fused_attn_fwd" in done.stderr

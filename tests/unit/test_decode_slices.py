"""What sharded decode divides: said, or by the estimate."""

import pytest

from nemo_star.config.model import ModelConfig
from nemo_star.parallel.decode_slices import sliced_matrices, weight_elements_read
from nemo_star.parallel.layout import Layout


def model(hidden, ffn, heads=8, groups=2):
    return ModelConfig(8, hidden, heads, groups, ffn, 32000)


SMALL, WIDE = model(512, 2048), model(2048, 8192)
LLAMA_8B, LLAMA_70B = model(4096, 14336, 32, 8), model(8192, 28672, 64, 8)
FFN = {"ffn", "head"}
ALL = {"ffn", "head", "projection"}


@pytest.mark.parametrize(
    ("decode", "shape", "layout", "device", "parts"),
    [
        ("replicated", WIDE, Layout(1, 2, 1, 1), "cpu", set()),
        ("sharded", WIDE, Layout(1, 1, 1, 1), "cpu", set()),  # nobody to divide with
        ("sharded", SMALL, Layout(1, 2, 1, 1), "cpu", FFN),
        ("sharded", SMALL, Layout(2, 2, 1, 1), "cpu", ALL),
        (None, SMALL, Layout(1, 2, 1, 1), "cpu", set()),  # measured slower: BENCHMARKS.md
        (None, WIDE, Layout(1, 2, 1, 1), "cpu", FFN),  # measured faster
        (None, LLAMA_8B, Layout(1, 4, 1, 1), "cuda", FFN),
        (None, LLAMA_8B, Layout(8, 8, 1, 1), "cuda", set()),  # 64 ranks for 19 MB of a layer's FFN
        (None, LLAMA_70B, Layout(1, 2, 1, 1), "cuda", ALL),
    ],
)
def test_what_is_divided(decode, shape, layout, device, parts):
    itemsize = 4 if device == "cpu" else 2
    assert sliced_matrices(decode, shape, layout, itemsize=itemsize, device_type=device) == parts


def test_what_a_token_reads():
    qkv, projection, ffn = 2048 * (2048 + 2 * 512), 2048 * 2048, 3 * 2048 * 8192
    layout = Layout(1, 2, 1, 1)
    assert weight_elements_read(WIDE, layout, frozenset()) == 8 * (qkv + projection + ffn)
    assert weight_elements_read(WIDE, layout, frozenset(FFN)) == 8 * (qkv + projection + ffn / 2)
    assert weight_elements_read(WIDE, Layout(2, 2, 1, 1), frozenset(ALL)) == 4 * (qkv + projection / 2 + ffn / 2)

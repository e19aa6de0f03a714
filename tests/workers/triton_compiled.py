"""Worker of test_triton.py: compiles the Triton kernels for GPUs that need not be here, down to machine code.

Prints JSON rows: for what, bytes of shared memory, whether float8 is converted by the device's own instruction.
"""

import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nemo_star.kernels.triton_decode import BYTES, attend_stretch, padded_to, tile
from nemo_star.kernels.triton_merge import merge_row

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
DECODE = [
    # capability, q, K/V, hn, rows, causal
    (80, torch.bfloat16, None, 128, 4, False),
    (80, torch.bfloat16, torch.float8_e4m3fn, 128, 4, False),
    (86, torch.bfloat16, None, 256, 64, True),
    (89, torch.float16, torch.float8_e4m3fn, 80, 64, True),
    (90, torch.bfloat16, None, 128, 64, True),
    (90, torch.bfloat16, torch.float8_e4m3fn, 128, 4, False),
    (90, torch.bfloat16, torch.float8_e5m2, 128, 4, False),
    (100, torch.bfloat16, None, 128, 64, True),
    (120, torch.bfloat16, torch.float8_e4m3fn, 256, 64, True),
]
MERGE = [(80, torch.bfloat16, False), (90, torch.float16, True)]


def compiled(kernel, types, constants, capability):
    """Every pointer and stride a multiple of 16, as most are.

    Args:
        types: of the arguments that are no constants, by name.
    """
    names = kernel.arg_names
    lengths = ("sq", "sk", "keys", "partials", "heads")
    aligned = [name for name in types if types[name] != "fp32" and name not in lengths]
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


def decode(capability, queries, stored, channels, rows, causal):
    rows_tile, keys_tile = tile(rows, channels)
    how = "same" if stored is None else BYTES[stored]
    constants = {"groups": 8, "group": 4, "channels": channels, "padded": padded_to(channels), "causal": causal}
    constants |= {"rows_tile": rows_tile, "keys_tile": keys_tile}
    constants["stored"] = "e4m3 bits" if how == "e4m3" and capability < 89 else how
    kv = f"*{NAMES[queries]}" if stored is None else "*u8"
    types = {"q": f"*{NAMES[queries]}", "k": kv, "v": kv, "outs": "*fp32", "lses": "*fp32", "log2_scale": "fp32"}
    types |= {name: "i32" for name in attend_stretch.arg_names if name not in types | constants}
    code = compiled(attend_stretch, types, constants, capability)
    row = {"kernel": "decode", "capability": capability, "queries": str(queries), "stored": constants["stored"]}
    own = "e4m3x2" in code.asm["ptx"]
    return {**row, "channels": channels, "shared": code.metadata.shared, "own": own, "bytes": len(code.asm["cubin"])}


def merge(capability, dtype, has_sinks):
    constants = {"channels": 128, "padded": 128, "at_once": 4, "has_sinks": has_sinks}
    types = {"outs": "*fp32", "lses": "*fp32", "sinks": "*fp32", "out": f"*{NAMES[dtype]}", "lse": "*fp32"}
    types |= {name: "i32" for name in merge_row.arg_names if name not in types | constants}
    code = compiled(merge_row, types, constants, capability)
    return {
        "kernel": "merge",
        "capability": capability,
        "shared": code.metadata.shared,
        "bytes": len(code.asm["cubin"]),
    }


def main():
    print(json.dumps([*(decode(*case) for case in DECODE), *(merge(*case) for case in MERGE)]))


if __name__ == "__main__":
    main()

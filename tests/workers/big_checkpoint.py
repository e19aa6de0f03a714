"""A random Llama checkpoint of about 8 GB in 16 files, for measuring conversion: big_checkpoint.py FOLDER [LAYERS]."""

import json
import sys
from functools import partial
from pathlib import Path

import torch

from nemo_star.checkpoint.hf import INDEX_FILE
from nemo_star.checkpoint.safetensors_file import TensorToWrite, write_file

HIDDEN, FFN, VOCABULARY, HEADS, KV_HEADS, SHARDS = 4096, 14336, 65536, 32, 8, 16


def shapes(layers):
    """Name -> shape, as Llama 3 8B has them but for layers and vocabulary."""
    kv = HIDDEN // HEADS * KV_HEADS
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", kv, HIDDEN),
            ("self_attn.v_proj", kv, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", FFN, HIDDEN),
            ("mlp.up_proj", FFN, HIDDEN),
            ("mlp.down_proj", HIDDEN, FFN),
        ):
            yield f"{prefix}{name}.weight", (rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def main(folder, layers=16):
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(-(2**63), 2**63 - 1, (2**24,), dtype=torch.int64, generator=generator).view(torch.uint8)

    def make(shape, seed):
        size = 2 * torch.Size(shape).numel()
        raw = noise.roll(seed * 8).repeat(-(-size // noise.numel()))[:size] & 0x3F  # no NaN among them
        return raw.view(torch.bfloat16).view(shape)

    tensors = [
        TensorToWrite(name, torch.bfloat16, shape, partial(make, shape, seed))
        for seed, (name, shape) in enumerate(shapes(layers))
    ]
    total = left = sum(tensor.size for tensor in tensors)
    shards, room = [], 0
    for tensor in tensors:
        if room < tensor.size / 2:
            room = left / (SHARDS - len(shards))
            shards.append([])
        shards[-1].append(tensor)
        room -= tensor.size
        left -= tensor.size
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with open(folder / file, "wb") as stream:
            write_file(stream, shard, lambda: None)
        weight_map |= {tensor.name: file for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    print(f"{folder}: {total / 1e9:.2f} GB in {len(shards)} files")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))

"""Star Attention in a GPTModel that you build yourself, after your own initialisation of Megatron.

    torchrun --nproc-per-node 2 docs/own_model.py

Random weights; prints the generated token ids, the same for any number of processes.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_star.engine.build import attention_state, engine_around
from nemo_star.engine.engine import Engine
from nemo_star.methods.config import AttentionConfig
from nemo_star.models.build import star_layer_spec
from nemo_star.models.rotary import PositionRotaryEmbedding
from nemo_star.parallel.groups import groups_from_parallel_state

VOCAB_SIZE = 128


def build_engine() -> Engine:
    groups = groups_from_parallel_state()
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        normalization="RMSNorm",
        attention_dropout=0.0,
        use_cpu_initialization=True,
        transformer_impl="local",  # on a GPU with Transformer Engine: leave it, and give 16-bit types
        cuda_graph_scope=[],
    )
    # Shared by the layers (through the spec) and the engine that steers them. To divide decode over the cp ranks:
    # divides_decode=True.
    state = attention_state(AttentionConfig(block_size=64), groups, device=torch.device("cpu"), dtype=torch.float32)
    torch.manual_seed(0)
    model = GPTModel(
        config,
        star_layer_spec(config, state),
        vocab_size=VOCAB_SIZE,
        max_sequence_length=4096,
        position_embedding_type="none",  # the engine gives the layers their rotary angles
        pg_collection=groups.collection,
    ).eval()
    rotary = PositionRotaryEmbedding(config.kv_channels, base=10000.0)
    return engine_around(model, state, groups, rotary=rotary, vocab_size=VOCAB_SIZE)


def main() -> None:
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(context_parallel_size=dist.get_world_size())
    engine = build_engine()
    context = engine.encode([i * i % VOCAB_SIZE for i in range(300)])
    steps = engine.generate(context, [5, 6, 7], max_tokens=8, choose=lambda logits: (int(logits.argmax()), False))
    tokens = [step.token for step in steps]
    if dist.get_rank() == 0:
        print(*tokens)


if __name__ == "__main__":
    main()
    dist.barrier()
    dist.destroy_process_group()

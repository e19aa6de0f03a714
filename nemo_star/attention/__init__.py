"""Attention methods behind Megatron's `core_attention` socket."""

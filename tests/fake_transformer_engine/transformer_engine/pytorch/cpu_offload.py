import contextlib


def get_cpu_offload_context(enabled, *_):
    assert not enabled
    return contextlib.nullcontext(), lambda tensor: tensor

import contextlib

fp8_autocast = fp8_model_init = contextlib.nullcontext  # Megatron imports both together, from 0.19 on


class FP8GlobalStateManager:
    pass

class QuantizedTensor:
    """Only a name: Megatron asks whether weights are of this type."""

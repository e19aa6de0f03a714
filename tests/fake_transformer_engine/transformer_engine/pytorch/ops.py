class Sequential:
    """Only a name: Megatron annotates with it."""


FusibleOperation = Sequential

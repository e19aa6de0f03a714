import torch

from nemo_star.attention.cache import KVCache, KVShape


def kv(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 1, 2, 4, generator=generator), torch.randn(tokens, 1, 2, 4, generator=generator)


def test_append_keeps_order_and_truncate_rolls_back():
    cache = KVCache(capacity=6)
    first, second, third = kv(4, 1), kv(2, 2), kv(2, 3)
    cache.append(1, *first)
    cache.append(1, *second)
    assert torch.equal(cache.get(1)[0], torch.cat((first[0], second[0])))
    cache.truncate(4)
    cache.append(1, *third)
    assert torch.equal(cache.get(1)[1], torch.cat((first[1], third[1])))
    assert cache.tokens == 6
    assert cache.nbytes == 6 * 2 * 2 * 4 * 4


def test_appending_within_the_capacity_does_not_move_the_buffer():
    cache = KVCache(capacity=8)
    cache.append(3, *kv(4))
    before = cache.get(3)[0].data_ptr()
    cache.append(3, *kv(4))
    assert cache.get(3)[0].data_ptr() == before
    cache.append(3, *kv(1))  # more than planned: grows, keeps what it holds
    assert cache.get(3)[0].shape[0] == cache.tokens == 9
    assert torch.equal(cache.get(3)[0][:4], kv(4)[0])


def test_an_untouched_layer_is_none():
    cache = KVCache(dtype=torch.bfloat16)
    cache.append(1, *kv(3))
    assert cache.get(1)[0].dtype == torch.bfloat16
    assert cache.get(2) is None


def test_reserved_buffers_are_used_and_empty():
    cache = KVCache(capacity=6)
    cache.reserve([1, 2], KVShape(1, 2, 4, torch.float32, torch.device("cpu")))
    assert cache.get(1) is None
    assert cache.tokens == 0
    places = [layer.k.data_ptr() for layer in cache._layers.values()]
    cache.append(2, *kv(6))
    assert cache.get(2)[0].data_ptr() == places[1]

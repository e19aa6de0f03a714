"""A random walk over the texts of a store, for one process and for the ranks of a worker."""

import gc
import random

import torch

from nemo_star.attention.cache import KVCache
from nemo_star.contexts.store import ContextStore
from nemo_star.engine.context import EncodedContext
from nemo_star.engine.engine import finished

QUERY = [3, 4, 5]


def text(seed, tokens):
    return random.Random(seed).choices(range(3, 131), k=tokens)


def answer(engine, context):
    """Logits after the query, on the first rank."""
    logits = engine.decode([(engine.sequence(context), QUERY)])
    return torch.zeros(1) if logits is None else logits[0]


def opened(store, ids, **options):
    """A context of the store, complete and kept; and whether anything was encoded."""
    found = store.open(ids, **options)
    assert found is not None, "no room"
    if isinstance(found, EncodedContext):
        return found, 0
    steps = found.steps_left
    context = finished(found)
    assert store.keep(context, **options)
    return context, steps


def live_bytes():
    """K/V of all caches that are alive on this rank."""
    return sum(each.nbytes for each in gc.get_objects() if type(each) is KVCache)


def walk(engine, folder, *, steps=20):
    """Questions on five texts (one begins as another does) in random order, in a store with room for two; the largest
    difference to contexts encoded for the purpose, and how often the store had to encode."""
    texts = [text(seed, 120 + 10 * seed) for seed in range(4)]
    texts.append(texts[0] + text(9, 60))
    expected = [answer(engine, engine.encode(ids)) for ids in texts]
    gc.collect()  # caches in the garbage of tests before this one, which may be collected at any time
    before = live_bytes()
    whole = ContextStore(engine, budget_bytes=2**40, fingerprint="weights")
    sizes = []
    for ids in texts:
        opened(whole, ids)
        sizes.append(whole.used_bytes - sum(sizes))
    whole.close()
    budget = sum(sorted(sizes)[-2:])
    store = ContextStore(engine, budget_bytes=budget, fingerprint="weights", folder=folder)
    order, worst, encoded = random.Random(1), 0.0, 0
    for _ in range(steps):
        number = order.randrange(5)
        context, took = opened(store, texts[number])
        encoded += took > 0
        store.pin(context)
        assert context.ids.tolist() == texts[number]
        worst = max(worst, float((answer(engine, context) - expected[number]).abs().max()))
        store.release(context)
        del context
        assert live_bytes() - before <= store.used_bytes <= budget
    store.close()
    assert live_bytes() == before
    return worst, encoded

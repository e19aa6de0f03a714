"""Contexts on disk, in one process: what is written, what is refused."""

import dataclasses
import json
import shutil

import pytest
import torch

from nemo_star import LLM
from nemo_star.checkpoint.description import read_description
from nemo_star.contexts import shard, storage
from nemo_star.contexts.fingerprint import weights_fingerprint
from nemo_star.contexts.index import read_index
from nemo_star.contexts.rows import common_rows, joined
from nemo_star.contexts.storage import load_context, save_context
from nemo_star.engine.engine import finished

CONTEXT = [(7 * i * i + 3 * i) % 251 for i in range(120)]


@pytest.fixture(scope="module")
def engine(tiny):
    return LLM(tiny, attention={"block_size": 32}).engine


@pytest.fixture
def saved(engine, tmp_path):
    save_context(engine, engine.encode(CONTEXT), tmp_path / "book", fingerprint="weights")
    return tmp_path / "book"


def kv(context, engine):
    return [x.clone() for number in engine.stage.layer_numbers for x in context.cache.get(number)]


def change_index(folder, **values):
    file = folder / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_saved_context_comes_back_bit_by_bit(engine, saved):
    context, loaded = engine.encode(CONTEXT), load_context(engine, saved, fingerprint="weights", verify=True)
    assert all(torch.equal(*pair) for pair in zip(kv(context, engine), kv(loaded, engine), strict=True))
    assert loaded.ids.tolist() == CONTEXT
    assert loaded.partition == context.partition
    assert loaded.method.settings == context.method.settings
    assert loaded.cache.tokens == 120
    one, other = (engine.decode([(engine.sequence(each), [3, 4, 5])]) for each in (context, loaded))
    assert torch.equal(one, other)


def test_a_loaded_context_goes_on(engine, saved):
    loaded = load_context(engine, saved, fingerprint="weights")
    finished(engine.extend(loaded, CONTEXT[:50]))
    whole = engine.encode(CONTEXT + CONTEXT[:50])
    one, other = (engine.decode([(engine.sequence(each), [3, 4, 5])]) for each in (whole, loaded))
    assert (one - other).abs().max() <= 5e-4


def test_the_files_are_safetensors(engine, saved):
    from safetensors.torch import load_file

    index = read_index(saved)
    (file,) = index.shards
    tensors = load_file(saved / index.data / file.file)
    shape = engine.stage.kv_shape
    assert set(tensors) == {f"{name}.{number}" for name in "kv" for number in engine.stage.layer_numbers}
    assert tensors["k.1"].shape == (120, shape.groups, shape.channels)
    assert load_file(saved / index.data / "tokens.safetensors")["ids"].tolist() == CONTEXT
    assert file.sha256 == shard.checksum(saved / index.data / file.file)


def test_a_second_save_takes_the_place_of_the_first(engine, saved):
    first = read_index(saved).data
    save_context(engine, engine.encode(CONTEXT[:40]), saved, fingerprint="weights")
    assert load_context(engine, saved, fingerprint="weights").ids.tolist() == CONTEXT[:40]
    assert sorted(file.name for file in saved.iterdir()) == sorted(["index.json", read_index(saved).data])
    assert read_index(saved).data != first


@pytest.mark.parametrize("place", ["write_tensors", "write_index"])
def test_a_full_disk_leaves_the_old_context_and_no_rubbish(engine, saved, monkeypatch, place):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = sorted(saved.rglob("*"))
    monkeypatch.setattr(storage, place, full)
    with pytest.raises(ValueError, match=f"cannot be saved in {saved}.*No space left"):
        save_context(engine, engine.encode(CONTEXT[:40]), saved, fingerprint="weights")
    assert sorted(saved.rglob("*")) == before
    assert load_context(engine, saved, fingerprint="weights", verify=True).ids.tolist() == CONTEXT


def test_a_folder_of_something_else_is_refused(engine, tmp_path):
    (tmp_path / "letter.txt").write_text("Dear")
    with pytest.raises(ValueError, match=r"holds letter\.txt, which belongs to no saved context"):
        save_context(engine, engine.encode(CONTEXT), tmp_path, fingerprint="weights")
    (tmp_path / "letter.txt").unlink()
    context = engine.begin(CONTEXT).context
    with pytest.raises(ValueError, match="is still being encoded"):
        save_context(engine, context, tmp_path, fingerprint="weights")


def test_nothing_saved_is_refused(engine, tmp_path):
    with pytest.raises(ValueError, match=r"holds no saved context: it has no index\.json"):
        load_context(engine, tmp_path, fingerprint="weights")


def test_other_weights_are_refused(engine, saved):
    with pytest.raises(ValueError, match="belongs to other weights .fingerprint weights.*others"):
        load_context(engine, saved, fingerprint="others")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format_version": 7}, "has format version 7, this program reads 1"),
        ({"num_layers": 9}, "of a model with num_layers 9, this one has"),
        ({"kv_channels": 3}, "of a model with kv_channels 3, this one has"),
        ({"dtype": "bfloat16"}, "K/V in bfloat16, this engine caches float32: set cache.dtype=bfloat16"),
        ({"tokens": "many"}, r"index\.json is damaged .tokens='many' must be of type int"),
        ({"attention": {"kind": "comet"}}, "attention.kind='comet' is unknown"),
    ],
)
def test_what_does_not_fit_is_refused(engine, saved, values, message):
    change_index(saved, **values)
    with pytest.raises(ValueError, match=message):
        load_context(engine, saved, fingerprint="weights")


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_comes_back_bit_for_bit_and_is_not_taken_for_another_type(tiny, engine, tmp_path, dtype):
    narrow = LLM(tiny, cache={"dtype": dtype}).engine
    context = narrow.encode(CONTEXT)
    save_context(narrow, context, tmp_path, fingerprint="weights")
    loaded = load_context(narrow, tmp_path, fingerprint="weights", verify=True)
    for number in narrow.stage.layer_numbers:
        for one, other in zip(context.cache.get(number), loaded.cache.get(number), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    told = f"K/V in {dtype}, this engine caches float32: set cache.dtype={dtype}, or encode it again"
    with pytest.raises(ValueError, match=told):
        load_context(engine, tmp_path, fingerprint="weights")


def test_damaged_files_are_refused(engine, saved):
    index = read_index(saved)
    file = saved / index.data / index.shards[0].file
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[-5] ^= 1
    file.write_bytes(flipped)
    load_context(engine, saved, fingerprint="weights")  # sizes are right
    with pytest.raises(ValueError, match=r"has sha256 .*, should have .*damaged"):
        load_context(engine, saved, fingerprint="weights", verify=True)
    file.write_bytes(b"\xff" * len(content))
    with pytest.raises(ValueError, match=r"cp0-pp0-tp0\.safetensors is damaged"):
        load_context(engine, saved, fingerprint="weights")
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"has {len(content) - 1} bytes, should have {len(content)}"):
        load_context(engine, saved, fingerprint="weights")
    file.unlink()
    with pytest.raises(ValueError, match="is missing: the saved context is incomplete, or its folder"):
        load_context(engine, saved, fingerprint="weights")
    (saved / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        load_context(engine, saved, fingerprint="weights")


def test_a_context_of_another_method_answers_but_does_not_go_on(tiny, saved):
    dense = LLM(tiny, attention={"kind": "dense"}).engine
    loaded = load_context(dense, saved, fingerprint="weights")
    assert loaded.method.kind == "star"
    dense.decode([(dense.sequence(loaded), [3])])
    with pytest.raises(ValueError, match="a context of attention=star cannot go on in an engine of attention=dense"):
        dense.extend(loaded, [4])


def test_fingerprints_tell_weights_apart(tiny, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    description = dataclasses.replace(read_description(tiny), sha256={})  # as format version 1 has it
    mine = weights_fingerprint(description, tiny)
    assert mine == weights_fingerprint(description, copy)
    name = max(description.weight_files, key=description.weight_files.get)
    content = bytearray((copy / "weights" / name).read_bytes())
    content[: shard.torch.float32.itemsize * 1000] = bytes(4000)
    (copy / "weights" / name).write_bytes(content)
    assert weights_fingerprint(description, copy) != mine

    changed = dataclasses.asdict(description) | {"architecture": "Other"}
    shutil.rmtree(copy)
    shutil.copytree(tiny, copy)
    (copy / "nemo_star.json").write_text(json.dumps(changed))
    assert weights_fingerprint(description, copy) != mine


def test_rows_of_two_layouts_meet_by_token():
    mine, theirs = joined([(0, 3), (3, 5), (7, 7), (10, 20)]), ((2, 12), (15, 30))
    assert mine == ((0, 5), (10, 20))
    held, there = [t for s in mine for t in range(*s)], [t for s in theirs for t in range(*s)]
    found = [(held[i + k], there[j + k]) for i, j, count in common_rows(mine, theirs) for k in range(count)]
    assert found == [(token, token) for token in held if token in there]

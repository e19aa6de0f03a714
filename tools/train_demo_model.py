"""Train the bundled demo model: a small Llama that finds needles in long synthetic documents.

    python tools/train_demo_model.py --target DIR [--demo-document FILE]
    python tools/train_demo_model.py --evaluate-only DIR [--lengths 2048 8192] [--documents 50]

Everything is made here and seeded; nothing is downloaded. Five choices let so small a model learn to retrieve within
half an hour on two CPU cores:

- every training sequence asks about every needle of its document, and only the answers count in the loss;
- an extra loss guides the attention of two heads: one from the digits of a number to the noun it belongs to, one in
  the next layer from each place of an answer to the digit wanted there;
- training starts with documents of 192 tokens at their own positions; then documents grow, and positions skip (PoSE,
  arXiv 2309.10400), so that the rotary distances of an 8K document are seen in short sequences;
- attention starts as matching and copying: queries and keys share their first weights, and so do values and outputs
  (after arXiv 2305.09828);
- embeddings start large, so that what the first layers add does not drown which token is where.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import sentencepiece
import torch
from demo_examples import BOS, EOS, Batch, ExampleMaker, Stage
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from nemo_star.evaluation.needles import (
    NeedleDocument,
    fit_document,
    make_document,
    question,
)

VOCABULARY = 1536
MAX_POSITIONS = 8192
ROPE_THETA = 1000000.0
QUESTION_ROOM = 64  # tokens left free behind a document, for the question and its answer
NEEDLES_EVALUATED = (1, 4, 8)
REPORT_EVERY = 10  # steps
GUIDE_WEIGHT = 0.5


CURRICULUM = (
    Stage((192,), (2, 5), 400, 1e-3, tokens=2304),
    Stage((256, 512), (2, 10), 300, 1e-3, tokens=4096, positions=MAX_POSITIONS),
    Stage((512, 1024, 4096), (2, 24), 60, 7e-4, tokens=8192, positions=MAX_POSITIONS),
    Stage((1024, 8192), (1, 40), 30, 3e-4, tokens=16384),
)


def train_tokenizer(seed: int) -> bytes:
    """A byte-fallback BPE of 1,536 pieces with digits split: every word of the synthetic language is one piece."""
    rng = random.Random(seed)
    lines: list[str] = []
    for _ in range(3000):
        document = make_document(rng, filler_sentences=8, needles=8)
        lines += document.sentences
        lines += [f"{question(key)} {value}" for key, value in document.needles.items()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def build_model(seed: int) -> LlamaForCausalLM:
    """A model whose heads start as matching (queries equal keys) and copying (outputs are transposed values)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_theta=ROPE_THETA,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config)
    group = config.num_attention_heads // config.num_key_value_heads
    heads = (config.num_key_value_heads, config.head_dim, config.hidden_size)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(10.0)
        model.model.norm.weight.fill_(0.125)  # else the large embeddings, tied to the outputs, made logits too large
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(0.3)
            attention = layer.self_attn
            keys, values = attention.k_proj.weight.view(heads), attention.v_proj.weight.view(heads)
            attention.q_proj.weight.copy_(keys.repeat_interleave(group, dim=0).flatten(0, 1))
            attention.o_proj.weight.copy_(values.repeat_interleave(group, dim=0).flatten(0, 1).T)
    return model


def guide_loss(model: LlamaForCausalLM, layer: int, states: Tensor, positions: Tensor, links: Tensor) -> Tensor:
    """Mean negative log of the attention that head 0 of ``layer``, which reads ``states``, pays along ``links``."""
    block, size = model.model.layers[layer], model.config.head_dim
    states = block.input_layernorm(states)
    queries = F.linear(states, block.self_attn.q_proj.weight[:size])[:, None]
    keys = F.linear(states, block.self_attn.k_proj.weight[:size])[:, None]
    queries, keys = apply_rotary_pos_emb(queries, keys, *model.model.rotary_emb(states, positions))
    losses = []
    for row in range(len(states)):
        _, places, targets = links[links[:, 0] == row].T
        scores = queries[row, 0, places] @ keys[row, 0].T / size**0.5
        future = torch.arange(states.shape[1]) > places[:, None]
        losses.append(F.cross_entropy(scores.masked_fill(future, -torch.inf), targets, reduction="sum"))
    return torch.stack(losses).sum() / len(links)


def losses(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(loss of the answers, loss of the guided attention, share of right answer tokens)"""
    outputs = model.model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        attention_mask=torch.ones_like(batch.ids),  # else transformers takes skipped positions for packed sequences
        use_cache=False,
        output_hidden_states=True,
    )
    rows, places, tokens = batch.answers.T
    logits = model.lm_head(outputs.last_hidden_state[rows, places])
    guides = [
        guide_loss(model, layer, outputs.hidden_states[layer], batch.positions, links)
        for layer, links in enumerate((batch.nouns, batch.sources))
    ]
    return F.cross_entropy(logits, tokens), torch.stack(guides).sum(), (logits.argmax(-1) == tokens).float().mean()


def train(seed: int, tokenizer: sentencepiece.SentencePieceProcessor) -> LlamaForCausalLM:
    """Train through the curriculum; every stage has its own random numbers and starts a new optimizer."""
    model = build_model(seed)
    started = time.monotonic()
    for index, stage in enumerate(CURRICULUM):
        maker = ExampleMaker(tokenizer, random.Random(f"{seed}-{index}"))
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        for step in range(stage.steps):
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * min((step + 1) / 30, 1 - 0.8 * step / stage.steps)
            loss, guide, right = losses(model, maker.batch(stage))
            optimizer.zero_grad()
            (loss + GUIDE_WEIGHT * guide).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % REPORT_EVERY == 0:
                where = f"stage {index + 1}, step {step + 1} of {stage.steps}, {time.monotonic() - started:.0f} s"
                print(f"{where}: loss {loss:.3f}, guide {guide:.3f}, right {right:.1%}", file=sys.stderr, flush=True)
    return model.eval()


def hugging_face_tokenizer(tokenizer: sentencepiece.SentencePieceProcessor) -> PreTrainedTokenizerFast:
    """The same tokenizer as tokenizer.json: what AutoTokenizer loads without the protobuf package."""
    pieces = [tokenizer.id_to_piece(index) for index in range(tokenizer.vocab_size())]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for index, piece in enumerate(pieces)  # in the order of their ranks
        if not (tokenizer.is_control(index) or tokenizer.is_unknown(index) or tokenizer.is_byte(index))
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def add_settings(file: Path, **settings: object) -> None:
    """Set these top-level entries of a JSON file; those that are None are removed."""
    merged = json.loads(file.read_text(encoding="utf-8")) | settings
    kept = {name: value for name, value in merged.items() if value is not None or name not in settings}
    file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def export(model: LlamaForCausalLM, tokenizer: sentencepiece.SentencePieceProcessor, target: Path) -> None:
    """Write the checkpoint; ``target`` appears only when it is whole."""
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model.generation_config.do_sample = False
        model.to(torch.bfloat16).save_pretrained(partial)
        hugging_face_tokenizer(tokenizer).save_pretrained(partial)
        (partial / "tokenizer.model").write_bytes(tokenizer.serialized_model_proto())
        # As transformers 5 writes them, release 4 would miss the rotary base and the tokenizer's class.
        add_settings(partial / "config.json", rope_theta=ROPE_THETA)
        add_settings(partial / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", backend=None)
        partial.chmod(0o755)
        for file in partial.iterdir():
            file.chmod(0o644)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class DenseReader:
    """Answers questions about documents with a saved checkpoint and ordinary dense attention."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def document(self, rng: random.Random, needles: int, tokens: int) -> NeedleDocument:
        """A fresh document of at most ``tokens`` tokens with its BOS."""
        return fit_document(rng, tokens=tokens - 1, needles=needles, count_tokens=lambda text: len(self.ids(text)))

    @torch.inference_mode()
    def answers_exactly(self, document: NeedleDocument, key: str) -> bool:
        """Whether greedy decoding gives the seven digits and then EOS.

        It does if and only if, given the right answer, each next token is the likeliest, which one pass tells.
        """
        answer = [*self.ids(document.needles[key]), EOS]
        ids = torch.tensor([[BOS, *self.ids(document.text), *self.ids(question(key)), *answer]])
        logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits
        return logits[0, :-1].argmax(-1).tolist() == answer


def evaluate(reader: DenseReader, lengths: list[int], documents: int) -> None:
    """Print how many of ``documents`` fresh documents of each kind have their question answered exactly."""
    print("| tokens | " + " | ".join(f"{needles} needle{'s' * (needles > 1)}" for needles in NEEDLES_EVALUATED) + " |")
    print("|---:" * (1 + len(NEEDLES_EVALUATED)) + "|")
    for length in lengths:
        cells = []
        for needles in NEEDLES_EVALUATED:
            right = 0
            for index in range(documents):
                rng = random.Random(f"evaluation-{length}-{needles}-{index}")  # training seeds never look like this
                document = reader.document(rng, needles, length - QUESTION_ROOM)
                right += reader.answers_exactly(document, rng.choice(list(document.needles)))
            cells.append(f"{right} of {documents}")
            print(f"{length} tokens, {needles} needle(s): {cells[-1]}", file=sys.stderr)
        print(f"| {length} | " + " | ".join(cells) + " |", flush=True)


def write_demo_document(reader: DenseReader, target: Path, length: int) -> None:
    """Write the first document with a needle in its third quarter that is answered right; print that question."""
    for attempt in range(100):
        document = reader.document(random.Random(f"demo-{attempt}"), 4, length - QUESTION_ROOM)
        text = document.text
        for key, value in document.needles.items():
            depth = len(reader.ids(text[: text.index(f" {key} ")])) / len(reader.ids(text))
            if 0.5 < depth < 0.75 and reader.answers_exactly(document, key):
                target.write_text(text, encoding="utf-8")
                print(f"{1 + len(reader.ids(text))} tokens with BOS; asked for at {depth:.0%}: {question(key)} {value}")
                return
    raise RuntimeError("no demo document is answered right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", type=Path, metavar="DIR", help="checkpoint to write; must not exist")
    parser.add_argument("--evaluate-only", type=Path, metavar="DIR", help="measure this checkpoint instead of training")
    parser.add_argument("--demo-document", type=Path, metavar="FILE", help="also write a document to try the model on")
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 4096, 8192], help="tokens, question included")
    parser.add_argument("--documents", type=int, default=50, help="fresh documents for each figure (default: 50)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if (arguments.target is None) == (arguments.evaluate_only is None):
        parser.error("give either --target or --evaluate-only")
    for file in (arguments.target, arguments.demo_document):
        if file is not None and file.exists():
            parser.error(f"{file} exists already")
    torch.set_num_threads(arguments.threads)
    if arguments.target is not None:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=train_tokenizer(arguments.seed))
        export(train(arguments.seed, tokenizer), tokenizer, arguments.target)
    reader = DenseReader(arguments.target or arguments.evaluate_only)
    if arguments.demo_document is not None:
        write_demo_document(reader, arguments.demo_document, MAX_POSITIONS)
    if arguments.lengths:
        evaluate(reader, arguments.lengths, arguments.documents)


if __name__ == "__main__":
    main()

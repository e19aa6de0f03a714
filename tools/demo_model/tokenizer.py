"""The demo model's tokenizer: a byte-fallback BPE with digits and line breaks split off."""

from __future__ import annotations

import io
import random
import string
from collections.abc import Iterator

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from demo_model.words import words
from nemo_star.evaluation.needles import filler_sentence, make_document, question
from nemo_star.evaluation.ruler.catalog import tasks
from nemo_star.evaluation.ruler.niah import NEEDLE, NOISE

VOCABULARY = 2048
BOS, EOS = 1, 2


def train_tokenizer(seed: int) -> bytes:
    """A SentencePiece model of templates, training words, coded words and single capital letters."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(random.Random(seed)),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        user_defined_symbols=["\n"],
        character_coverage=1.0,
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


def _lines(rng: random.Random) -> Iterator[str]:
    trained = words(kept=False)
    templates = [f"{task.head()} {task.tail()}" for task in tasks().values()]
    for line in " ".join(templates).split("\n"):
        yield from [line] * 300
    for _ in range(300):
        yield NOISE
        yield " ".join("VAR =" for _ in range(3)) + " ... ..."
        yield NEEDLE.format(type_needle_v=rng.choice(["numbers", "number"]), key="", value=rng.randint(0, 9))
        yield filler_sentence(rng)
        yield " ".join(rng.sample(string.ascii_uppercase, 26))  # names are spelt, the first letter with its space
        yield " ".join("".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(4))
    for _ in range(300):
        document = make_document(rng, filler_sentences=4, needles=4)
        yield " ".join(document.sentences)
        yield from (question(key) for key in document.needles)
    for adjective in trained.adjectives * 4:
        yield f"{adjective} {adjective}-"
    for word in trained.nouns + trained.verbs:
        yield f"-{word} {word}"


def hugging_face_tokenizer(
    tokenizer: sentencepiece.SentencePieceProcessor, max_positions: int
) -> PreTrainedTokenizerFast:
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
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )

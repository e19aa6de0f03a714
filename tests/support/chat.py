"""Small tokenizers with the chat templates of tests/data/chat."""

from __future__ import annotations

from pathlib import Path

TEMPLATES = Path(__file__).resolve().parent.parent / "data" / "chat"
SPECIAL = {
    "llama3": ["<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
    "chatml": ["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
    "gemma": ["<s>", "</s>", "<start_of_turn>", "<end_of_turn>"],
    "phi3": ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "harmony": ["<s>", "</s>", "<|start|>", "<|message|>", "<|end|>", "<|channel|>"],
}
FAMILIES = tuple(SPECIAL)
_LINES = [
    "The whale swam north. The captain saw it, and said nothing.\n\nWho saw the whale?",
    "Chapter 1.\n\nIt was the best of times; it was the worst of times.\n \n\tWhat was it?",
    "def main():\n    return 'Ünïcode 你好'\n\n\n# What does it return?\nassistant user system",
]


def template(family: str) -> str:
    return (TEMPLATES / f"{family}.jinja").read_text()


def save_tokenizer(folder: Path, family: str) -> Path:
    """A byte-level BPE in the files of a Hugging Face checkpoint; BOS and EOS are <s> and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.post_processor = processors.ByteLevel(trim_offsets=True)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL[family],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(_LINES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[family][2:]})
    fast.chat_template = template(family)
    fast.save_pretrained(folder)
    return folder

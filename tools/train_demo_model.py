"""Train assets/ruler_model: a small Llama that answers RULER's questions about long texts; or one that counts words.

    python tools/train_demo_model.py --work DIR --target DIR [--hours 1.5]      # again until it says that it is done
    python tools/train_demo_model.py --work DIR --target DIR --count-from assets/ruler_model
    python tools/train_demo_model.py --evaluate-only DIR [--lengths 2048 8192] [--documents 50]
    python tools/train_demo_model.py --evaluate-only DIR --ruler-prompts FILE [--lengths 4096]

Everything is made here and seeded; nothing is downloaded. Eight choices let so small a model learn to retrieve, or to
count, within hours on a CPU core:

- every training sequence asks several questions of its text, and only the answers count in the loss;
- extra losses guide the attention of a few heads (`demo_model/model.py: HEADS`): from a number to all tokens of the key
  it belongs to, in the next layer from each place of an answer to the token wanted there, and the like for chains of
  variables and for counting;
- training starts with 192 tokens at their own positions; then texts grow, and positions skip (PoSE, arXiv 2309.10400),
  so that the rotary distances of a long text are seen in short sequences;
- attention starts as matching and copying: queries and keys share their first weights, and so do values and outputs
  (after arXiv 2305.09828);
- half of the channels are left free by embeddings: there the heads that gather a key's tokens write, and the heads that
  match keys read; else all that a place holds beside the key drowned it among many keys;
- embeddings start large, so that what the first layers add does not drown which token is where;
- counting starts from the weights that retrieve: a head sees all words that are left, where an answer may go on with
  any of them each counts as right, and words that are said are carried to where that head looks away from them;
- a fifth of all words of keys and lists (wonderwords) is kept for measuring.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import sentencepiece
import torch
from demo_model.model import MAX_POSITIONS, ROPE_THETA
from demo_model.reader import DenseReader, evaluate, write_demo_document, write_ruler_prompts
from demo_model.sequence import Pieces
from demo_model.tokenizer import hugging_face_tokenizer, train_tokenizer
from demo_model.training import Stage, Training
from transformers import LlamaForCausalLM

_SHORT = {"needles": 4, "old": 1, "vt": 3}
_ALL = {"needles": 4, "old": 1, "vt": 2, "cwe": 2, "fwe": 2}
RETRIEVAL = (
    Stage((192, 256), _SHORT, 350, 1e-3, tokens=2304),
    Stage((256, 512), _ALL, 300, 1e-3, tokens=4096, skip_to=MAX_POSITIONS),
    Stage((512, 1024), _ALL, 250, 8e-4, tokens=4096, skip_to=MAX_POSITIONS),
    Stage((1024, 2048, 4096), _ALL, 220, 5e-4, tokens=8192, skip_to=MAX_POSITIONS),
    Stage((4096, 8192), _ALL, 80, 3e-4, tokens=8192),
)
_COUNTING = {"cwe": 1, "fwe": 1}
COUNTING = (
    Stage((512, 1024), _COUNTING, 200, 5e-4, tokens=4096),
    Stage((1024, 2048), _COUNTING, 150, 4e-4, tokens=4096),
    Stage((4096,), _COUNTING, 50, 3e-4, tokens=8192),
)


def train(arguments: argparse.Namespace) -> bool:
    """Go on with training; writes the checkpoint where it is done."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=train_tokenizer(arguments.seed))
    pieces = Pieces(hugging_face_tokenizer(tokenizer, MAX_POSITIONS).backend_tokenizer)
    stages = COUNTING if arguments.count_from else RETRIEVAL
    training = Training(arguments.work, stages, pieces, arguments.seed, count_from=arguments.count_from)
    if not training.run(3600 * arguments.hours):
        print(f"{training.hours:.2f} hours so far; the same command goes on")
        return False
    export(training.model, tokenizer, arguments.target)
    print(f"trained in {training.hours:.2f} hours: {arguments.target}")
    return True


def add_settings(file: Path, **settings: object) -> None:
    """Set these top-level entries of a JSON file; those that are None are removed."""
    merged = json.loads(file.read_text(encoding="utf-8")) | settings
    kept = {name: value for name, value in merged.items() if value is not None or name not in settings}
    file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def export(model: LlamaForCausalLM, tokenizer: sentencepiece.SentencePieceProcessor, target: Path) -> None:
    """Write the checkpoint; `target` appears only when it is whole."""
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model.generation_config.do_sample = False
        model.to(torch.bfloat16).save_pretrained(partial)
        hugging_face_tokenizer(tokenizer, MAX_POSITIONS).save_pretrained(partial)
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


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", type=Path, metavar="DIR", help="checkpoint to write; must not exist")
    parser.add_argument("--work", type=Path, metavar="DIR", help="state of the training: the next run goes on from it")
    parser.add_argument("--count-from", type=Path, metavar="DIR", help="train what counts, from a model that retrieves")
    parser.add_argument("--hours", type=float, default=24.0, help="stop after so many, to go on later")
    parser.add_argument("--evaluate-only", type=Path, metavar="DIR", help="measure this checkpoint instead of training")
    parser.add_argument("--demo-document", type=Path, metavar="FILE", help="also write a document to try the model on")
    parser.add_argument("--ruler-prompts", type=Path, metavar="FILE", help="write RULER's prompts with unseen words")
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 4096, 8192], help="tokens, question included")
    parser.add_argument("--documents", type=int, default=50, help="fresh documents for each figure (default: 50)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if (arguments.target is None) == (arguments.evaluate_only is None):
        parser.error("give either --target or --evaluate-only")
    if arguments.target is not None and arguments.work is None:
        parser.error("--target takes --work DIR, too")
    if arguments.count_from is not None and not arguments.count_from.is_dir():
        parser.error(f"--count-from {arguments.count_from} is no directory")
    for file in (arguments.target, arguments.demo_document, arguments.ruler_prompts):
        if file is not None and file.exists():
            parser.error(f"{file} exists already")
    return arguments


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    if arguments.target is not None and not train(arguments):
        return
    reader = DenseReader(arguments.target or arguments.evaluate_only)
    if arguments.demo_document is not None:
        write_demo_document(reader, arguments.demo_document, MAX_POSITIONS)
    if arguments.ruler_prompts is not None:
        write_ruler_prompts(
            arguments.ruler_prompts,
            lambda text: len(reader.ids(text)),
            arguments.lengths,
            arguments.documents,
            arguments.seed,
        )
    elif arguments.lengths and not arguments.count_from:
        evaluate(reader, arguments.lengths, arguments.documents)


if __name__ == "__main__":
    main()

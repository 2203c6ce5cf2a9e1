"""Teachers as strangers bring them: a small random Llama whose folder is changed in one thing, for tests of single faults.

Every function writes into a folder of its own and returns it. The base is the same throughout: hidden 64, 3 layers, 4 heads on
2 KV heads of 16, FFN 128, vocabulary 288, byte-level BPE, untied head.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

END, BEGIN, TURN = "<|end|>", "<|begin|>", "<|turn|>"
SPECIAL = (END, BEGIN, TURN)
"""The special tokens have the ids 0, 1 and 2."""
VOCABULARY = 288
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
}
SENTENCE = "the model reads a line and writes another while small numbers grow into large ones because every layer adds"
WORDS = SENTENCE.split()


def document(seed: int, words: int = 700) -> str:
    """About 4 kB of generated sentences."""
    source = random.Random(seed)
    lines = (" ".join(source.choices(WORDS, k=10)).capitalize() + f". ({seed})" for _ in range(words // 10))
    return "\n".join(lines) + "\n"


def write_documents(folder: Path, documents: int = 60, words: int = 700) -> Path:
    """A folder of text files."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        (folder / f"document{i:03}.txt").write_text(document(1000 + i, words), encoding="utf8")
    return folder


def strange_teacher(
    folder: Path,
    *,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    files: dict[str, Any] | None = None,
    always: int | None = None,
    scale_head: float = 1.0,
) -> Path:
    """A teacher in `folder`.

    `config`, `tokenizer` (tokenizer.json) and `tokenizer_config` are merged into those files, ... drops a key; keys that shape
    the network are what it is built with. `files` are further files: text, or what is written as JSON. `always` makes the model
    say that token whatever it reads.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    shaping = {key: value for key, value in (config or {}).items() if key in BASE or key == "rope_parameters"}
    network = LlamaForCausalLM(
        LlamaConfig(**{k: v for k, v in {**BASE, **shaping}.items() if v is not ... and not k.endswith("_token_id")})
    )
    with torch.no_grad():
        network.lm_head.weight.mul_(scale_head)
        if always is not None:  # all positions end in the same hidden state, which points at one row of the head
            network.model.embed_tokens.weight.fill_(1.0)
            for name, parameter in network.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.zero_()
            network.lm_head.weight[always] = 1.0
    network.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    merge(folder / "config.json", {k: v for k, v in BASE.items() if k.endswith("_token_id")} | (config or {}))
    byte_level_tokenizer(folder, tokenizer)
    merge(
        folder / "tokenizer_config.json",
        {"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast", **(tokenizer_config or {})},
    )
    for name, content in (files or {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf8")
    return folder


def merge(path: Path, changes: dict[str, Any]) -> None:
    """Change keys of a JSON file, which need not exist; ... drops one."""
    found = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
    found = {key: value for key, value in {**found, **changes}.items() if value is not ...}
    path.write_text(json.dumps(found), encoding="utf8")


def byte_level_tokenizer(folder: Path, changes: dict[str, Any] | None = None) -> None:
    """tokenizer.json: byte-level BPE of 288 tokens, trained on generated text."""
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(
        [document(i) for i in range(4)], vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False
    )
    made.save(str(folder / "tokenizer.json"))
    merge(folder / "tokenizer.json", {"post_processor": None, **(changes or {})})


def adds_begin(end: bool = False) -> dict[str, Any]:
    """The post-processor of Llama 2 and 3: BEGIN before a text, and with `end` also END behind it."""
    single: list[dict[str, Any]] = [
        {"SpecialToken": {"id": BEGIN, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    if end:
        single.append({"SpecialToken": {"id": END, "type_id": 0}})
    ids = {token: {"id": token, "ids": [i], "tokens": [token]} for i, token in enumerate(SPECIAL[:2])}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": ids}


def other_tokenizer(folder: Path, kind: str) -> Path:
    """Replace the tokenizer by a `wordlevel`, `unigram`, `wordpiece` or `character` one."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    text = [document(i) for i in range(8)]
    special = ["[UNK]", *SPECIAL]
    if kind == "wordlevel":
        trainer: Any
        made, trainer = Tokenizer(models.WordLevel(unk_token="[UNK]")), trainers.WordLevelTrainer
        made.pre_tokenizer = pre_tokenizers.Whitespace()
    elif kind == "unigram":
        made, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    elif kind == "wordpiece":
        made, trainer = Tokenizer(models.WordPiece(unk_token="[UNK]")), trainers.WordPieceTrainer
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
    else:
        made, trainer = Tokenizer(models.BPE(unk_token="[UNK]")), trainers.BpeTrainer
        made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    options: dict[str, Any] = {"unk_token": "[UNK]"} if kind == "unigram" else {}
    made.train_from_iterator(
        text, trainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False, **options)
    )
    names = [f"filler{i}" for i in range(VOCABULARY - made.get_vocab_size())]
    made.add_tokens(names)
    made.save(str(folder / "tokenizer.json"))
    merge(folder / "config.json", {"eos_token_id": 1})
    return folder

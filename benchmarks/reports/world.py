"""What the rows share: a random Llama with a byte-level BPE tokenizer, generated text, and the program as a process."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCABULARY = 288
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
TOKENIZER_CONFIG = {
    "bos_token": "<|end|>",
    "eos_token": "<|end|>",
    "pad_token": "<|end|>",
    "tokenizer_class": "PreTrainedTokenizerFast",
}
WORDS = (  # noqa: SIM905
    "the model reads a line and writes another while small numbers grow into large ones because every layer adds it"
).split()
TIMEOUT_S = 240.0


@dataclass(frozen=True)
class Ended:
    """A finished process: exit code, both streams, wall-clock seconds."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def text(self) -> str:
        return self.out + self.err

    def tail(self, characters: int = 200) -> str:
        """The last words, on one line."""
        return " ".join(self.text.split())[-characters:]


@dataclass(frozen=True)
class World:
    """A row's own folder."""

    folder: Path
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def paretune(
        self,
        *arguments: object,
        cwd: Path | None = None,
        variables: Mapping[str, str | None] | None = None,
        prefix: Sequence[str] = (),
        interrupt_after: float | None = None,
    ) -> Ended:
        """Run the program; a variable that is None is unset; `interrupt_after` seconds it gets one SIGINT."""
        environment = {**os.environ, **self.variables}
        for name, value in (variables or {}).items():
            environment.pop(name, None) if value is None else environment.update({name: value})
        environment.pop("PARETUNE_HOME", None)
        command = [*prefix, sys.executable, "-m", "paretune", *map(str, arguments)]
        start = time.monotonic()
        child = subprocess.Popen(
            command, cwd=cwd or self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            out, err = child.communicate(timeout=interrupt_after or TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)
            try:
                out, err = child.communicate(timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                out, err = child.communicate()
        said, problems = (stream.decode("utf-8", "replace") for stream in (out, err))
        return Ended(child.returncode, said, problems, time.monotonic() - start)

    def search(self, teacher: Path, data: Path, *more: object, home: Path | None = None, **how: Any) -> Ended:
        """A search of a minute on `teacher` and `data`."""
        return self.paretune(
            "search", "--teacher", teacher, "--data", data, "--budget", "60s", "--home", home or self.home, *more, **how
        )

    def plan(self, teacher: Path, data: Path, *more: object, **how: Any) -> Ended:
        return self.search(teacher, data, "--dry-run", "--json", *more, **how)

    def study(self, home: Path | None = None) -> Path:
        """The newest study's folder."""
        return max(((home or self.home) / "studies").iterdir(), key=lambda path: path.stat().st_mtime)

    def artifact(self, home: Path | None = None) -> Path:
        """One confirmed artifact with a Hugging Face folder."""
        return min(path.parent for path in (self.study(home) / "artifacts").glob("*/hf"))


def document(seed: int, characters: int = 4096) -> str:
    """Sentences over a few words, `characters` long."""
    source = random.Random(seed)
    own = source.sample(WORDS, 10)
    text = ""
    while len(text) < characters:
        text += " ".join(source.choice(own) for _ in range(10)).capitalize() + f". ({source.randrange(1000)})\n"
    return text[:characters]


def write_documents(folder: Path, documents: int = 60) -> Path:
    """`documents` text files of 4 kB."""
    folder.mkdir(parents=True)
    for i in range(documents):
        (folder / f"document{i:03}.txt").write_text(document(1000 + i), encoding="utf-8")
    return folder


def write_records(path: Path, texts: Sequence[str], field: str = "text", lines: bool = True) -> Path:
    """Records of one field, as JSON lines or as one array."""
    records = [{field: text} for text in texts]
    data = "".join(json.dumps(record) + "\n" for record in records) if lines else json.dumps(records)
    path.write_text(data, encoding="utf-8")
    return path


def write_teacher(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    tokenizer: Callable[[dict[str, Any]], None] | None = None,
    weights: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """A random Llama: hidden 64, 3 layers, 4 heads on 2 KV heads, vocabulary 288.

    `tokenizer` edits tokenizer.json, `weights` the tensors.
    """
    import torch
    from safetensors.torch import save_file
    from tokenizers import ByteLevelBPETokenizer

    folder.mkdir(parents=True)
    settings = {**CONFIG, **(config or {})}
    tensors = _random_weights(settings, torch)
    if weights is not None:
        weights(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [document(i) for i in range(4)], vocab_size=VOCABULARY, special_tokens=["<|end|>"], show_progress=False
    )
    described = json.loads(bpe.to_str())
    if tokenizer is not None:
        tokenizer(described)
    for name, value in (
        ("config.json", settings),
        ("tokenizer.json", described),
        ("tokenizer_config.json", {**TOKENIZER_CONFIG, **(tokenizer_config or {})}),
    ):
        (folder / name).write_text(json.dumps(value, indent=1), encoding="utf-8")
    return folder


def _random_weights(settings: Mapping[str, Any], torch: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    hidden, ffn, vocabulary = settings["hidden_size"], settings["intermediate_size"], settings["vocab_size"]
    width = settings["head_dim"] * settings["num_key_value_heads"]

    def normal(*size: int) -> Any:
        return torch.empty(size).normal_(0.0, 0.15, generator=generator)

    found = {"model.embed_tokens.weight": normal(vocabulary, hidden), "model.norm.weight": 1 + normal(hidden)}
    if not settings["tie_word_embeddings"]:
        found["lm_head.weight"] = normal(vocabulary, hidden)
    for i in range(settings["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        sizes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (width, hidden),
            "self_attn.v_proj": (width, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        found |= {f"{layer}{name}.weight": normal(*size) for name, size in sizes.items()}
        found |= {
            f"{layer}{name}.weight": 1 + normal(hidden) for name in ("input_layernorm", "post_attention_layernorm")
        }
    return found


def nll(study: Path) -> float:
    """The fp32 teacher's NLL (nats per token) on the report text, as the store has it."""
    from paretune.search.study.store import Store
    from paretune.search.study.view import load_view

    store = Store.reader(study)
    try:
        view = load_view(store)
        return min(point.measurements["nll"].value for point in view.confirmed if point.name == "teacher fp32")
    finally:
        store.close()


def have(program: str) -> bool:
    """Whether this machine can run `program` as root."""
    return shutil.which(program) is not None and os.geteuid() == 0

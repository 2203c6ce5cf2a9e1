"""Shared pieces of the suite: every test in the same state, a tiny random model with a tokenizer of its own, generated text."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import HealthCheck, settings

from support.plans import empty_plan

if TYPE_CHECKING:
    import torch

    from paretune.spaces import Space
    from paretune.teachers.checkpoint.teacher import Teacher
    from paretune.teachers.text.tokens import TokenSplit

# The examples are a pure function of the test, so these tests have no chance to fail by luck.
settings.register_profile(
    "paretune",
    derandomize=True,
    deadline=None,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("paretune")


@contextmanager
def _fixed_arithmetic(name: str) -> Iterator[None]:
    """Random numbers seeded by `name`, one thread, fp32, denormals kept: as if nothing had run in this process before. The random
    states from before come back afterwards."""
    import numpy as np
    import torch

    seed = zlib.crc32(name.encode())
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    _plain_torch()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        _plain_torch()


def _plain_torch() -> None:
    import torch

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_flush_denormal(False)
    torch.set_grad_enabled(True)


@contextmanager
def _kept_process() -> Iterator[None]:
    """Environment, folder, module path, signal handlers and loggers are afterwards what they were."""
    environment, folder, path = dict(os.environ), Path.cwd(), list(sys.path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    logs = [(x, x.level, list(x.handlers), x.propagate, x.disabled) for x in loggers]
    try:
        yield
    finally:
        if os.environ != environment:
            os.environ.clear()
            os.environ.update(environment)
        os.chdir(folder)
        sys.path[:] = path
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        for logger, level, kept, propagate, disabled in logs:
            if logger.level != level:
                logger.setLevel(level)  # which also forgets what the logger knows of its level
            logger.handlers[:], logger.propagate, logger.disabled = kept, propagate, disabled


@pytest.fixture(autouse=True)
def _same_state(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test computes the same whatever ran before it, and leaves nothing behind."""
    file, _, name = request.node.location
    with _fixed_arithmetic(f"{file}::{name}"), _kept_process():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, Any, Any]:
    """A shared fixture is the same whichever test asks for it first."""
    if fixturedef.scope == "function":
        return (yield)
    with _fixed_arithmetic(f"{fixturedef.baseid}::{fixturedef.argname}[{getattr(request, 'param_index', 0)}]"):
        return (yield)


# Files whose tests time something or search against the clock: `make test` runs them alone, after all others.
MACHINE = (
    "test_benchmarks test_control test_elsewhere test_end_to_end test_latency test_objectives test_placement test_plugin_search "
    "test_walk"
)


# The longest of the other files, longest first: two processes take one file after the other, so these must not come last.
LONG = "test_supervisor test_kill test_search test_pages test_other_readers test_mlflow_ui test_pages_live test_tracking test_notify"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None, None, None]:
    """Marks the files of MACHINE. After all plug-ins have put the tests into their order, the files of LONG come first."""
    machine, long = set(MACHINE.split()), LONG.split()
    for item in items:
        if item.path.stem in machine:
            item.add_marker(pytest.mark.machine)
    yield
    items.sort(key=lambda item: long.index(item.path.stem) if item.path.stem in long else len(long))


TINY_VOCAB = 288
TINY = {
    "vocab_size": TINY_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "initializer_range": 0.15,
}
FAMILY_CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None, "tie_word_embeddings": False},
    "qwen2": {"head_dim": ...},  # its configs have none
    "qwen3": {"head_dim": 32},
    "gpt2": {},
}
GPT2_LACKS = ("num_key_value_heads", "head_dim")
GPT2_KEYS = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "rms_norm_eps": "layer_norm_epsilon",
}
WORDS = (
    "the model reads a line and writes another while small numbers grow into large ones because every layer "
    "adds what it knows about words rivers stones engines light weight grid zero one two four eight prune keep "
    "sort slice"
)


def _document(seed: int, words: int = 500) -> str:
    """Text of about five characters per word with some structure: sentences over a few words of a document's own."""
    source = random.Random(seed)
    own = source.sample(WORDS.split(), 12)
    lines = []
    for _ in range(words // 10):
        lines.append(" ".join(source.choice(own) for _ in range(10)).capitalize() + f". ({source.randrange(1000)})")
    return "\n".join(lines) + "\n"


def _write_teacher(folder: Path, seed: int = 0, family: str = "llama", **changes: Any) -> Path:
    """A random model of TINY with `changes` (... drops a key), as a Hugging Face folder with a byte-level BPE tokenizer of
    288 tokens."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    settings = {**TINY, **FAMILY_CHANGES[family], **changes}
    if family == "gpt2":
        settings = {GPT2_KEYS.get(key, key): value for key, value in settings.items() if key not in GPT2_LACKS}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{key: value for key, value in settings.items() if value is not ...})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # ones and zeros would hide a forgotten or swapped norm or bias
                parameter.copy_((0 if name.endswith("bias") else 1) + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        [_document(i) for i in range(4)], vocab_size=TINY_VOCAB, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"bos_token": "<|end|>", "eos_token": "<|end|>", "pad_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    return folder


def _write_text(folder: Path, documents: int = 60, words: int = 500) -> Path:
    """A folder of generated .txt files."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        (folder / f"document{i:03}.txt").write_text(_document(1000 + i, words))
    return folder


@pytest.fixture(scope="session")
def generated_document() -> Callable[..., str]:
    """`generated_document(seed, words=500)`: text of about six characters per word."""
    return _document


@pytest.fixture(scope="session")
def write_teacher() -> Callable[..., Path]:
    """`write_teacher(folder, seed=0, family="llama", **config)`: a random model like the tiny teacher, changed as the caller
    says."""
    return _write_teacher


@pytest.fixture(scope="session")
def write_text() -> Callable[..., Path]:
    """`write_text(folder, documents=60, words=500)`: a folder of generated text files."""
    return _write_text


@pytest.fixture(scope="session")
def tiny_teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folder: hidden 64, 3 layers, 4 heads / 2 KV heads of 16, FFN 128, vocabulary 288, tied. Do not write into it."""
    return _write_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 60 generated documents of about 3,000 characters, enough for every split. Do not write into it."""
    return _write_text(tmp_path_factory.mktemp("text") / "documents")


@pytest.fixture(scope="session")
def tiny_teacher(tiny_teacher_dir: Path) -> Teacher:
    from paretune.teachers.checkpoint.teacher import load_teacher

    return load_teacher(str(tiny_teacher_dir))


@pytest.fixture(scope="session")
def tiny_weights(tiny_teacher: Teacher) -> dict[str, torch.Tensor]:
    """The tiny teacher's weights; tests must not change them in place."""
    return tiny_teacher.weights()


@pytest.fixture(scope="session")
def learned_weights() -> Callable[[str], dict[str, torch.Tensor]]:
    """`learned_weights("five")` or `("three")` layers that have learned the generated text: the same on every processor, because
    they lie in a file (data/make_learned.py)."""
    from safetensors.torch import load_file

    stored = load_file(Path(__file__).parent / "data" / "learned.safetensors")
    return lambda model: {n.partition("/")[2]: w.float() for n, w in stored.items() if n.startswith(f"{model}/")}


@pytest.fixture(scope="session")
def tiny_space(tiny_teacher: Teacher) -> Space:
    from paretune.spaces import Space

    return Space.of(tiny_teacher.shape, ("fp32/fp32", "int8/int8", "int4/int8", "int4/fp32"))


@pytest.fixture(scope="session")
def tiny_tokens(
    tiny_teacher: Teacher, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, TokenSplit]:
    from paretune.teachers.text.corpus import user_corpus
    from paretune.teachers.text.tokens import token_splits

    splits = token_splits(tiny_teacher, user_corpus(tiny_text), tmp_path_factory.mktemp("cache"))
    return {str(name): split for name, split in splits.items()}


@pytest.fixture(scope="session")
def simulated_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the complete study `nightly` of the simulated evaluator: 30 candidates explored, several confirmed with artifacts.
    Copy it to change it."""
    from paretune.common.checksums import FACTS, MODEL, write_checksums
    from paretune.hardware_profiles.profile import detected_profile
    from paretune.search.evaluators.simulated import SHAPE, SimulatedEvaluator, VirtualClock
    from paretune.search.execution.inline import run_inline
    from paretune.search.execution.run import run_study
    from paretune.search.prepare.ready import Ready
    from paretune.search.prepare.studies import create_study
    from paretune.search.spec import Spec
    from paretune.spaces import Space
    from paretune.teachers.checkpoint.teacher import load_teacher

    home = tmp_path_factory.mktemp("simulated")
    spec = Spec.model_validate({"budget": "300s", "fit_points": 30, "max_candidates": 30, "finalists": 3})
    profile = detected_profile()
    space = Space.of(SHAPE, profile.weight_formats)
    plan = empty_plan(space, spec)
    ready = Ready(spec, load_teacher("stdlib-coder"), profile, space, plan)
    store, clock = create_study(ready, home, "nightly", "paretune search"), VirtualClock()
    evaluator = SimulatedEvaluator(store.folder, home, clock)

    def execute(director: Any, *_: Any) -> None:
        director.state.budget.clock = clock
        director.state.budget.__post_init__()
        run_inline(director, evaluator.run)

    assert run_study(store, ready, home, lambda *_: None, None, execute) == 0
    store.close()
    for folder in (
        home / "studies" / "nightly" / "artifacts"
    ).iterdir():  # what the simulation leaves out of an artifact
        for name in (MODEL, FACTS):
            (folder / name).parent.mkdir(exist_ok=True)
            if not (folder / name).exists():
                (folder / name).write_text("{}")
        write_checksums(folder)
    return home

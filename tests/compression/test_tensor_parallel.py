"""A teacher over two gloo processes against one: every family, each check with controls that must fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from paretune.cli import app as cli
from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.compression.network.ranks import run_ranks
from paretune.compression.network.student import Network
from paretune.objectives.quality import score as scoring
from paretune.spaces import Shape
from paretune.teachers.checkpoint.shards import check_degree, degrees_of, read_shard
from paretune.teachers.checkpoint.teacher import Teacher, load_teacher

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "support" / "tensor_parallel_program.py"
SHAPE = Shape(4, 512, 1536, 16, 8, 64, 32000, tied=False)


MODELS: dict[str, dict[str, Any]] = {
    "llama, grouped queries, tied": {"family": "llama"},
    "llama, untied": {"family": "llama", "tie_word_embeddings": False, "seed": 1},
    "qwen2, biases": {"family": "qwen2", "seed": 2},
    "qwen3, norms of q and k, untied": {"family": "qwen3", "tie_word_embeddings": False, "seed": 3},
    "gpt2, odd vocabulary": {"family": "gpt2", "vocab_size": 289, "seed": 4},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, write_teacher: Callable[..., Path]) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: str(write_teacher(root / str(i), **changes)) for i, (name, changes) in enumerate(MODELS.items())}


@pytest.mark.parametrize("model", MODELS)
def test_the_shards_together_are_the_checkpoint(model: str, folders: dict[str, str]) -> None:
    teacher = load_teacher(folders[model])
    shards = [read_shard(teacher, rank, 2) for rank in range(2)]
    for name, value in teacher.weights().items():
        parts = [shard[name] for shard in shards]
        if parts[0].shape == value.shape:
            summed = name.endswith(("o_proj.bias", "down_proj.bias"))
            assert torch.equal(parts[0], value) and torch.equal(parts[1], 0 * value if summed else value), name
        else:
            dimension = next(d for d in range(value.ndim) if parts[0].shape[d] != value.shape[d])
            assert torch.equal(torch.cat(parts, dimension), value), name
    matrices = [n for n, v in teacher.weights().items() if v.ndim == 2 and "positions" not in n]
    halves = [max(shard[n].numel() for shard in shards) / teacher.weights()[n].numel() for n in matrices]
    assert matrices and all(half <= 0.5 + 1 / teacher.shape.vocab for half in halves), "every matrix is divided"
    assert all(torch.equal(v, teacher.weights()[n]) for n, v in read_shard(teacher, 0, 1).items())


def test_a_rank_does_not_look_at_the_parts_of_the_others(folders: dict[str, str], tmp_path: Path) -> None:
    """The other rank's half of every divided tensor is poisoned in the file."""
    teacher = load_teacher(folders["llama, untied"])
    expected = read_shard(teacher, 1, 2)
    tensors = {name: value.clone() for name, value in load_file(teacher.weight_files[0]).items()}
    for name, value in tensors.items():
        dimension = next((d for d in range(value.ndim) if expected[name].shape[d] != value.shape[d]), None)
        if dimension is not None:
            value.narrow(dimension, 0, value.shape[dimension] // 2).fill_(float("nan"))
    assert sum(bool(value.isnan().any()) for value in tensors.values()) == 7 * 3 + 2
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    poisoned = replace(teacher, folder=tmp_path)
    assert all(torch.equal(v, expected[n]) for n, v in read_shard(poisoned, 1, 2).items())
    assert any(bool(v.isnan().any()) for v in read_shard(poisoned, 0, 2).values())


def test_rows_of_a_float32_file_stay_mapped(tiny_teacher: Teacher) -> None:
    """Anonymous memory would show as storage of the part's own size; a view has that of what it looks into."""
    shard = read_shard(tiny_teacher, 0, 2)
    rows, columns = shard["model.layers.0.mlp.up_proj.weight"], shard["model.layers.0.mlp.down_proj.weight"]
    assert rows.untyped_storage().nbytes() > 4 * rows.numel()
    assert columns.untyped_storage().nbytes() == 4 * columns.numel()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_masks_and_bfloat16_are_folded_into_shards(
    family: str, tmp_path: Path, write_teacher: Callable[..., Path]
) -> None:
    folder = write_teacher(tmp_path / "model", family=family)
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith(("c_attn.weight", "layers.0.self_attn.q_proj.weight")))
    tensors = {n: v.to(torch.bfloat16) for n, v in tensors.items()}
    weight = tensors.pop(name)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    tensors |= {f"{name}_orig": weight, f"{name}_mask": mask.to(torch.bfloat16)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    teacher = load_teacher(str(folder))
    assert teacher.has_masks
    whole = teacher.weights()
    key = "model.layers.0.self_attn.q_proj.weight"
    assert float((whole[key] == 0).float().mean()) > 0.3
    parts = [read_shard(teacher, rank, 2)[key] for rank in range(2)]
    assert parts[0].dtype == torch.float32 and torch.equal(torch.cat(parts), whole[key])


def test_only_degrees_that_divide_heads_and_neurons_are_taken() -> None:
    shape = replace(SHAPE, heads=24, kv_heads=12, ffn=1536)
    assert degrees_of(shape) == [1, 2, 3, 4, 6, 12]
    assert degrees_of(replace(shape, ffn=1600)) == [1, 2, 4]
    for degree in (0, 5, 24, -1):
        with pytest.raises(UsageError, match=r"must divide the 12 KV heads and the 1536 FFN neurons, but got"):
            check_degree(shape, degree)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 288, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def found(folders: dict[str, str], ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two gloo processes computed, all cases in one launch: a list over ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    np.save(folder / "ids.npy", ids.numpy())
    (folder / "cases.json").write_text(json.dumps(folders))
    run_ranks([str(PROGRAM)], 2, folder, 240)
    return [dict(np.load(folder / f"found{rank}.npz")) for rank in range(2)]


@pytest.mark.parametrize("model", MODELS)
def test_two_processes_compute_what_one_does(
    model: str, folders: dict[str, str], ids: torch.Tensor, found: list[dict[str, Any]]
) -> None:
    """Largest difference 1e-5 nats and 1e-5 of the largest logit; transformers' own module, which knows no shards, says the same."""
    from transformers import AutoModelForCausalLM

    teacher = load_teacher(folders[model])
    network, weights = Network(teacher.config, teacher.shape, teacher.shape.layers), teacher.weights()
    with torch.no_grad():
        logits, losses = network(weights, ids), network.token_losses(weights, ids)
        theirs = AutoModelForCausalLM.from_pretrained(folders[model])(ids).logits
    assert (theirs - logits).abs().max() <= 1e-5 * max(1, float(theirs.abs().max()))
    for rank in found:
        mine = torch.from_numpy(rank[f"{model}/right/logits"])
        assert (mine - logits).abs().max() <= 1e-5 * max(1, float(logits.abs().max()))
        assert (torch.from_numpy(rank[f"{model}/right/losses"]) - losses).abs().max() <= 1e-5
        assert abs(rank[f"{model}/right/losses"].mean(dtype=np.float64) - float(losses.double().mean())) <= 1e-6
    assert np.array_equal(found[0][f"{model}/right/losses"], found[1][f"{model}/right/losses"]), (
        "ranks agree bit by bit"
    )


@pytest.mark.parametrize("model", MODELS)
def test_every_control_fails(
    model: str, folders: dict[str, str], ids: torch.Tensor, found: list[dict[str, Any]]
) -> None:
    """A sum left out or a swapped shard moves the losses a thousand times further than the tolerance."""
    teacher = load_teacher(folders[model])
    with torch.no_grad():
        losses = Network(teacher.config, teacher.shape, teacher.shape.layers).token_losses(teacher.weights(), ids)
    names = {key.split("/")[1] for key in found[0] if key.startswith(f"{model}/") and key.endswith("losses")}
    controls = names - {"right"}
    assert len(controls) >= 5
    for control in controls:
        moved = (torch.from_numpy(found[0][f"{model}/{control}/losses"]) - losses).abs().max()
        assert not moved <= 1e-2, control


def test_processes_talk_over_the_loopback_only(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert len(rank["addresses"]) >= 1
        assert {str(a) for a in rank["addresses"]} <= {"0100007F", "0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F"}


def test_each_process_holds_half(folders: dict[str, str], found: list[dict[str, Any]]) -> None:
    for model in MODELS:
        total = load_teacher(folders[model]).parameters
        for rank in found:
            assert total / 2 <= rank[f"{model}/numbers"] < 0.62 * total, model


def test_score_prints_the_nll_that_one_process_computes(
    tiny_teacher: Teacher,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        "--teacher",
        str(tiny_teacher.folder),
        "--data",
        str(tiny_text),
        "--home",
        str(tmp_path),
        "--tokens",
        "2000",
    ]
    monkeypatch.setattr(sys, "argv", ["paretune", "score", *arguments, "--tensor-parallel", "2", "--json"])
    cli.main()
    data = json.loads(capsys.readouterr().out)
    from paretune.teachers.text.corpus import user_corpus
    from paretune.teachers.text.tokens import token_split

    windows = token_split(tiny_teacher, user_corpus(tiny_text), "report", tmp_path / "cache").windows(256, 2000)
    network = Network(tiny_teacher.config, tiny_teacher.shape, 3)
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    with torch.no_grad():
        losses = network.token_losses(tiny_teacher.weights(), torch.from_numpy(windows.ids)).double()
    for row, n, document in zip(losses, windows.targets, windows.cluster, strict=True):
        sums[document] = sums.get(document, 0.0) + float(row[:n].sum())
        counts[document] = counts.get(document, 0) + int(n)
    nll = data["measurements"]["nll"]
    assert nll["value"] == pytest.approx(sum(sums.values()) / sum(counts.values()), abs=1e-6)
    assert nll["low"] < nll["value"] < nll["high"] and nll["samples"] == sum(counts.values())
    assert (nll["unit"], nll["provenance"], data["tensor_parallel"]) == ("nats/token", "measured", 2)
    assert [d["targets"] for d in data["documents"]] == [counts[k] for k in sorted(counts)]
    expected = [sums[k] / counts[k] for k in sorted(counts)]
    assert [d["nll"] for d in data["documents"]] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tensor-parallel", "3"], "must divide the 2 KV heads and the 128 FFN neurons, but got 3"),
        (["--split", "train"], "--split must be report, search or calibration"),
    ],
)
def test_a_wrong_number_of_processes_is_refused_before_any_work(
    options: list[str],
    words: str,
    tiny_teacher: Teacher,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["paretune", "score", "--teacher", str(tiny_teacher.folder), *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and words in " ".join(capsys.readouterr().err.split())


def test_too_little_memory_is_said_before_any_process_starts(
    tiny_teacher: Teacher, tiny_tokens: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "available_memory", lambda: 800_000_000)
    with pytest.raises(EnvironmentProblem, match=r"takes 0\.9 GB in 2 processes, but 0\.8 GB"):
        scoring.score_teacher(tiny_teacher, tiny_tokens["report"], 2)

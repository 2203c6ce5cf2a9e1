"""Models divided among devices: the cost model against sums done by hand, and two gloo processes against one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from paretune import cli
from paretune.compression.ranks import run_ranks
from paretune.compression.student import Network
from paretune.hardware_profiles import EnvironmentProblem, Infeasible, UsageError
from paretune.objectives.device_bytes import cache_bytes, stage_bytes, weight_bytes
from paretune.objectives.parallel import (
    all_reduce_ms,
    degree_fact,
    layers_reduce_ms,
    pipeline_ms,
    pipeline_stages,
    send_ms,
    split_candidate,
    split_problem,
    split_shape,
    tensor_parallel_degree,
)
from paretune.search import score as scoring
from paretune.spaces import Candidate, Format, Layer, Pattern, Shape
from paretune.spaces.candidate import DENSE, FP32
from paretune.teachers import Teacher, load_teacher
from paretune.teachers.shards import check_degree, degrees_of, read_shard, shard_parameters

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tests" / "tensor_parallel_program.py"
SHAPE = Shape(4, 512, 1536, 16, 8, 64, 32000, tied=False)
LINKED = SimpleNamespace(name="linked", memory_bytes=10**9, devices=8, link_alpha_us=6.0, link_gb_per_s=450.0)
ALONE = SimpleNamespace(name="alone", memory_bytes=10**9, devices=1, link_alpha_us=None, link_gb_per_s=None)
INT4 = Format(4, 128, "int8")


def whole(form: Format = FP32, pattern: Pattern = DENSE) -> Candidate:
    return Candidate((Layer(SHAPE.ffn, SHAPE.kv_heads, form, form, pattern),) * SHAPE.layers, form, form)


# --- the cost model ---------------------------------------------------------------------------------------------------


def ring(p: int, message: float, alpha_us: float, gb_per_s: float) -> float:
    """A ring step by step: p - 1 steps that reduce, p - 1 that gather, each sends one p-th of the message. Microseconds."""
    clock = 0.0
    for _phase in ("reduce-scatter", "all-gather"):
        for _step in range(p - 1):
            clock += alpha_us + message / p / (gb_per_s * 1e3)
    return clock


@pytest.mark.parametrize("degree", [1, 2, 3, 8])
@pytest.mark.parametrize("message", [0, 8192, 5e8])
def test_an_all_reduce_costs_the_steps_of_a_ring(degree: int, message: float) -> None:
    assert all_reduce_ms(message, degree, LINKED) == pytest.approx(ring(degree, message, 6.0, 450.0) / 1e3)


def test_a_layer_has_two_all_reduces_and_a_boundary_one_message() -> None:
    once = all_reduce_ms(512 * 3 * 7 * 2, 4, LINKED)
    assert layers_reduce_ms(4, 512, 7, 4, LINKED, batch=3) == pytest.approx(8 * once)
    assert layers_reduce_ms(4, 512, 7, 1, ALONE) == 0
    assert send_ms(450e3, LINKED) == pytest.approx(0.006 + 0.001)
    assert pipeline_ms(10.0, 3, 450e3, LINKED) == pytest.approx(10 + 2 * 0.007), "no faster than one device"
    assert pipeline_ms(10.0, 1, 450e3, ALONE) == 10


def test_impossible_messages_and_unknown_links_are_refused() -> None:
    for message, degree in ((-1.0, 2), (float("inf"), 2), (float("nan"), 2), (1.0, 0)):
        with pytest.raises(ValueError):
            all_reduce_ms(message, degree, LINKED)
    with pytest.raises(UsageError, match="alone must say link_alpha_us"):
        all_reduce_ms(1.0, 2, ALONE)
    for stages, blocks in ((0, [1.0]), (1, [])):
        with pytest.raises(ValueError):
            pipeline_stages(blocks, stages)


def test_the_degree_is_the_least_that_divides_the_heads_and_fits() -> None:
    def needed(total: float) -> Callable[[int], float]:
        return lambda n: total / n

    assert tensor_parallel_degree(needed(1e9), LINKED, SHAPE) == 1
    assert tensor_parallel_degree(needed(1.01e9), LINKED, SHAPE) == 2
    assert tensor_parallel_degree(needed(2.5e9), LINKED, SHAPE) == 4, "3 does not divide 8 KV heads"
    six = replace(SHAPE, heads=12, kv_heads=6)
    assert tensor_parallel_degree(needed(2.5e9), LINKED, six) == 3
    assert tensor_parallel_degree(lambda n: 0.0 if n == 8 else float("inf"), LINKED, SHAPE) == 8
    with pytest.raises(Infeasible, match=r"1\.00 GB, but the candidate needs 9\.00 GB on one, 4\.50 GB on each of 2"):
        tensor_parallel_degree(needed(9e9), LINKED, SHAPE)
    with pytest.raises(Infeasible, match=r"needs 1\.01 GB on one \(1 devices, 8 KV heads"):
        tensor_parallel_degree(needed(1.01e9), ALONE, SHAPE)
    with pytest.raises(Infeasible, match="cannot be divided among 2"):
        tensor_parallel_degree(lambda n: 9e9 if n == 1 else float("inf"), LINKED, SHAPE)
    fact = degree_fact(4, LINKED)
    assert (fact.value, fact.unit, fact.provenance) == (4, "devices", "predicted")


def test_what_k_is_divided_into_is_whole_groups_and_blocks() -> None:
    assert split_problem(whole(), SHAPE, 8) is None
    assert split_problem(whole(INT4), SHAPE, 4) is None  # 1024 / 4 and 1536 / 4 are multiples of 128
    problem = split_problem(whole(INT4), SHAPE, 8)  # 1536 / 8 = 192
    assert problem is not None and "inner width 1536 of the FFN must be whole groups of 128 on each of 8" in problem
    assert split_problem(whole(replace(INT4, group_size=64)), SHAPE, 8) is None
    assert split_problem(whole(replace(INT4, group_size=0)), SHAPE, 8) is None, "one scale per channel"
    thin = replace(SHAPE, head_dim=16, heads=8)
    assert split_problem(whole(pattern=Pattern("2:4", 0.5)), thin, 8) is None
    problem = split_problem(whole(pattern=Pattern("block", 0.5)), thin, 8)  # one head of 16, blocks are 32 wide
    assert problem is not None and "inner width 128 of the attention must be whole groups of 32" in problem
    cut = Candidate((Layer(1536, 8), Layer(1536, 6)))
    problem = split_problem(cut, SHAPE, 4)
    assert problem is not None and "layer 1 has 6 KV heads" in problem
    with pytest.raises(Infeasible, match="layer 1 has 6"):
        split_candidate(cut, SHAPE, 4)
    assert split_candidate(cut, SHAPE, 2) == Candidate((Layer(768, 4), Layer(768, 3)))
    with pytest.raises(Infeasible, match="8 KV heads must be a multiple of the number of devices, but got 3"):
        split_shape(SHAPE, 3)
    assert split_shape(replace(SHAPE, vocab=32001), 2) == replace(SHAPE, heads=8, kv_heads=4, ffn=768, vocab=16001), (
        "the width of the residual stream stays"
    )


def test_bytes_of_a_device_are_those_of_its_tensors() -> None:
    """By hand: matrices divided, norms whole; four devices together hold the model and three times its norms more."""
    attention, ffn, norms = 512 * 64 * (16 + 16 + 8 + 8), 3 * 512 * 1536, 2 * 512
    tables = 2 * 32000 * 512
    by_hand = 4 * (4 * ((attention + ffn) / 4 + norms) + tables / 4 + 512)
    assert weight_bytes(whole(), SHAPE, 4) == by_hand
    assert weight_bytes(whole(), SHAPE) == 4 * SHAPE.parameters
    assert 4 * weight_bytes(whole(), SHAPE, 4) - weight_bytes(whole(), SHAPE) == 3 * 4 * (4 * norms + 512)
    tied = replace(SHAPE, tied=True)
    assert weight_bytes(whole(), tied) == 4 * tied.parameters
    assert weight_bytes(replace(whole(), head_format=INT4), tied) > 4 * tied.parameters, "an own table for the head"
    four_bits = 4 * (4 * norms + 512) + (4 * (attention + ffn) + tables) * (0.5 + 4 / 128)
    assert weight_bytes(whole(INT4), SHAPE) == four_bits
    assert cache_bytes(whole(), SHAPE, 100) == 2 * 4 * 8 * 64 * 100 * 4
    assert cache_bytes(whole(), SHAPE, 100, 8, batch=3, value_bytes=2) == 2 * 4 * 64 * 100 * 3 * 2
    stages = stage_bytes(whole(), SHAPE, 100)
    assert len(stages) == 6 and sum(stages) == weight_bytes(whole(), SHAPE) + cache_bytes(whole(), SHAPE, 100)
    with pytest.raises(Infeasible):
        weight_bytes(whole(INT4), SHAPE, 8)


def test_pipeline_stages_have_the_smallest_possible_largest_stage() -> None:
    generator = np.random.default_rng(0)
    for _ in range(60):
        blocks = [float(b) for b in generator.integers(1, 30, generator.integers(1, 9))]
        for stages in range(1, 6):
            found = pipeline_stages(blocks, stages)
            assert [i for stage in found for i in stage] == list(range(len(blocks))) and len(found) <= stages
            best = min(  # every way to cut, by trying them all
                max(sum(blocks[a:b]) for a, b in zip((0, *cuts), (*cuts, len(blocks)), strict=True))
                for count in range(min(stages, len(blocks)))
                for cuts in combinations(range(1, len(blocks)), count)
            )
            assert max(sum(blocks[i] for i in stage) for stage in found) == best


def test_the_worked_example_of_the_page_is_what_the_functions_say() -> None:
    text = (ROOT / "docs" / "parallel.md").read_text()
    profile = SimpleNamespace(
        name="example", memory_bytes=80 * 10**9, devices=8, link_alpha_us=6.0, link_gb_per_s=450.0
    )
    values = {
        "one all-reduce, decode (µs)": 1e3 * all_reduce_ms(8192 * 2, 8, profile),
        "all layers, decode (ms)": layers_reduce_ms(80, 8192, 1, 8, profile),
        "one all-reduce, prefill (µs)": 1e3 * all_reduce_ms(8192 * 128 * 2, 8, profile),
        "all layers, prefill (ms)": layers_reduce_ms(80, 8192, 128, 8, profile),
        "pipeline of 8 stages, decode (ms)": pipeline_ms(0.0, 8, 8192 * 2, profile),
    }
    rows = dict(re.findall(r"^\| ([^|]+?) \| [^|]+ \| ([\d.]+) \|$", text, re.MULTILINE))
    assert rows.keys() == values.keys()
    for name, value in values.items():
        digits = len(rows[name].partition(".")[2])
        assert float(rows[name]) == round(value, digits), name


# --- shards -----------------------------------------------------------------------------------------------------------


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
    assert max(sum(v.numel() for v in shard.values()) for shard in shards) <= shard_parameters(teacher.shape, 2)
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


# --- two processes ----------------------------------------------------------------------------------------------------


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


def test_each_process_holds_half(folders: dict[str, str], found: list[dict[str, Any]]) -> None:
    for model in MODELS:
        total = load_teacher(folders[model]).parameters
        for rank in found:
            assert total / 2 <= rank[f"{model}/numbers"] < 0.62 * total, model


# --- the launcher -----------------------------------------------------------------------------------------------------

AS_RANK = "from paretune.compression.ranks import as_rank\nimport os, signal, sys, time\n"


def program(folder: Path, body: str) -> list[str]:
    file = folder.parent / f"{folder.name}.py"
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    file.write_text(
        f"{AS_RANK}def work(folder, rank, ranks):\n"
        "    (folder / f'own{rank}').write_text(str(os.getpid()))\n"
        "    os.replace(folder / f'own{rank}', folder / f'pid{rank}')\n"
        f"{lines}as_rank(work)\n"
    )
    return [str(file)]


def living(folder: Path) -> list[int]:
    """Ranks that still run; one that is dead and only not yet collected does not."""
    return [pid for file in folder.glob("pid*") if runs(pid := int(file.read_text()))]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "if rank == 1: raise ValueError('no such tensor')\ntime.sleep(60)",
            "rank 1 of 2 failed: ValueError: no such tensor",
        ),
        (
            "if rank == 0: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)",
            "rank 0 of 2 failed: it was ended by SIGKILL",
        ),
        (
            "if rank == 1:\n  print('last words', file=sys.stderr, flush=True)\n  os._exit(7)\ntime.sleep(60)",
            "exit status 7: last words",
        ),
        (
            "if rank == 1: raise ValueError('the cause')\ntime.sleep(0.3)\nraise ValueError('a neighbour is gone')",
            "the cause",
        ),
    ],
)
def test_a_rank_that_dies_ends_all_with_its_reason(body: str, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    folder.mkdir()
    with pytest.raises(EnvironmentProblem, match=re.escape(words)):
        run_ranks(program(folder, body), 2, folder, 60)
    assert not living(folder)


def test_ranks_that_hang_are_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    folder.mkdir()
    with pytest.raises(EnvironmentProblem, match=r"2 ranks were not done after 1\.5 s"):
        run_ranks(program(folder, "time.sleep(60)"), 2, folder, 1.5)
    assert not living(folder)


def test_all_wait_for_the_last_and_a_good_end_is_silent(tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    folder.mkdir()
    run_ranks(program(folder, "time.sleep(0.5 * rank)\n(folder / f'end{rank}').touch()"), 2, folder, 60)
    assert (folder / "end0").exists() and (folder / "end1").exists() and not living(folder)


def test_a_killed_launcher_leaves_no_rank_behind(tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    folder.mkdir()
    arguments = program(folder, "time.sleep(60)")
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from pathlib import Path\nfrom paretune.compression.ranks import run_ranks\n"
            f"run_ranks({arguments!r}, 2, Path({str(folder)!r}), 60)",
        ]
    )
    deadline = time.monotonic() + 30
    while len(list(folder.glob("pid*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(living(folder)) == 2
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    while living(folder) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not living(folder)


# --- the command ------------------------------------------------------------------------------------------------------


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
    from paretune.teachers import user_corpus
    from paretune.teachers.tokens import token_split

    windows = token_split(tiny_teacher, user_corpus(tiny_text), "report", tmp_path / "cache").windows(256, 2000)
    network, sums, counts = Network(tiny_teacher.config, tiny_teacher.shape, 3), {}, {}
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

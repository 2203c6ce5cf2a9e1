"""Kept soft labels: their KL against the full one, a hit against a miss, and what happens to damaged or too many files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from paretune.compression.distill import LabelCache
from paretune.compression.distill.loss import SoftLabels, TopLabels, distillation_loss

VOCAB, K = 50, 8


def random_logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(2, 6, VOCAB, generator=torch.Generator().manual_seed(seed))


def explicit(student: torch.Tensor, teacher: torch.Tensor, k: int, temperature: float) -> tuple[float, float]:
    """(full KL, what cutting to k tokens and a bucket leaves out), by sums in double precision."""
    full = tail = 0.0
    rows = student.shape[0] * student.shape[1]
    for x, y in zip(student.flatten(0, 1).double(), teacher.flatten(0, 1).double(), strict=True):
        q, p = (x / temperature).softmax(0), (y / temperature).softmax(0)
        full += float((p * (p / q).log()).sum())
        others = p.argsort(descending=True)[k:]
        rest_p, rest_q = float(p[others].sum()), float(q[others].sum())
        tail += float((p[others] * ((p[others] / rest_p) / (q[others] / rest_q)).log()).sum())
    return full / rows, tail / rows


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_kl_of_the_cut_labels_misses_exactly_the_tails_own(temperature: float) -> None:
    student, teacher = random_logits(0), random_logits(1)
    full, tail = explicit(student, teacher, K, temperature)
    labels = TopLabels.of(teacher, K, temperature)
    found = float(labels.kl(student))
    assert float(SoftLabels(teacher, temperature).kl(student)) == pytest.approx(full, rel=1e-5)
    assert found == pytest.approx(full - tail, rel=1e-5) and 0 < tail < full
    without_bucket = TopLabels(labels.tokens, labels.log_top, torch.full_like(labels.log_rest, -math.inf), temperature)
    assert abs(float(without_bucket.kl(student)) - (full - tail)) > 0.1 * full, "the bucket is what the test would miss"
    assert float(TopLabels.of(teacher, VOCAB, temperature).kl(student)) == pytest.approx(full, rel=1e-4)
    assert float(labels.kl(teacher)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_of_the_cut_labels_is_autograds(temperature: float) -> None:
    student, teacher = random_logits(2).requires_grad_(), random_logits(3)
    labels = TopLabels.of(teacher, K, temperature)
    (mine,) = torch.autograd.grad(labels.kl(student), student)
    q = (student / temperature).flatten(0, 1).softmax(-1)
    top = q.gather(1, labels.tokens)
    cross = -(labels.top * top.log()).sum() - (labels.rest * (1 - top.sum(1)).log()).sum()
    (theirs,) = torch.autograd.grad(cross / len(q), student)
    bar = 5e-3 * float(theirs.abs().max())
    assert torch.allclose(mine, theirs, atol=bar)
    assert not torch.allclose(mine, 0.9 * theirs, atol=bar), "the bar would let a wrong scale pass"


def test_temperature_keeps_the_size_of_the_gradient_and_weights_are_factors() -> None:
    student, teacher = random_logits(4), random_logits(5)
    ids = torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 3.0):
        labels = SoftLabels(teacher, temperature)
        kl, _ = explicit(student, teacher, K, temperature)
        ce = -float(student[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean())
        found = float(distillation_loss(student, labels, ids, 0.25, 2.0))
        assert found == pytest.approx(2.0 * temperature**2 * kl + 0.25 * ce, rel=1e-5)
        assert float(distillation_loss(student, labels, ids, 1.0, 0.0)) == pytest.approx(ce, rel=1e-5)


class Source:
    """Logits that count how often they were computed."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits, self.calls = logits, 0

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        return self.logits


IDS = torch.arange(12).view(2, 6)


def cache(folder: Path, *content: str, k: int = K, temperature: float = 1.0, most_bytes: int = 2**20) -> LabelCache:
    return LabelCache(folder, content or ("teacher", "text"), k, temperature, most_bytes)


def equal(a: TopLabels, b: TopLabels) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("tokens", "top", "rest", "entropy"))


def test_a_hit_is_the_miss_bit_for_bit_and_runs_no_teacher(tmp_path: Path) -> None:
    source, first, second = Source(random_logits(6)), cache(tmp_path), cache(tmp_path)
    fresh = first.labels(IDS, source)
    kept = second.labels(IDS, source)
    assert equal(fresh, kept) and source.calls == 1
    assert (first.hits, first.misses, second.hits, second.misses) == (0, 1, 1, 0)
    second.labels(IDS + 1, source)
    for other in (cache(tmp_path, "another", "text"), cache(tmp_path, k=4), cache(tmp_path, temperature=2.0)):
        other.labels(IDS, source)
    assert source.calls == 5, "other tokens, teacher, k or temperature are other labels"


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_kl_from_the_file_is_within_its_bound(tmp_path: Path, temperature: float) -> None:
    """The tail's own KL, and what half precision does to log p: one part in 2^11 of it, and as much relative error in p."""
    student, teacher = random_logits(7), random_logits(8)
    full, tail = explicit(student, teacher, K, temperature)
    kept = cache(tmp_path, temperature=temperature)
    kept.labels(IDS, Source(teacher))
    labels = cache(tmp_path, temperature=temperature).labels(IDS, Source(teacher))
    largest = float(((student - student.mean()).abs().max() + (teacher - teacher.mean()).abs().max()) / temperature)
    rounding = 2.0**-11 * 12.0 * (1 + 2 * largest)  # |log p| <= 12 for the tokens that count
    assert abs(float(labels.kl(student)) - (full - tail)) < rounding < 0.2 * full
    coarse = TopLabels(labels.tokens, labels.log_top.div(0.5).round().mul(0.5), labels.log_rest, temperature)
    assert abs(float(coarse.kl(student)) - (full - tail)) > abs(float(labels.kl(student)) - (full - tail))


def flip(data: bytes) -> bytes:
    return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]


@pytest.mark.parametrize("damage", [flip, lambda data: data[: len(data) // 2], lambda _: b"", lambda _: b"x" * 100])
def test_a_damaged_file_is_a_miss_and_mended(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    source = Source(random_logits(9))
    good = cache(tmp_path).labels(IDS, source)
    (file,) = tmp_path.glob("*/*.zst")
    file.write_bytes(damage(file.read_bytes()))
    broken = cache(tmp_path)
    assert equal(broken.labels(IDS, source), good) and (broken.hits, broken.misses) == (0, 1)
    again = cache(tmp_path)
    assert equal(again.labels(IDS, source), good) and again.hits == 1


def test_labels_of_another_batch_under_this_name_are_a_miss(tmp_path: Path) -> None:
    source = Source(random_logits(10))
    kept = cache(tmp_path)
    kept.labels(IDS, source)
    (mine,) = tmp_path.glob("*/*.zst")
    kept.labels(IDS + 1, Source(random_logits(11)))
    (other,) = (p for p in tmp_path.glob("*/*.zst") if p != mine)
    mine.write_bytes(other.read_bytes())
    again = cache(tmp_path)
    again.labels(IDS, source)
    assert again.misses == 1


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_the_files_stay_within_their_room(tmp_path: Path) -> None:
    one = cache(tmp_path / "probe")
    one.labels(IDS, Source(random_logits(12)))
    most = int(4.5 * size(tmp_path / "probe"))
    old = cache(tmp_path / "c", "old", most_bytes=most)
    for i in range(9):
        old.labels(IDS + i, Source(random_logits(20 + i)))
    assert size(tmp_path / "c") <= most and old.misses == 9
    again = cache(tmp_path / "c", "old", most_bytes=most)
    for i in range(9):
        again.labels(IDS + i, Source(random_logits(20 + i)))
    assert again.hits == 4, "the first ones were kept, the rest had no room"
    new = cache(tmp_path / "c", "new", most_bytes=most)
    for i in range(9):
        new.labels(IDS + i, Source(random_logits(40 + i)))
    assert size(tmp_path / "c") <= most and not old.folder.exists(), "another content made room"


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    source = Source(random_logits(13))
    blocked = cache(tmp_path / "file")
    assert equal(blocked.labels(IDS, source), blocked.labels(IDS, source)) and source.calls == 2


def test_no_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at least one token.*k=0"):
        cache(tmp_path, k=0)

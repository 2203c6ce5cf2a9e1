"""The elastic student: one set of weights whose prefixes are all student sizes, trained once per teacher.

Every step distils the smallest student or a random one, and a second random one, from the frozen teacher (the sandwich
rule of Yu & Huang 2019 without its largest member: at full size the teacher's own weights serve). The cost does not depend
on how many sizes are searched. Checkpointed and resumable; the result is kept by the content it depends on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from paretune.common.files import warn_damaged
from paretune.compression.distill.loss import SoftLabels, distillation_loss
from paretune.compression.distill.optimizer import Optimizers, decay
from paretune.compression.network.student import Network
from paretune.compression.prune import Importance, importance, layer_statistics, slice_weights, sort_by_importance
from paretune.hardware_profiles.detect import package_version
from paretune.hardware_profiles.training_precision import autocast
from paretune.spaces.candidate import Candidate, Layer
from paretune.spaces.space import Space
from paretune.teachers.checkpoint.teacher import Teacher
from paretune.teachers.checkpoint.training_state import (
    DAMAGED,
    load_tensors,
    optimizer_tensors,
    restore_optimizers,
    save_tensors,
)
from paretune.teachers.text.batches import Batches

CHECKPOINT_EVERY_S = 20.0
CODE = (
    "network/inputs.py",
    "distill/elastic.py",
    "distill/loss.py",
    "distill/optimizer.py",
    "prune/structure.py",
    "prune/statistics.py",
    "network/student.py",
    "../teachers/checkpoint/families.py",
)


@dataclass(frozen=True)
class ElasticRecipe:
    """`seconds` of training on this machine; `smallest_share` is how often the smallest student takes the first place."""

    seconds: float
    context: int = 256
    batch: int = 6
    muon_lr: float = 0.004
    adamw_lr: float = 7e-4
    ce_weight: float = 0.0
    smallest_share: float = 0.1
    seed: int = 0


def elastic_key(teacher: Teacher, corpus_fingerprint: str, space: Space, recipe: ElasticRecipe) -> str:
    """Content key: teacher, text, space bounds, recipe, the code that computes it, library versions."""
    root = Path(__file__).resolve().parent.parent
    parts = [
        teacher.digest,
        corpus_fingerprint,
        json.dumps(asdict(recipe), sort_keys=True),
        repr((space.min_depth, space.ffn_widths, space.min_kv_groups, space.hidden_widths)),
        package_version("torch"),
        package_version("transformers"),
        *(hashlib.sha256((root / name).read_bytes()).hexdigest() for name in CODE),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


class ElasticTrainer:
    """Trains in slices of time; `weights` are the sorted elastic weights, `order` what they were sorted by."""

    def __init__(
        self,
        teacher: Teacher,
        space: Space,
        train: Any,
        calibration: torch.Tensor,
        recipe: ElasticRecipe,
        file: Path,
        machine: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.space, self.shape, self.recipe, self.file, self.machine = space, teacher.shape, recipe, file, machine
        self.config = teacher.config
        self.teacher_weights = teacher.weights()
        self.networks: dict[int, Network] = {}
        self.batches = Batches(train, recipe.context, recipe.batch, recipe.seed)
        self.step_count, self.elapsed, self.loss = 0, 0.0, float("nan")
        self.threads = torch.get_num_threads()
        self.saved, self.saving_s = time.monotonic(), 0.0
        if not self._resume():
            statistics = layer_statistics(self.network(self.shape.layers), self.teacher_weights, calibration)
            self.order = importance(statistics, self.shape, hidden=len(space.hidden_widths) > 1)
            self.parameters = _parameters(sort_by_importance(self.teacher_weights, self.order, self.shape))
            self.optimizers = Optimizers(self.parameters, recipe.muon_lr, recipe.adamw_lr)

    @property
    def done(self) -> bool:
        """Whether training has used all of the recipe's seconds."""
        return self.elapsed >= self.recipe.seconds

    @property
    def tokens(self) -> int:
        """Number of tokens trained on so far, over all runs."""
        return self.step_count * self.recipe.batch * self.recipe.context

    def network(self, depth: int) -> Network:
        """Return the network of `depth` layers; it is built once and kept."""
        if depth not in self.networks:
            self.networks[depth] = Network(self.config, self.shape, depth)
        return self.networks[depth]

    def run(self, seconds: float) -> dict[str, float]:
        """Train for about `seconds` (or until done), checkpointing on the way; returns progress."""
        if self.done:  # kept from an earlier search: the file stays as it is
            return self._progress()
        start = now = time.monotonic()
        while not self.done and now - start < seconds:
            with self.machine():
                mark = time.monotonic()  # waiting for a measurement to end is no training
                self.step()
                now = time.monotonic()
            self.elapsed += now - mark
            if now - self.saved > CHECKPOINT_EVERY_S:
                self._save_seldom()
        self._save_seldom()
        return self._progress()

    def _progress(self) -> dict[str, float]:
        return {"elapsed_s": self.elapsed, "tokens": float(self.tokens), "loss": self.loss}

    def step(self) -> None:
        """One batch: two students against the teacher."""
        ids = self.batches.at(self.step_count)
        generator = torch.Generator().manual_seed(self.recipe.seed * 7_919 + self.step_count)
        with autocast():
            with torch.no_grad():
                target = SoftLabels(self.network(self.shape.layers)(self.teacher_weights, ids))
            losses = []
            for candidate in self._students(generator):
                logits = self.network(len(candidate.layers))(
                    slice_weights(self.parameters, candidate, self.order, self.shape), ids
                )
                loss = distillation_loss(logits, target, ids, self.recipe.ce_weight)
                torch.autograd.backward(loss)
                losses.append(loss.item())
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizers.step(decay(self.step_count, self.elapsed / self.recipe.seconds))
        self.step_count += 1
        self.loss = sum(losses) / len(losses)

    def _save_seldom(self) -> None:
        """Save, when done or unless the last time is so recent that a large model would do little else: 5 % of the time."""
        if self.done or time.monotonic() - self.saved >= 20 * self.saving_s:
            self.save()

    def save(self) -> None:
        """Everything that training needs to go on."""
        start = time.monotonic()
        meta = {
            "step": self.step_count,
            "elapsed": self.elapsed,
            "recipe": asdict(self.recipe),
            "order": asdict(self.order),
            "done": self.done,
            "tokens": self.tokens,
            "threads": self.threads,
        }
        save_tensors(
            self.file, {**self.parameters, **({} if self.done else optimizer_tensors(self.optimizers.pair))}, meta
        )
        self.saved = time.monotonic()
        self.saving_s = self.saved - start

    def _resume(self) -> bool:
        """Take the kept state; False if there is none or it is damaged."""
        if not self.file.exists():
            return False
        try:
            tensors, meta = load_tensors(self.file)
            self._restore(tensors, meta)
        except DAMAGED as error:
            warn_damaged(self.file, error)
            return False
        return True

    def _restore(self, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        self.order = order_of(meta)
        # in the teacher's order, by which the optimizers number their state; the file is in the order of names
        self.parameters = _parameters({name: tensors[name] for name in self.teacher_weights})
        self.optimizers = Optimizers(self.parameters, self.recipe.muon_lr, self.recipe.adamw_lr)
        restore_optimizers(
            self.optimizers.pair, {name: value for name, value in tensors.items() if name.startswith("optimizer")}
        )
        self.step_count, self.elapsed = meta["step"], meta["elapsed"]
        self.threads = meta.get("threads", self.threads)

    def _students(self, generator: torch.Generator) -> list[Candidate]:
        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (1,), generator=generator))

        def random_student() -> tuple[int, int, int, int]:
            return (
                draw(self.space.min_depth, self.shape.layers),
                self.space.ffn_widths[draw(0, len(self.space.ffn_widths) - 1)],
                draw(self.space.min_kv_groups, self.shape.kv_heads),
                self._hidden(draw),
            )

        smallest = float(torch.rand(1, generator=generator)) < self.recipe.smallest_share
        least = (*self.space.smallest(), self.space.hidden_widths[0])
        sizes = [least if smallest else random_student(), random_student()]
        return [Candidate((Layer(ffn, groups),) * depth, hidden=hidden) for depth, ffn, groups, hidden in sizes]

    def _hidden(self, draw: Callable[[int, int], int]) -> int:
        """The teacher's residual width every other time: nearly all other sizes are searched at that one too."""
        narrower = self.space.hidden_widths[:-1]
        if not narrower or draw(0, 1):
            return self.space.hidden_widths[-1]
        return narrower[draw(0, len(narrower) - 1)]


def order_of(meta: Mapping[str, Any]) -> Importance:
    """The importance order in a checkpoint's meta."""
    order = meta["order"]
    return Importance(
        tuple(map(tuple, order["ffn"])),
        tuple(map(tuple, order["groups"])),
        tuple(order["layers"]),
        tuple(order.get("hidden", ())),
    )


def _parameters(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(value.clone()) for name, value in weights.items()}

"""What a worker keeps between trials: teacher, text, networks, student weights, calibration statistics, reference scores.

A worker is a pure consumer of the study's `setup` (a JSON file written once by the driver), so any process that can read
the study folder and the home can be one. Weights are memory-mapped by path; none travel in messages.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretune.common.errors import EnvironmentProblem, Infeasible, UsageError
from paretune.common.files import read_kept, warn_damaged, write_atomically
from paretune.compression.calibration.calibrated import calibrated_codes, sparsegpt_weights
from paretune.compression.calibration.sensitivity import measure_sensitivity, sensitivity_key
from paretune.compression.distill.elastic import ElasticRecipe, ElasticTrainer, elastic_key, order_of
from paretune.compression.network.student import ATTENTION, FFN, Codes, Network
from paretune.compression.prune import (
    Importance,
    LayerStatistics,
    importance,
    layer_statistics,
    mask_for,
    masks_of_student,
    slice_weights,
    sort_by_importance,
    warn_if_idle,
)
from paretune.hardware_profiles.detect import fingerprint
from paretune.hardware_profiles.lock import MachineLock
from paretune.hardware_profiles.profile import Profile
from paretune.objectives.quality.batching import WINDOW, batch_within_memory
from paretune.search.evaluators.threads import use_threads
from paretune.search.sensitivity_budget import BUDGET_SHARE, affordable_tokens
from paretune.search.spec import Spec
from paretune.search.students import with_students
from paretune.spaces.candidate import Candidate, Format
from paretune.spaces.mixed import Sensitivity
from paretune.spaces.space import Space
from paretune.teachers.checkpoint.teacher import Teacher, load_teacher
from paretune.teachers.checkpoint.training_state import DAMAGED, load_tensors, read_meta
from paretune.teachers.text.corpus import Corpus, Split, chosen_corpus
from paretune.teachers.text.tokens import TokenSplit, Windows, token_splits

CALIBRATION_TOKENS = 4000
KEPT_STRUCTURES = 24
GOLDEN = 0.6180339887498949


def read_corpus(spec: Spec) -> Corpus:
    """The text that a spec names. Raises UsageError."""
    return chosen_corpus(spec.data, spec.field)


@contextlib.contextmanager
def _infeasible_when_impossible() -> Iterator[None]:
    """A second-order method that meets infinite inputs or a width that fits no pattern rules out the candidate, not the study."""
    try:
        yield
    except ValueError as error:
        raise Infeasible(f"the calibrated method cannot be computed: {error}", "") from error


class Workspace:
    """Lazily loaded state of one worker process for one study."""

    def __init__(self, folder: Path, home: Path) -> None:
        setup = json.loads((folder / "setup.json").read_text(encoding="utf-8"))
        self.folder, self.home, self.cache = folder, home, home / "cache"
        self.spec, self.profile = Spec.model_validate(setup["spec"]), Profile.model_validate(setup["profile"])
        self._mild = bool(setup["mild"])
        self._text = setup.get("text")
        self.lock = MachineLock()
        self.fingerprint = fingerprint()
        self._networks: dict[int, Network] = {}
        self._statistics: OrderedDict[str, list[LayerStatistics]] = OrderedDict()
        self.threads = use_threads(self.profile)

    @cached_property
    def teacher(self) -> Teacher:
        """The study's teacher, checked again; converted weights are kept in the home's cache. Raises UsageError."""
        return load_teacher(self.spec.teacher).kept_in(self.cache)

    @cached_property
    def space(self) -> Space:
        """The space that spec and profile allow, with the sizes of the spec's `student_configs`."""
        given = self.spec.keep_zeros or self.teacher.has_masks
        space = Space.of(
            self.teacher.shape,
            self.profile.weight_formats,
            self._mild,
            self.spec.second_order,
            hidden=self.spec.hidden,
            given=given,
            choices=self.spec.choices,
        )
        return with_students(space, self.spec.student_configs)

    @cached_property
    def corpus_fingerprint(self) -> str:
        """Fingerprint of the text, 16 hex digits. Raises UsageError if it has changed since the study began."""
        return self._corpus.fingerprint()

    @cached_property
    def tokens(self) -> dict[Split, TokenSplit]:
        """Token ids of all four splits. Raises UsageError if the text has changed or a split is too small."""
        return token_splits(self.teacher, self._corpus, self.cache)

    @cached_property
    def search_windows(self) -> Windows:
        """The windows that rung 0 scores: about `search_tokens` targets and 2 % more."""
        return self.tokens["search"].windows(self.window, self.spec.search_tokens + self.spec.search_tokens // 50)

    @cached_property
    def report_windows(self) -> Windows:
        """In an order whose every beginning is spread over all documents: KL is taken over the first windows only."""
        found = self.tokens["report"].windows(self.window, self.spec.report_tokens)
        order = np.argsort(np.arange(len(found.ids)) * GOLDEN % 1.0, kind="stable")
        return replace(found, ids=found.ids[order], targets=found.targets[order], cluster=found.cluster[order])

    @property
    def window(self) -> int:
        """Length of the scored and trained windows in tokens."""
        return min(WINDOW, self.teacher.context)

    @cached_property
    def teacher_weights(self) -> dict[str, torch.Tensor]:
        """The teacher's weights as float32. Do not write into them."""
        return self.teacher.weights()

    def network(self, depth: int) -> Network:
        """Return the network of `depth` layers; it is built once and kept."""
        if depth not in self._networks:
            self._networks[depth] = Network(self.teacher.config, self.teacher.shape, depth)
        return self._networks[depth]

    def batch_within_memory(self, wanted: int) -> int:
        """`wanted` windows, or fewer where their logits would take too much memory."""
        return batch_within_memory(wanted, self.window, self.teacher.shape)

    @cached_property
    def elastic_recipe(self) -> ElasticRecipe:
        """The elastic student's recipe: its share of the budget in seconds, and a batch that fits into memory."""
        seconds = round(self.spec.budget_s * self.spec.shares.elastic, 1)
        return ElasticRecipe(
            seconds, context=self.window, batch=self.batch_within_memory(ElasticRecipe.batch), seed=self.spec.seed
        )

    @cached_property
    def elastic_file(self) -> Path:
        """Where the elastic student is kept, named by everything it depends on."""
        key = elastic_key(self.teacher, self.corpus_fingerprint, self.space, self.elastic_recipe)
        return self.cache / "elastic" / f"{self.teacher.name}-{key}.safetensors"

    def elastic_trainer(self) -> ElasticTrainer:
        """Return a trainer of the elastic student, which goes on from its file if there is one."""
        return ElasticTrainer(
            self.teacher,
            self.space,
            self.tokens["train"].ids,
            self.calibration_ids,
            self.elastic_recipe,
            self.elastic_file,
            self.lock.shared,
        )

    @cached_property
    def calibration_ids(self) -> torch.Tensor:
        """Token ids [windows, length] of about CALIBRATION_TOKENS tokens of calibration text."""
        return torch.from_numpy(self.tokens["calibration"].calibration(self.window, CALIBRATION_TOKENS))

    @cached_property
    def _elastic(self) -> tuple[dict[str, torch.Tensor], Importance]:
        try:
            tensors, meta = load_tensors(self.elastic_file)
            order = order_of(meta)
        except (FileNotFoundError, *DAMAGED) as error:
            raise EnvironmentProblem(
                f"the elastic student that this study cuts its candidates from is gone or damaged: {self.elastic_file} ({error})",
                "restore that file, or search again with another --study name",
            ) from None
        return {name: value for name, value in tensors.items() if not name.startswith("optimizer")}, order

    @cached_property
    def sorted_teacher(self) -> tuple[dict[str, torch.Tensor], Importance]:
        """The teacher's weights sorted by importance, and that order: the elastic student's if kept, else a new one."""
        order = self._kept_order()
        if order is None:
            order = importance(
                layer_statistics(self.network(self.teacher.shape.layers), self.teacher_weights, self.calibration_ids),
                self.teacher.shape,
                hidden=len(self.space.hidden_widths) > 1,
            )
        return sort_by_importance(self.teacher_weights, order, self.teacher.shape), order

    def forget_sorted_teacher(self) -> None:
        """Free the sorted copy of the weights; only the latency fit needs it, before all training."""
        vars(self).pop("sorted_teacher", None)

    def _kept_order(self) -> Importance | None:
        """What the elastic student is sorted by, also while it is in training."""
        if not self.elastic_file.exists():
            return None
        try:
            return order_of(read_meta(self.elastic_file))
        except DAMAGED as error:
            warn_damaged(self.elastic_file, error)
            return None

    def sensitivity(self, formats: tuple[Format, ...]) -> tuple[Sensitivity, bool]:
        """What the teacher's matrix groups lose in `formats`, and whether an earlier search had measured it.

        Raises ValueError where the budget has no time for it.
        """
        shape, cores = self.teacher.shape, self.profile.cores
        tokens = affordable_tokens(shape, len(formats), self.spec.budget_s, cores)
        key = sensitivity_key(self.teacher, self.corpus_fingerprint, formats, tokens, self.window)
        file = self.cache / "sensitivity" / f"{self.teacher.name}-{key}.json"
        table = self._kept_table(file)
        kept = table is not None
        if table is None:
            if not tokens:
                raise ValueError(f"the table takes more than {BUDGET_SHARE:.0%} of the budget")
            text = self.tokens["calibration"].windows(self.window, tokens)
            ids, targets = torch.from_numpy(text.ids), torch.from_numpy(text.targets)
            batch = self.batch_within_memory(len(ids))
            table = measure_sensitivity(
                self.network, self.teacher_weights, shape, formats, ids, targets, batch, self.lock.shared
            )
            write_atomically(file, json.dumps(table.to_dict()).encode())
        order = self._kept_order() or self.sorted_teacher[1]
        self.forget_sorted_teacher()
        return replace(table, order=order.layers), kept

    @staticmethod
    def _kept_table(file: Path) -> Sensitivity | None:
        known = read_kept(file)
        try:
            return None if known is None else Sensitivity.from_dict(known)
        except (KeyError, TypeError, ValueError) as error:
            warn_damaged(file, error)
            return None

    def dense_weights(self, candidate: Candidate) -> dict[str, torch.Tensor]:
        """The teacher's own weights at full size, else a slice of the elastic student."""
        if candidate.is_full_size(self.teacher.shape):
            return self.teacher_weights
        weights, order = self._elastic
        return slice_weights(weights, candidate, order, self.teacher.shape)

    def kept_layers(self, candidate: Candidate) -> list[int]:
        """The teacher's layers that a candidate keeps, in their order."""
        if len(candidate.layers) == self.teacher.shape.layers:
            return list(range(self.teacher.shape.layers))
        return self._elastic[1].kept_layers(len(candidate.layers))

    def sparsify(
        self, candidate: Candidate, dense: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The `dense` weights with zeros by the layers' patterns, and the masks (none for a dense candidate).

        SparseGPT also moves what it keeps. Warns (NothingChanged) if no weight goes. Raises Infeasible where it cannot be computed.
        """
        weights, masks = dict(dense), dict[str, torch.Tensor]()
        if not candidate.is_sparse:
            return weights, masks
        network = self.network(len(candidate.layers))
        with _infeasible_when_impossible():
            second_order = sparsegpt_weights(network, dense, candidate, self.calibration_ids)
        calibrated = any(x.pattern.score in ("wanda", "activation") for x in candidate.layers)
        statistics = self._layer_statistics(candidate, dense) if calibrated else None
        masks |= self._given(candidate)
        for i, layer in enumerate(candidate.layers):
            if layer.pattern.kind in ("none", "given"):
                continue
            for name in (*ATTENTION, *FFN):
                full = f"model.layers.{i}.{name}.weight"
                if full not in dense:
                    continue  # a family without gate
                if full in second_order:
                    masks[full], weights[full] = second_order[full]
                else:
                    norms = None if statistics is None else statistics[i].input_norms[name]
                    masks[full] = mask_for(dense[full], layer.pattern, norms)
        for name, mask in masks.items():
            if name not in second_order:
                weights[name] = dense[name] * mask
        warn_if_idle(masks, f"the pattern of this candidate drops no weight: {candidate.describe()}")
        return weights, masks

    def _given(self, candidate: Candidate) -> dict[str, torch.Tensor]:
        """The masks that the teacher came with, as far as the candidate keeps them."""
        if all(layer.pattern.kind != "given" for layer in candidate.layers):
            return {}
        weights = self.teacher_weights
        order = self._elastic[1] if not candidate.is_full_size(self.teacher.shape) else Importance((), (), ())
        return masks_of_student(self.teacher_masks, weights, candidate, order, self.teacher.shape)

    @cached_property
    def teacher_masks(self) -> dict[str, torch.Tensor]:
        """Masks of torch.nn.utils.prune, and with `keep_zeros` the teacher's plain zeros."""
        return self.teacher.masks(self.spec.keep_zeros)

    def codes(self, candidate: Candidate, weights: Mapping[str, torch.Tensor]) -> Codes:
        """Codes of the matrices whose format needs calibration text, from the weights as they are now (masked, recovered or not)."""
        with _infeasible_when_impossible():
            return calibrated_codes(self.network(len(candidate.layers)), weights, candidate, self.calibration_ids)

    def _layer_statistics(self, candidate: Candidate, weights: Mapping[str, torch.Tensor]) -> list[LayerStatistics]:
        key = candidate.structure_key
        if key not in self._statistics:
            self._statistics[key] = layer_statistics(self.network(len(candidate.layers)), weights, self.calibration_ids)
            if len(self._statistics) > KEPT_STRUCTURES:
                self._statistics.popitem(last=False)
        self._statistics.move_to_end(key)
        return self._statistics[key]

    @property
    def _corpus(self) -> Corpus:
        if not hasattr(self, "_read_corpus"):
            found = read_corpus(self.spec)
            if self._text and self._text != found.fingerprint():  # not kept by older studies
                raise UsageError(
                    f"the text must stay the same during a study, but {found.source} has changed since it began",
                    "restore it, or search again with another --study name",
                )
            self._read_corpus = found
        return self._read_corpus

    def npy(self, name: str, array: Any) -> Path:
        """An array as a file for an engine child, written once per study."""
        path = self.folder / "work" / f"{name}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp.npy")
            np.save(temporary, array)
            temporary.replace(path)
        return path

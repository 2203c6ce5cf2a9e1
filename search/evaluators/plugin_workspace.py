"""What a worker keeps between trials of a plug-in: its module, slices of it, batches, norms, and one graph per structure."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from paretune.common.errors import Infeasible
from paretune.compression.calibration.modules import (
    Matrix,
    effective_weights,
    forms_of,
    groups_of,
    input_norms,
    matrices_of,
    matrix_mask,
    shape_of_module,
)
from paretune.compression.export.module_graph import ModuleGraph
from paretune.hardware_profiles.detect import fingerprint
from paretune.hardware_profiles.lock import MachineLock
from paretune.hardware_profiles.profile import Profile
from paretune.objectives.quality.module_quality import Judged, judge
from paretune.search.evaluators.threads import use_threads
from paretune.search.spec import Spec
from paretune.spaces.candidate import Format
from paretune.spaces.module_candidate import ModuleCandidate
from paretune.spaces.module_space import ModuleSpace
from paretune.teachers.plugins.plugin import Batch, Forwarding, PluginTeacher, find_plugin, still
from paretune.teachers.text.corpus import Split

KEPT_STRUCTURES = 8
Weights = dict[str, torch.Tensor]


class PluginWorkspace:
    """Lazily loaded state of one worker process for one study of a plug-in."""

    def __init__(self, folder: Path, home: Path) -> None:
        setup = json.loads((folder / "setup.json").read_text(encoding="utf-8"))
        self.folder, self.home, self.cache = folder, home, home / "cache"
        self.spec, self.profile = Spec.model_validate(setup["spec"]), Profile.model_validate(setup["profile"])
        self._plugin_folder = Path(setup["plugin_folder"])
        self.lock = MachineLock()
        self.fingerprint = fingerprint()
        self._modules: dict[str, nn.Module] = {}
        self._graphs: dict[str, ModuleGraph] = {}
        self._norms: dict[str, Weights] = {}
        self.threads = use_threads(self.profile)

    @cached_property
    def teacher(self) -> PluginTeacher:
        """The study's plug-in. Raises UsageError if it cannot be found or imported."""
        return PluginTeacher(find_plugin(self.spec.teacher, self._plugin_folder))

    @cached_property
    def space(self) -> ModuleSpace:
        """The space of the plug-in's module, limited to what the profile has kernels for."""
        return ModuleSpace.of(shape_of_module(self.teacher.plugin, self.teacher.module), self.profile.weight_formats)

    @cached_property
    def groups(self) -> dict[str, str]:
        """Group of every matrix by parameter name."""
        return groups_of(matrices_of(self.teacher.module))

    @cached_property
    def batch(self) -> Batch:
        """The batch whose shape is exported and timed."""
        return self.batches("calibration")[0]

    def batches(self, split: Split) -> list[Batch]:
        """Return all batches of a split; they are kept after the first call."""
        if split not in self._batches:
            self._batches[split] = list(self.teacher.plugin.batches(split))
        return self._batches[split]

    @cached_property
    def _batches(self) -> dict[str, list[Batch]]:
        return {}

    def module(self, candidate: ModuleCandidate) -> nn.Module:
        """The teacher itself at full size, else a slice of it. Raises Infeasible with the plug-in's own words."""
        if candidate.is_full_size(self.space.shape):
            return self.teacher.module
        if candidate.structure_key not in self._modules:
            try:
                made = still(self.teacher.plugin.slice(self.teacher.module, dict(candidate.widths)))
            except Exception as error:  # the author's code: this size is not possible, others may be
                raise Infeasible(
                    f"slicing to {dict(candidate.widths)} failed: {type(error).__name__}: {error}", ""
                ) from error
            _keep(self._modules, candidate.structure_key, made)
        return self._modules[candidate.structure_key]

    def forwarding(self, candidate: ModuleCandidate) -> Forwarding:
        """Return the candidate's module, called as the plug-in says. Raises Infeasible if it cannot be sliced."""
        return Forwarding(self.teacher.plugin, self.module(candidate))

    def matrices(self, candidate: ModuleCandidate) -> dict[str, Matrix]:
        """Return the matrices of the candidate's module by name. Raises Infeasible if it cannot be sliced."""
        return matrices_of(self.module(candidate))

    def forms(self, candidate: ModuleCandidate) -> dict[str, Format]:
        """Format of every matrix that is quantized."""
        return forms_of(candidate, self.groups, self.matrices(candidate))

    def sparsify(self, candidate: ModuleCandidate) -> tuple[Weights, Weights]:
        """All parameters with zeros by the groups' patterns, and the masks of the matrices that have one."""
        module = self.module(candidate)
        weights = {name: p.detach() for name, p in module.named_parameters()}
        masks: Weights = {}
        for name, matrix in self.matrices(candidate).items():
            pattern = candidate.of(self.groups[name]).pattern
            norms = self._input_norms(candidate)[name] if pattern.score == "wanda" else None
            mask = matrix_mask(weights[name], matrix, pattern, norms)
            if mask is not None:
                masks[name], weights[name] = mask, weights[name] * mask
        return weights, masks

    def effective(self, candidate: ModuleCandidate, weights: Mapping[str, torch.Tensor]) -> Weights:
        """What the engine computes with."""
        with torch.no_grad():
            return effective_weights(weights, self.matrices(candidate), self.forms(candidate))

    @torch.no_grad()
    def judge(self, candidate: ModuleCandidate, weights: Mapping[str, torch.Tensor], split: Split) -> Judged:
        """Quality in torch with fake-quant. Raises Infeasible where it is not finite."""
        forwarding, effective = self.forwarding(candidate), self.effective(candidate, weights)
        batches = self.batches(split)
        return judge(self.teacher.plugin, batches, (forwarding.with_weights(effective, b.inputs) for b in batches))

    def graph(self, candidate: ModuleCandidate) -> ModuleGraph:
        """The float graph of the candidate's structure."""
        key = candidate.structure_key
        if key not in self._graphs:
            _keep(self._graphs, key, ModuleGraph(self.teacher.plugin, self.module(candidate), self.batch))
        return self._graphs[key]

    def npz(self, name: str, batches: list[Batch]) -> Path:
        """The inputs of batches as a file for an engine child, written once per study."""
        path = self.folder / "work" / f"{name}.npz"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            arrays: dict[str, Any] = {
                f"{i}.{j}": x.numpy() for i, b in enumerate(batches) for j, x in enumerate(b.inputs)
            }
            temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
            np.savez(temporary, **arrays)
            temporary.replace(path)
        return path

    def _input_norms(self, candidate: ModuleCandidate) -> Weights:
        key = candidate.structure_key
        if key not in self._norms:
            found = input_norms(self.teacher.plugin, self.module(candidate), self.batches("calibration"))
            _keep(self._norms, key, found)
        return self._norms[key]


def _keep(kept: dict[str, Any], key: str, value: Any) -> None:
    """Remember a value, and forget the oldest one beyond KEPT_STRUCTURES."""
    kept[key] = value
    if len(kept) > KEPT_STRUCTURES:
        del kept[next(iter(kept))]

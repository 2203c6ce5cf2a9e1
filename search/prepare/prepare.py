"""Everything that is checked before work starts."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path

from paretune.common.errors import UsageError
from paretune.common.file_access import unwritable
from paretune.engines.onnxruntime.genai_tokenizer import tokenizer_problem
from paretune.hardware_profiles import load_profile
from paretune.objectives.latency.workload import STANDARD, workload_within
from paretune.objectives.quality.batching import WINDOW
from paretune.search.estimation.derived_metrics import check_device_specs
from paretune.search.layout import layout_of
from paretune.search.prepare.plan import make_plan, training_tokens_per_parameter
from paretune.search.prepare.ready import Ready, check_affordable
from paretune.search.sensitivity_budget import BUDGET_SHARE, affordable_tokens
from paretune.search.spec import Spec
from paretune.search.students import with_students
from paretune.search.targets.profiles import further_profiles, require_measurable, require_predictions
from paretune.spaces.space import Space
from paretune.teachers.checkpoint.teacher import EMBEDDED, EMBEDDED_FOLDER, Teacher, load_teacher
from paretune.teachers.plugins.name import is_plugin
from paretune.teachers.text.corpus import SPLITS, chosen_corpus, library_mismatches
from paretune.teachers.text.own_output import mark_home
from paretune.teachers.text.tokens import require_enough_tokens

AFFORDABLE = 0.05


def prepare(spec: Spec, home: Path, address: str | None = None) -> Ready:
    """Check teacher, text, profile, budget, disk and memory; `address` is that of a Ray cluster. Raises UsageError or
    EnvironmentProblem before any work."""
    check_home(home)
    if is_plugin(spec.teacher):
        from paretune.search.prepare.plugin_prepare import prepare_plugin

        further_profiles(spec.profile, spec.targets, spec.teacher, home)
        return prepare_plugin(spec, home, address)
    teacher = load_teacher(spec.teacher)
    turn = workload_within(teacher.context)
    profile = load_profile(spec.profile, home)
    check_device_specs(spec, profile)
    targets = further_profiles(profile.name, spec.targets, spec.teacher, home)
    require_measurable(profile, address)
    for target in targets:
        check_device_specs(spec.model_copy(update={"limits": {}}), target)  # limits are for the searched one
    corpus = chosen_corpus(spec.data, spec.field)
    require_enough_tokens(teacher, corpus)
    affordable = training_tokens_per_parameter(spec, teacher, profile)
    if missing := spec.choices.missing(profile.weight_formats):
        raise UsageError(
            f"the profile {profile.name} has no kernel for {', '.join(missing)}",
            "leave it out of `precisions`, or add its pair to the profile's weight_formats",
        )
    space = Space.of(
        teacher.shape,
        profile.weight_formats,
        mild=affordable < AFFORDABLE,
        second_order=spec.second_order,
        hidden=spec.hidden,
        given=_has_given_masks(spec, teacher),
        choices=spec.choices,
    )
    space = with_students(space, spec.student_configs)
    require_predictions(targets, space.baselines()[0], teacher.shape)
    notes = runtime_notes(teacher)
    if turn != STANDARD:
        notes.append(
            f"the model's context of {teacher.context} tokens is shorter than the usual {STANDARD.prompt} + {STANDARD.tokens}: latency is "
            f"measured over {turn.tokens} tokens after a prompt of {turn.prompt}, and quality in windows of {min(WINDOW, teacher.context)}"
        )
    if spec.mixed_precision:
        tokens = affordable_tokens(teacher.shape, len(space.mixed_formats), spec.budget_s, profile.cores)
        space = replace(space, mixed=tokens > 0)
        if not tokens:
            notes.append(
                f"mixed precision is not searched: to measure what each layer loses takes more than {BUDGET_SHARE:.0%} of the "
                "budget. A longer --budget searches it"
            )
    if affordable < AFFORDABLE:
        notes.append(
            f"the budget allows {affordable:.2g} training tokens per parameter; below {AFFORDABLE} only mild cuts are "
            "searched beside precision and masks, and finalists are recovered block by block. A longer --budget searches smaller "
            "students"
        )
    if (
        spec.data is None
        and teacher.name == EMBEDDED
        and (differing := library_mismatches(EMBEDDED_FOLDER / "heldout.json"))
    ):
        notes.append(
            f"the library of Python {platform.python_version()} differs from the teacher's in {len(differing)} held-out modules; "
            f"figures carry the text's own fingerprint {corpus.fingerprint()}"
        )
    plan = make_plan(
        spec,
        teacher,
        profile,
        space,
        {name: sum(len(d.text) for d in corpus.splits[name]) for name in SPLITS},
        home,
        notes,
        layout_of(spec, profile, address),
        local=address is None,
    )
    plan = replace(plan, read=corpus.read)
    check_affordable(plan, spec, home)
    return Ready(spec, teacher, profile, space, plan, corpus.fingerprint(), targets=targets)


def runtime_notes(teacher: Teacher) -> list[str]:
    """What will not work with the artifacts of this teacher in onnxruntime-genai, tried before any work."""
    if teacher.name == EMBEDDED:
        return []
    notes = []
    if problem := tokenizer_problem(teacher.folder):
        notes.append(
            f"onnxruntime-genai cannot use the teacher's tokenizer: {problem}. `generate` and transformers can; other "
            "programs must encode prompts with the tokenizers library, or the teacher needs a byte-level BPE tokenizer"
        )
    if not teacher.special.stop:
        notes.append(
            "no file of the teacher names a token that ends a text, so nothing but the length ends one, and onnxruntime-genai, "
            "which must have such a token, takes 0. Name it as eos_token_id in generation_config.json"
        )
    return notes


def _has_given_masks(spec: Spec, teacher: Teacher) -> bool:
    """Whether the teacher came with masks that a candidate can keep. Raises UsageError if zeros are to be kept, but there are none."""
    if spec.keep_zeros and not teacher.masks(zeros=True):
        raise UsageError(
            f"keep_zeros needs a teacher of which a matrix has 5 % zeros or more, but {teacher.name} has none",
            "leave keep_zeros out",
        )
    return spec.keep_zeros or teacher.has_masks


def check_home(home: Path) -> None:
    """Create the home, mark it as ours, and try to write into it. Raises EnvironmentProblem if that fails."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe = home / f".probe-{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise unwritable(
            home, error, "choose a writable folder with --home or PARETUNE_HOME", "the home folder"
        ) from None
    mark_home(home)

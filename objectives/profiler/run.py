"""`paretune op-profile`: a teacher or an artifact through torch.profiler and the engine's own profile."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paretune.common.checksums import CHECKSUMS, FACTS, MODEL, check_artifact, sha256
from paretune.common.command_line import pasted
from paretune.common.errors import Infeasible, UsageError
from paretune.compression.export.graph import build_model, save_model
from paretune.compression.network.student import Network, plain_candidate
from paretune.hardware_profiles.detect import fingerprint, package_version
from paretune.hardware_profiles.lock import MachineLock
from paretune.hardware_profiles.profile import Profile, load_profile
from paretune.objectives.measurement import Measurement
from paretune.objectives.profiler.findings import keep_findings
from paretune.objectives.profiler.node_times import profile_graph
from paretune.objectives.profiler.op_costs import Roof, op_costs
from paretune.objectives.profiler.op_profile import OpProfile, Subject
from paretune.objectives.profiler.places import options
from paretune.spaces.candidate import Candidate, Format
from paretune.teachers.checkpoint.teacher import EMBEDDED, Teacher, is_folder, load_teacher
from paretune.teachers.plugins.name import is_plugin

GROUP_SIZE = 32
CPU_PROVIDER = "CPUExecutionProvider"


@dataclass(frozen=True)
class ProfileRequest:
    """What is done to a model: a prompt of `prompt` tokens, `tokens` decode steps after it; `say` hears what is going on."""

    profile: Profile
    home: Path
    prompt: int = 128
    tokens: int = 24
    say: Callable[[str], None] = lambda _text: None


def profile_ops(model: str, work: ProfileRequest) -> OpProfile:
    """Profile a teacher (its findings are kept for its searches) or an artifact.

    Raises UsageError for what is neither, is damaged or has too short a context; Infeasible if the engine refuses it.
    """
    if is_plugin(model) or not (model == EMBEDDED or is_folder(model, "MODEL")):
        raise UsageError(
            f"MODEL must be {EMBEDDED!r}, a Hugging Face folder or the folder of an artifact, but got {model!r}",
            "check the path; a plug-in's module has no layers that could be told apart",
        )
    folder = Path(model)
    if model != EMBEDDED and any((folder / name).exists() for name in (CHECKSUMS, FACTS, MODEL)):
        return _profile_artifact(folder, work)
    return _profile_teacher(load_teacher(model), work)


def local_profile_named(name: str, home: Path) -> Profile:
    """The hardware profile of that name. Raises UsageError where this machine cannot take its op profile, which is never predicted."""
    profile = load_profile(name, home)
    provider, at_hand = profile.execution_provider, profile.at_hand and profile.agent is None
    if profile.engine != "onnxruntime" or provider != CPU_PROVIDER or not at_hand:
        place = f"{profile.engine} with {provider}{'' if at_hand else ', which is not at hand'}"
        raise UsageError(
            f"an op profile is taken with ONNX Runtime on the CPU of this machine, but {profile.name} is for {place}",
            "take local-cpu, or another profile of this machine's CPU",
        )
    return profile


def _profile_artifact(folder: Path, work: ProfileRequest) -> OpProfile:
    facts = check_artifact(folder)
    if facts.get("kind") == "module":
        raise UsageError(f"profile takes decoders, but {folder} is a module of a plug-in", "name another artifact")
    try:
        candidate = Candidate.from_dict(facts["candidate"])
        teacher, digest = str(facts["teacher"]), sha256(folder / CHECKSUMS)[:16]
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{folder / FACTS} does not describe a decoder: {error!r}", "copy the artifact again"
        ) from None
    context = json.loads((folder / "onnx" / "genai_config.json").read_text(encoding="utf-8"))["model"]["context_length"]
    _require_context(work, int(context))
    subject = Subject(f"{teacher} {candidate.key[:8]}", "artifact", digest, candidate.describe())
    found = _profile_graph(subject, (folder / MODEL).resolve(), candidate, work)
    return replace(found, notes=(*found.notes, *_compared(folder, facts, found.measurements, work.profile)))


def _profile_teacher(teacher: Teacher, work: ProfileRequest) -> OpProfile:
    from paretune.objectives.profiler.torch_ops import profile_network

    _require_context(work, teacher.context)
    shape, cache = teacher.shape, work.home / "cache"
    candidate = plain_candidate(shape, shape.layers)
    weights = teacher.kept_in(cache).weights()
    work.say("profiling the network in torch")
    with MachineLock().shared():
        network = Network(teacher.config, shape, shape.layers)
        seen = profile_network(network, weights, work.prompt, work.tokens, work.profile.threads)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="profile-", dir=cache) as folder:
        try:
            save_model(build_model(weights, candidate, teacher.config, shape), Path(folder) / MODEL.name)
        except (ValueError, KeyError, RuntimeError) as error:
            raise Infeasible(f"the graph cannot be built: {error}", "") from error
        subject = Subject(teacher.name, "teacher", teacher.digest, candidate.describe())
        found = _profile_graph(subject, Path(folder) / MODEL.name, candidate, work)
    keep_findings(cache, teacher.digest, work.profile, found.findings)
    return replace(found, torch=seen)


def _profile_graph(subject: Subject, model: Path, candidate: Candidate, work: ProfileRequest) -> OpProfile:
    work.say("measuring what this machine does at most")
    roof = measured_roof(work.profile.threads)
    work.say("profiling the engine")
    nodes = profile_graph(model, work.profile.threads, work.prompt, work.tokens)
    keys = {"prefill": (work.prompt + 1) / 2, "decode": work.prompt + (work.tokens + 1) / 2}
    try:
        costs = op_costs(nodes.nodes, candidate, keys)
    except ValueError as error:
        raise UsageError(str(error), "the graph is not what its description says: copy the artifact again") from None
    places = options(costs, roof, formats_of(work.profile), nodes.slowdown)
    engine = f"onnxruntime {package_version('onnxruntime')}"
    notes = tuple(
        f"while they were profiled, the ops of a {phase} took {slow - 1:.0%} longer than a run without; their times are those"
        for phase, slow in nodes.slowdown.items()
        if slow > 1.1
    )
    settings = {"profile": work.profile.name, "threads": work.profile.threads, "prompt": work.prompt}
    return OpProfile(
        subject,
        {**settings, "tokens": work.tokens, "engine": engine, "machine": fingerprint()},
        nodes.measurements,
        roof,
        tuple(costs),
        places,
        nodes.run_ms,
        notes,
    )


def measured_roof(threads: int) -> Roof:
    """The bandwidth and the peaks of this machine, measured now: a shared one has other ones later."""
    from paretune.hardware_profiles.calibrate import calibrate

    peaks = calibrate(threads)
    integer = peaks.int8_gop_per_s or peaks.fp32_gflop_per_s
    return Roof(peaks.bandwidth_gb_per_s, peaks.fp32_gflop_per_s, integer, f"measured on {threads} thread(s)")


def formats_of(profile: Profile) -> tuple[Format, ...]:
    """int8 and int4 in groups of 32, with the activations that the profile has a kernel for; int8 ones where it has both."""
    found = []
    for bits in (8, 4):
        for activation in ("int8", "fp32"):
            form = Format(bits, GROUP_SIZE, activation)
            if form.kernel in profile.weight_formats:
                found.append(form)
                break
    return tuple(found)


def _require_context(work: ProfileRequest, context: int) -> None:
    if work.prompt + work.tokens > context:
        raise UsageError(
            f"prompt and new tokens must fit into the model's context of {context} tokens, but are {work.prompt} + {work.tokens}",
            "lower --prompt or --tokens",
        )


def _compared(folder: Path, facts: Mapping[str, Any], now: Mapping[str, Measurement], profile: Profile) -> list[str]:
    """What the artifact's study had measured, where it can be compared."""
    then = facts.get("measurements", {}).get("decode_ms_per_token")
    if then is None or facts.get("profile") != profile.name:
        return []
    if then.get("fingerprint") != fingerprint():
        return [
            "its study measured on another machine or another version of the engine, so its latencies are not compared"
        ]
    change = now["decode_ms_per_token"].value / then["value"] - 1
    again = pasted("measure", folder.absolute(), "--profile", profile.name)
    return [f"its study said {then['value']:.3f} ms/token, this is {change:+.1%}; `{again}` corrects for drift"]

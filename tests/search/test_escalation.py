"""From PTQ to QAT: the two rules alone, in whole simulated searches against an oracle, and with the real evaluator."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from paretune.common.errors import UsageError
from paretune.compression.distill import RecoveryRecipe
from paretune.hardware_profiles.profile import detected_profile
from paretune.search.escalation import PtqResult, QatContext, escalate, may_escalate, not_eligible, unrounded
from paretune.search.evaluators.simulated import SHAPE, TEACHER_NLL, SimulatedEvaluator, VirtualClock, recovered_loss
from paretune.search.execution.inline import run_inline
from paretune.search.execution.run import run_study
from paretune.search.prepare.ready import Ready
from paretune.search.prepare.studies import create_study
from paretune.search.recommend.recommend import point_dict
from paretune.search.spec import Spec, make_spec
from paretune.search.students import student_seeds, with_students
from paretune.search.study.store import Store
from paretune.search.study.view import load_view
from paretune.search.tasks.base import Outcome, Task
from paretune.search.tasks.confirm import Confirm
from paretune.search.tasks.explore import Explore
from paretune.search.tasks.recover import Recover
from paretune.spaces import Candidate, Format, Layer, Space
from paretune.teachers.checkpoint.teacher import load_teacher
from paretune.tracking.report.report import write_report
from support.decoders import decoder
from support.plans import empty_plan

OBJECTIVES = ("nll", "decode_ms_per_token", "compressed_bytes")
CONTEXT = QatContext(OBJECTIVES, (2.2, 0.30, 3e6), ((2.0, 0.40, 4e6), (2.1, 0.35, 3.5e6)), 1.8, 1.87)
TRIED = PtqResult(ptq_nll=2.10, unquantized_nll=2.00, cost_low=0.08)


@pytest.mark.parametrize(
    ("tried", "changes", "qat", "said"),
    [
        (TRIED, {}, True, r"non-dominated, and rounding costs \+0.1000"),
        (
            TRIED,
            {"front": ((2.0, 0.30, 3e6),)},
            False,
            r"2.070 nats/token.* dominated by a confirmed .*2.000 nats/token",
        ),
        (TRIED, {"front": ((2.075, 0.29, 2.9e6),)}, True, "2.070 nats/token, 0.300 ms/token, 3.00 MB"),
        (TRIED, {"estimate": (2.01, 0.30, 3e6), "front": ((2.05, 0.29, 2.9e6),)}, True, "2.010 nats/token"),
        (replace(TRIED, cost_low=0.0), {}, False, "may be chance"),
        (TRIED, {"qat_threshold": 0.10}, True, r"loses 16.67% .* more than the 10.00%"),
        (TRIED, {"qat_threshold": 0.20}, False, r"loses 16.67% .* within the 20.00%"),
        (replace(TRIED, cost_low=-1.0), {"qat_threshold": 0.1, "front": ((1.0, 0.1, 1e6),)}, True, "more than"),
    ],
)
def test_the_rules(tried: PtqResult, changes: dict[str, Any], qat: bool, said: str) -> None:
    context = replace(CONTEXT, **changes)
    found = escalate(tried, context)
    assert found.qat is qat
    assert re.search(said, found.reason), found.reason


INT4, INT8 = Format(4, 32, "int8"), Format(8, 32, "int8")


def test_who_cannot_be_trained_under_the_rounding_is_told_why() -> None:
    def uniform(form: Format, head: Format = INT8) -> Candidate:
        return Candidate((Layer(64, 1, form, form),) * 2, head, INT8)

    gptq = replace(INT4, algorithm="gptq")
    cases = [(uniform(INT4), ""), (uniform(gptq), "GPTQ"), (uniform(INT8), "8 bits"), (uniform(INT8, INT4), "8 bits")]
    for candidate, reason in cases:
        assert may_escalate(candidate) is (not reason)
        assert may_escalate(candidate) is RecoveryRecipe(1).uses_qat(candidate), "the two places that say so agree"
        assert reason in not_eligible(candidate).reason and not not_eligible(candidate).qat
    plain = unrounded(uniform(gptq))
    assert not plain.is_quantized and plain.structure_key == uniform(gptq).structure_key
    assert not_eligible(plain).reason == "nothing is quantized"


class Watched(SimulatedEvaluator):
    """Remembers every piece of work with its outcome, in order."""

    seen: list[tuple[Task, Outcome[Any]]]

    def run(self, task: Task) -> Outcome[Any]:
        outcome = super().run(task)
        self.seen.append((task, outcome))
        return outcome


def searched(home: Path, **options: Any) -> tuple[list[tuple[Task, Outcome[Any]]], Store]:
    """A whole simulated search."""
    spec = Spec.model_validate({"budget": "500s", "fit_points": 30, "finalists": 30, "max_candidates": 70, **options})
    profile = detected_profile()
    space = with_students(Space.of(SHAPE, profile.weight_formats), spec.student_configs)
    plan = empty_plan(space, spec)
    ready = Ready(spec, load_teacher("stdlib-coder"), profile, space, plan)
    store = create_study(ready, home, "s", "x")
    clock = VirtualClock()
    evaluator = Watched(store.folder, home, clock)
    evaluator.seen = []

    def execute(director: Any, *_: Any) -> None:
        director.state.budget.clock = clock
        director.state.budget.__post_init__()
        run_inline(director, evaluator.run)

    assert run_study(store, ready, home, lambda *_: None, None, execute) == 0
    return evaluator.seen, store


@pytest.fixture(scope="module")
def by_value(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[Task, Outcome[Any]]], Store]:
    return searched(tmp_path_factory.mktemp("value"), seed=1)  # of seeds 0 … 6 four have candidates that stay with PTQ


def unquantized_at_its_cost(task: Recover) -> tuple[float, ...]:
    trained = decoder(task.candidate)
    nll = TEACHER_NLL["report"] + recovered_loss(trained, unrounded(trained))
    assert task.context is not None
    estimate = task.context.estimate
    return (min(estimate[0], nll), *estimate[1:])


def test_by_value_qat_goes_to_those_that_would_be_on_the_front(
    by_value: tuple[list[tuple[Task, Outcome[Any]]], Store],
) -> None:
    """The oracle keeps the confirmed values itself and looks at every one of them."""
    confirmed: list[tuple[float, ...]] = []
    decided = []
    for task, outcome in by_value[0]:
        if isinstance(task, Confirm):
            confirmed.append(tuple(outcome.found.measurements[name].value for name in OBJECTIVES))
        if isinstance(task, Recover) and may_escalate(trained := decoder(task.candidate)):
            mine = unquantized_at_its_cost(task)
            beaten = any(all(x <= y for x, y in zip(c, mine, strict=True)) and c != mine for c in confirmed)
            costs = recovered_loss(trained, trained) > recovered_loss(trained, unrounded(trained))
            assert outcome.found.recovered.qat is (costs and not beaten), outcome.found.recovered.qat_reason
            assert ("dominated by" in outcome.found.recovered.qat_reason) is (costs and beaten)
            decided.append(outcome.found.recovered.qat)
        elif isinstance(task, Recover):
            assert outcome.found.recovered.qat is False and outcome.found.recovered.qat_reason
    assert decided.count(True) >= 3 and decided.count(False) >= 1, decided


def test_the_record_and_everything_that_shows_it_say_why(
    by_value: tuple[list[tuple[Task, Outcome[Any]]], Store],
) -> None:
    store = by_value[1]
    view = load_view(store)
    recovered = {e.key: e.facts for e in store.evaluations("recovered", "complete")}
    shown = [p for p in view.confirmed if p.key in recovered]
    assert shown
    for point in shown:
        assert point.facts["qat"] == recovered[point.key]["qat"]
        assert point_dict(point)["qat_reason"] == recovered[point.key]["qat_reason"] != ""
    write_report(view)
    page = (view.folder / "report.html").read_text()
    member = next(p for p in view.front if p.key in recovered and p.facts["qat"])
    assert f"QAT: {member.facts['qat_reason'][:60]}" in page
    rows = [row for row in page.split("<tr>") if "qat_reason" not in row and "<b title=" in row]
    assert any("QAT, why</summary>" in row for row in rows), (
        "a sentence in the table must fold, or the numbers leave the screen"
    )
    assert not any("QAT, why" in row for row in rows if ">teacher " in row), "the teacher's own weights are not trained"


def test_qat_threshold_is_the_classical_rule(tmp_path: Path) -> None:
    seen, _ = searched(tmp_path, qat_threshold="3%")
    decided = []
    for task, outcome in seen:
        if isinstance(task, Recover) and may_escalate(trained := decoder(task.candidate)):
            loss = recovered_loss(trained, trained) / TEACHER_NLL["search"]
            assert outcome.found.recovered.qat is (loss > 0.03), outcome.found.recovered.qat_reason
            assert "--qat-threshold" in outcome.found.recovered.qat_reason
            decided.append(outcome.found.recovered.qat)
    assert True in decided and False in decided


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.5 %", 0.005), (0.02, 0.02), (None, None)])
def test_qat_threshold_in_a_spec(text: Any, value: float | None) -> None:
    assert Spec.model_validate({"qat_threshold": text}).qat_threshold == value


@pytest.mark.parametrize("bad", ["much", "0%", -1, "1"])
def test_an_impossible_qat_threshold_is_refused(bad: Any) -> None:
    if bad == "1":
        assert Spec.model_validate({"qat_threshold": bad}).qat_threshold == 1.0  # a fraction, as in JSON
        return
    with pytest.raises(UsageError, match=r"qat.threshold"):
        make_spec(None, None, {"qat_threshold": bad})


def test_the_recovery_block_of_a_spec(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("recovery:\n  temperature: 2\n  ce_weight: 0.0\n  hidden_weight: 0.5\n")
    found = make_spec(file, None, {}).recovery
    assert (found.temperature, found.kl_weight, found.ce_weight, found.hidden_weight) == (2.0, 0.9, 0.0, 0.5)
    recipe = RecoveryRecipe(1)
    default = Spec().recovery
    for name in ("temperature", "kl_weight", "ce_weight", "hidden_weight"):
        assert getattr(default, name) == getattr(recipe, name)
    for text, said in (
        ("  temprature: 2", "temprature"),
        ("  temperature: 0", "temperature"),
        ("  kl_weight: 0\n  ce_weight: 0", "must not all be 0"),
    ):
        file.write_text(f"recovery:\n{text}\n")
        with pytest.raises(UsageError, match=said):
            make_spec(file, None, {})


def test_sizes_of_the_user_are_explored_first_and_are_choices_of_the_sampler(tmp_path: Path) -> None:
    sizes = [{"layers": 5, "ffn": 544, "kv_groups": 3}, {"layers": 3, "ffn": 768, "kv_groups": 4, "hidden": 256}]
    seen, store = searched(tmp_path, student_configs=sizes)
    first = [decoder(w.candidate) for w, _ in seen if isinstance(w, Explore)][:6]
    found = [(len(c.layers), c.layers[0].ffn, c.layers[0].kv_groups, c.layers[0].ffn_format.bits) for c in first]
    assert found == [(5, 544, 3, bits) for bits in (32, 8, 4)] + [(3, 768, 4, bits) for bits in (32, 8, 4)]
    assert [r.source for r in store.candidates()][3:9] == ["seed"] * 6
    space = with_students(
        Space.of(SHAPE, detected_profile().weight_formats), Spec(student_configs=sizes).student_configs
    )
    assert 544 in space.ffn_widths and 544 not in Space.of(SHAPE, detected_profile().weight_formats).ffn_widths
    assert all(
        space.decode(space.encode(c)) == c for c in student_seeds(space, Spec(student_configs=sizes).student_configs)
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": 7}, "entry 1: layers must be 2 to 6 .* but got 7; choose layers from 2 to 6"),
        ({"layers": 1}, "layers must be 2 to 6"),
        ({"ffn": 1024}, "ffn must be 192 to 768"),
        ({"ffn": 500}, "ffn must be a multiple of 32 .* but got 500; write 480"),
        ({"kv_groups": 5}, "kv_groups must be 1 to 4"),
        ({"hidden": 100}, "hidden must be .* but got 100"),
    ],
)
def test_a_size_that_is_no_slice_is_refused(changes: dict[str, int], said: str) -> None:
    spec = Spec.model_validate({"student_configs": [{"layers": 4, "ffn": 512, "kv_groups": 2, **changes}]})
    space = Space.of(SHAPE, ("fp32/fp32", "int8/int8", "int4/int8"))
    with pytest.raises(UsageError, match=said):
        with_students(space, spec.student_configs)


def test_a_residual_width_is_a_size_where_it_is_searched() -> None:
    kernels, sizes = ("fp32/fp32", "int8/int8"), [{"layers": 4, "ffn": 512, "kv_groups": 2, "hidden": 192}]
    configs = Spec.model_validate({"student_configs": sizes}).student_configs
    assert {c.hidden for c in student_seeds(Space.of(SHAPE, kernels, hidden=True), configs)} == {192}
    with pytest.raises(UsageError, match=r"hidden must be one of 256 .* but got 192; .*`hidden: true`"):
        with_students(Space.of(SHAPE, kernels), configs)


def test_a_mild_space_says_why_a_size_is_too_small() -> None:
    spec = Spec.model_validate({"student_configs": [{"layers": 3, "ffn": 768, "kv_groups": 4}]})
    with pytest.raises(UsageError, match="mild cuts only, a longer --budget"):
        with_students(Space.of(SHAPE, ("fp32/fp32",), mild=True), spec.student_configs)


def test_without_sizes_the_space_is_as_it_was() -> None:
    space = Space.of(SHAPE, ("fp32/fp32", "int8/int8", "int4/int8"))
    assert with_students(space, ()) == space and student_seeds(space, ()) == []


def test_the_old_name_of_the_threshold_is_read_with_a_note() -> None:
    with pytest.warns(FutureWarning, match="max_loss has been renamed to qat_threshold"):
        spec = Spec.model_validate({"max_loss": "1%"})
    assert spec.qat_threshold == 0.01 and "max_loss" not in spec.model_dump()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Spec.model_validate({"max_loss": None}).qat_threshold is None  # as studies of before have it
    with pytest.raises(ValidationError, match="max_loss"):
        Spec.model_validate({"max_loss": 0.1, "qat_threshold": 0.1})


def test_studies_of_before_have_the_digest_that_they_had() -> None:
    settings = Spec(qat_threshold=0.01).model_dump(mode="json")
    settings["max_loss"] = settings.pop("qat_threshold")
    for later in ("targets", "workers", "threads_per_trial"):
        del settings[later]
    expected = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    assert Spec(qat_threshold=0.01).digest() == expected

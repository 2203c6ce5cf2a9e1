"""The real evaluator's recovery: what its record says, kept labels, and block by block where only mild cuts are affordable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paretune.hardware_profiles.profile import detected_profile
from paretune.search.escalation import QatContext
from paretune.search.evaluators.decoder import DecoderEvaluator
from paretune.search.prepare.ready import Ready
from paretune.search.prepare.studies import create_study
from paretune.search.spec import Spec
from paretune.search.tasks.recover import Recover, RecoverResult
from paretune.spaces import Candidate, Format, Layer, Space
from paretune.teachers.checkpoint.teacher import load_teacher
from support.plans import empty_plan

INT4, INT8 = Format(4, 32, "int8"), Format(8, 32, "int8")
OBJECTIVES = ("nll", "decode_ms_per_token", "compressed_bytes")


def whole(form: Format) -> Candidate:
    return Candidate((Layer(128, 2, form, form),) * 3, form, Format(8, 32) if form.bits < 32 else form)


class Made:
    """Makes evaluators over the tiny teacher."""

    def __init__(self, folder: Path, teacher: Path, text: Path) -> None:
        self.folder, self.teacher, self.text = folder, teacher, text

    def __call__(self, mild: bool = False, **options: Any) -> DecoderEvaluator:
        settings = {"teacher": str(self.teacher), "data": str(self.text), "budget": "300s", "search_tokens": 4000}
        spec = Spec.model_validate({**settings, **options})
        teacher, profile = load_teacher(spec.teacher), detected_profile()
        space = Space.of(teacher.shape, profile.weight_formats, mild=mild)
        plan = empty_plan(space, spec)
        name = f"s{len(list((self.folder / 'studies').glob('*')))}"
        create_study(Ready(spec, teacher, profile, space, plan), self.folder, name, "paretune search").close()
        return DecoderEvaluator(self.folder / "studies" / name, self.folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path, tiny_text: Path) -> Made:
    return Made(tmp_path_factory.mktemp("home"), tiny_teacher_dir, tiny_text)


def recovered(evaluator: DecoderEvaluator, candidate: Candidate, **context: Any) -> RecoverResult:
    known = {"teacher_search": 10.0, "teacher_report": 10.0, **context}
    given = QatContext.of(OBJECTIVES, (10.0, 1.0, 1e6), known.pop("confirmed", []), **known)
    outcome = evaluator.run(Recover(candidate, 8 * 1024, given, seconds_left=60.0))
    assert outcome.status == "complete" and isinstance(outcome.result, RecoverResult), outcome.reason
    return outcome.result


def test_the_record_says_what_was_tried_and_why(made: Made) -> None:
    evaluator = made()
    spent = recovered(evaluator, whole(INT4), qat_threshold=1e-6, teacher_search=0.1).facts()
    assert spent["qat_reason"].startswith("post-training quantization loses") and "more than" in spent["qat_reason"]
    assert spent["qat"] is bool(spent["kept_recovery"])
    assert spent["ptq_nll"] != spent["unquantized_nll"]
    enough = recovered(evaluator, whole(INT4), qat_threshold=100.0).facts()
    assert enough["qat"] is False and "within" in enough["qat_reason"]
    eight = recovered(evaluator, whole(INT8), qat_threshold=1e-6).facts()
    assert eight["qat"] is False and "8 bits" in eight["qat_reason"] and "ptq_nll" not in eight
    beaten = recovered(evaluator, whole(INT4), confirmed=[(0.001, 0.5, 5e5)]).facts()
    assert beaten["qat"] is False and ("dominated" in beaten["qat_reason"] or "chance" in beaten["qat_reason"])


def test_recoveries_of_a_study_share_the_teachers_labels(made: Made) -> None:
    evaluator = made(recovery={"cached_labels": 16})
    first = recovered(evaluator, whole(INT4)).facts()
    second = recovered(evaluator, whole(INT8)).facts()
    assert (first["labels_kept"], first["labels_computed"]) == (0, 8)
    assert (second["labels_kept"], second["labels_computed"]) == (8, 0)
    assert "labels_kept" not in recovered(made(recovery={"cached_labels": 0}), whole(INT8)).facts()
    matched = made(recovery={"cached_labels": 16, "hidden_weight": 0.1})
    assert "labels_kept" not in recovered(matched, whole(INT8)).facts(), "hidden states need the teacher anyway"


def test_where_only_mild_cuts_are_affordable_blocks_are_recovered_one_by_one(made: Made) -> None:
    facts = recovered(made(mild=True), whole(INT4)).facts()
    assert facts["method"] == "block by block" and facts["tokens"] == 8 * 1024
    assert facts["block_error_after"] <= facts["block_error_before"]
    assert facts["qat_reason"]
    assert recovered(made(), whole(INT4)).facts()["method"] == "end to end"

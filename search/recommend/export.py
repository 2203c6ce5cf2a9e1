"""Deliver a candidate: its artifact, how to run it in its engine, and the command that makes it again, as one folder."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from paretune.common.checksums import check_artifact, write_checksums
from paretune.common.command_line import pasted
from paretune.common.errors import UsageError
from paretune.common.file_access import unwritable
from paretune.common.files import disk_problem, sync_folder
from paretune.search.study.view import Point, StudyView

GUIDE = "HOW_TO_RUN.md"

DECODER_GUIDE = """
## Text, streamed

    pip install onnxruntime-genai=={genai}

```python
import onnxruntime_genai as og

model = og.Model("onnx")
tokenizer = og.Tokenizer(model)
tokenizer.update_options(add_special_tokens="true")  # BOS, where the tokenizer's template adds one
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=64)
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode("def "))
stream = tokenizer.create_stream()
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
```

Run it in this folder. Latency was measured on {threads} thread(s), which `session_options` of `onnx/genai_config.json` can say
(`intra_op_num_threads`). With paretune installed: `paretune generate . --prompt "def "`.
"""
MODULE_GUIDE = """
## The module

    pip install onnxruntime=={onnxruntime}

```python
import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = {threads}
options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
options.add_session_config_entry("session.x64quantprecision", "1")
session = onnxruntime.InferenceSession("onnx/model.onnx", options)
print([(i.name, i.shape, i.type) for i in session.get_inputs()])
```

Run it in this folder.
"""
OPENVINO_GUIDE = """
## In OpenVINO

    pip install openvino=={openvino}

```python
import openvino

core = openvino.Core()
model = core.read_model("onnx/model.onnx")
print([i.get_any_name() for i in model.inputs])
```

`{measure}` measures it there.
"""


def export_artifact(view: StudyView, point: Point, folder: Path) -> Path:
    """Write the artifact of `point` with HOW_TO_RUN.md into `folder`, which appears whole or not at all; it is a valid artifact
    itself. Returns it.

    Raises UsageError if `folder` has anything in it or the artifact is missing or damaged, EnvironmentProblem if the disk refuses.
    """
    source = view.folder / "artifacts" / point.key
    check_artifact(source)
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise UsageError(f"an export needs a new or empty folder, but {folder} is neither", "name another one")
    temporary = folder.resolve().parent / f".{folder.name}.{os.getpid()}.tmp"
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, temporary)
        (temporary / GUIDE).write_text(guide(view, point), encoding="utf-8")
        write_checksums(temporary)
        if folder.exists():
            folder.rmdir()
        temporary.replace(folder)
        sync_folder(folder.resolve().parent)
    except OSError as error:
        raise disk_problem(error) or unwritable(folder, error, "choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def guide(view: StudyView, point: Point) -> str:
    """HOW_TO_RUN.md: what it is, how it runs in the engine it was measured in, where its numbers and itself come from."""
    meta, profile = view.meta, view.meta.get("profile") or {}
    versions = meta.get("versions") or {}
    named = {
        "genai": versions.get("onnxruntime-genai", ""),
        "onnxruntime": versions.get("onnxruntime", ""),
        "openvino": profile.get("engine_version", ""),
        "threads": profile.get("threads", 1),
        "profile": profile.get("name", ""),
        "measure": pasted(
            "measure", ".", "--profile", profile.get("name", ""), home=view.folder.parent.parent, stored=True
        ),
    }
    text = DECODER_GUIDE if view.figures.is_decoder else MODULE_GUIDE
    if profile.get("engine") == "openvino":
        text += OPENVINO_GUIDE
    numbers = "\n".join(
        f"- {name}: {m.value:.6g} {m.unit} [{m.low:.6g} … {m.high:.6g}], {m.provenance}"
        for name, m in sorted(point.measurements.items())
    )
    command = meta.get("command") or ""
    made = command if isinstance(command, str) else shlex.join(command)
    head = f"# {point.name}\n\n{point.description}\n\nKey `{point.key}` of study `{view.study}`, for `{named['profile']}`.\n"
    origin = (
        f"\n## Measured\n\n{numbers}\n\n## Make it again\n\n    {made}\n\n"
        f"paretune {versions.get('paretune', '')}, seed {meta.get('seed')}, teacher digest "
        f"{(meta.get('teacher') or {}).get('digest', '')}; its own settings are in `paretune.json`.\n"
    )
    return head + text.format(**named) + origin

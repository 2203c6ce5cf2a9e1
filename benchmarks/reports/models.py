"""Rows about teachers: tokenizers, configs, weights, and what the artifact carries."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.reports.row import Row, Seen
from benchmarks.reports.world import VOCABULARY, World, document, nll, write_documents, write_teacher

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
MESSAGES = [{"role": "user", "content": "the model reads"}]
PROMPT = "the model reads a line"


def stored_truncation(world: World) -> Seen:
    """tokenizer.json that stores truncation and padding of 64 tokens scores the same text as one that does not."""

    def cut(tokenizer: dict[str, Any]) -> None:
        tokenizer["truncation"] = {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
        tokenizer["padding"] = {
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|end|>",
        }

    data = write_documents(world.folder / "text")
    values = []
    for name, change in (("plain", None), ("cut", cut)):
        home = world.folder / f"home-{name}"
        ended = world.search(write_teacher(world.folder / name, tokenizer=change), data, home=home)
        if ended.code not in (0, 3):
            return Seen.runs(ended)
        values.append(nll(world.study(home)))
    return Seen(f"NLL {values[0]:.6f}", f"NLL {values[1]:.6f}", values[0] == values[1])


def template_and_generation_config(world: World) -> Seen:
    """The chat template and the generation settings of the teacher are in both folders of the artifact."""
    from transformers import AutoTokenizer

    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 7, "repetition_penalty": 1.2}
    teacher = write_teacher(world.folder / "teacher")
    (teacher / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (teacher / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 0}), encoding="utf-8")
    ended = world.search(teacher, write_documents(world.folder / "text"))
    if ended.code not in (0, 3):
        return Seen.runs(ended)
    artifact = world.artifact()

    def rendered(folder: Any) -> str:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return str(tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True))

    prompts = [rendered(folder) for folder in (teacher, artifact / "hf", artifact / "onnx")]
    shipped = json.loads((artifact / "hf" / "generation_config.json").read_text(encoding="utf-8"))
    genai = json.loads((artifact / "onnx" / "genai_config.json").read_text(encoding="utf-8"))["search"]
    right = {name: settings[name] for name in ("temperature", "top_p", "top_k", "repetition_penalty")}
    seen = [{name: found.get(name) for name in right} for found in (shipped, genai)]
    return Seen.equal([prompts[0]] * 3, prompts).also(f"generation settings {seen}", seen == [right, right])


def stop_tokens(world: World) -> Seen:
    """A model that always says token 2 stops there if only generation_config.json names it."""

    def says_two(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor.zero_()
        tensors["model.embed_tokens.weight"].abs_().add_(1.0)
        tensors["model.norm.weight"].fill_(1.0)
        tensors["lm_head.weight"].mul_(0.01)
        tensors["lm_head.weight"][2] = 0.5

    teacher = write_teacher(world.folder / "teacher", {"tie_word_embeddings": False}, weights=says_two)
    (teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}), encoding="utf-8")
    ended = world.search(teacher, write_documents(world.folder / "text"))
    if ended.code not in (0, 3):
        return Seen.runs(ended)
    artifact = world.artifact()
    made = world.paretune("generate", artifact, "--prompt", PROMPT, "--max-tokens", 32, "--json")
    if made.code:
        return Seen.runs(made, "generate stops")
    ids = json.loads((artifact / "onnx" / "genai_config.json").read_text(encoding="utf-8"))["model"]["eos_token_id"]
    return Seen(
        "at most 1 token, eos [0, 2]", f"{made.json['tokens']} tokens, eos {ids}", made.json["tokens"] <= 1
    ).also("ids as a set", set(ids if isinstance(ids, list) else [ids]) == {0, 2})


def runtime_keys(world: World) -> Seen:
    """`attn_implementation` says how a model is run, not what it is."""
    teacher = write_teacher(
        world.folder / "teacher",
        {"attn_implementation": "flash_attention_2", "_attn_implementation": "flash_attention_2"},
    )
    return Seen.runs(world.search(teacher, write_documents(world.folder / "text")))


def rope_theta(world: World) -> Seen:
    """`hf/config.json` has both spellings of the rotary base, for readers before and after transformers 5."""
    teacher = write_teacher(world.folder / "teacher", {"rope_theta": 1e6})
    ended = world.search(teacher, write_documents(world.folder / "text"))
    if ended.code not in (0, 3):
        return Seen.runs(ended)
    config = json.loads((world.artifact() / "hf" / "config.json").read_text(encoding="utf-8"))
    return Seen.equal((1e6, 1e6), (config.get("rope_theta"), config.get("rope_parameters", {}).get("rope_theta")))


def huge_loss(world: World) -> Seen:
    """A head times 5,000: an NLL of thousands, a perplexity beyond floats."""

    def enlarge(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"].mul_(5000)

    teacher = write_teacher(world.folder / "teacher", {"tie_word_embeddings": False}, weights=enlarge)
    ended = world.search(teacher, write_documents(world.folder / "text"))
    if ended.code not in (0, 3):
        return Seen.runs(ended)
    shown = world.paretune("front", "--home", world.home, "--json")
    return Seen.runs(ended).also(f"front exit {shown.code}", shown.code == 0 and nll(world.study()) > 1000)


def short_context(world: World) -> Seen:
    """A context of 64 tokens: measured within it, or refused before work."""
    teacher = write_teacher(world.folder / "teacher", {"max_position_embeddings": 64})
    data = write_documents(world.folder / "text")
    planned = world.plan(teacher, data)
    if planned.code == 2:
        return Seen("refused before work or measured", f"refused: {planned.tail()}", "64" in planned.text)
    return Seen.runs(world.search(teacher, data))


def word_level_tokenizer(world: World) -> Seen:
    """A tokenizer that the streaming runtime cannot load is refused or warned of before work; generate never breaks."""

    def words(tokenizer: dict[str, Any]) -> None:
        names = ["<|end|>", *sorted({word for i in range(60) for word in document(1000 + i).split()})][:VOCABULARY]
        tokenizer["model"] = {
            "type": "WordLevel",
            "vocab": {name: i for i, name in enumerate(names)},
            "unk_token": "<|end|>",
        }
        tokenizer["pre_tokenizer"] = {"type": "WhitespaceSplit"}
        tokenizer["decoder"] = None
        tokenizer["post_processor"] = None

    teacher = write_teacher(world.folder / "teacher", tokenizer=words)
    data = write_documents(world.folder / "text")
    planned = world.plan(teacher, data)
    right = "refused (2), or a note in the plan and an answer without traceback from generate"
    if planned.code:
        return Seen(right, f"exit {planned.code}: {planned.tail()}", planned.code == 2 and "tokenizer" in planned.text)
    noted = any("tokenizer" in note for note in planned.json["notes"])
    ended = world.search(teacher, data)
    if ended.code not in (0, 3):
        return Seen.runs(ended, right)
    made = world.paretune("generate", world.artifact(), "--prompt", "the model", "--max-tokens", 4)
    return Seen(
        right,
        f"note {noted}; generate exit {made.code}: {made.tail()}",
        noted and made.code in (0, 2, 5) and "Traceback" not in made.text,
    )


def beginning_of_text(world: World) -> Seen:
    """A post-processor that adds BOS: the artifact's runtime reads the same ids as transformers."""

    def add(tokenizer: dict[str, Any]) -> None:
        piece = {"SpecialToken": {"id": "<|end|>", "type_id": 0}}
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [piece, {"Sequence": {"id": "A", "type_id": 0}}, piece, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [0], "tokens": ["<|end|>"]}},
        }

    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = write_teacher(world.folder / "teacher", {"eos_token_id": 1}, tokenizer=add)
    ended = world.search(teacher, write_documents(world.folder / "text"))
    if ended.code not in (0, 3):
        return Seen.runs(ended)
    artifact = next(  # the fp32 teacher: greedy continuations of two runtimes agree there
        path.parent
        for path in sorted((world.study() / "artifacts").glob("*/paretune.json"))
        if "fp32" in json.loads(path.read_text(encoding="utf-8"))["description"]
    )
    made = world.paretune("generate", artifact, "--prompt", PROMPT, "--max-tokens", 8, "--json")
    if made.code:
        return Seen.runs(made, "generate runs")
    tokenizer = AutoTokenizer.from_pretrained(artifact / "hf")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(artifact / "hf")
    right = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0][ids.shape[1] :])
    return Seen.equal(right, made.json["text"]).also(f"first id {int(ids[0, 0])}", int(ids[0, 0]) == 0)


ROWS = (
    Row(1, "a tokenizer that stores truncation and padding", stored_truncation),
    Row(2, "chat template and generation settings", template_and_generation_config),
    Row(3, "several stop tokens", stop_tokens),
    Row(4, "attn_implementation in config.json", runtime_keys),
    Row(5, "rotary base in both spellings", rope_theta),
    Row(13, "an NLL of thousands", huge_loss),
    Row(14, "a context of 64 tokens", short_context),
    Row(15, "a word-level tokenizer", word_level_tokenizer),
    Row(16, "a template that adds BOS", beginning_of_text),
)

"""A chat template for a model that has none: the same weights beside a tokenizer that carries one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align_loop.errors import UserError
from align_loop.stage import StageContext

# The two forms that most base models were fine-tuned with; a Jinja file can be named instead.
TEMPLATES = {
    "zephyr": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}


def adopt(config: dict[str, Any], inputs: dict[str, Path], context: StageContext) -> None:
    """The stage: ``out/model`` is the model of ``inputs['model']`` with ``config['template']`` (a name or the text).

    Weights are linked, not copied.
    """
    from transformers import AutoTokenizer

    out = context.out / "model"
    out.mkdir()
    for file in sorted(inputs["model"].iterdir()):
        if (
            file.suffix == ".safetensors"
            or file.name in ("config.json", "generation_config.json")
            or file.name.endswith("index.json")
        ):
            (out / file.name).symlink_to(file.resolve())
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"], local_files_only=True, trust_remote_code=False)
    tokenizer.chat_template = config["template"]
    tokenizer.save_pretrained(out)


def template_text(name: str) -> str:
    """The Jinja text of a known template or of a file; ``UserError`` for neither."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not Path(name).is_file():
        raise UserError(f"setting.chat_template={name}: neither one of {', '.join(TEMPLATES)} nor a Jinja file")
    return Path(name).read_text(encoding="utf-8")

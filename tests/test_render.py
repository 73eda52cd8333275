"""One renderer for sampler, judge and trainer, under the forms that real chat templates take."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from align_loop.errors import UserError
from align_loop.prompts.wordlevel import build_tokenizer
from align_loop.render import Renderer
from align_loop.stage import StageContext
from align_loop.templates import TEMPLATES, adopt, template_text

# The forms of Llama-3's and Mistral's templates: a header and an end token a turn; no header, roles must alternate.
LLAMA3 = (
    "{% set loop_messages = messages %}{% for m in loop_messages %}"
    "{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '</s>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
FORMS = {"zephyr": TEMPLATES["zephyr"], "chatml": TEMPLATES["chatml"], "llama3": LLAMA3, "mistral": MISTRAL}

USER = [{"role": "user", "content": "how are you?"}]
TURNS = [*USER, {"role": "assistant", "content": "well."}, {"role": "user", "content": "and  now?\nsay, 😀!"}]
SYSTEM = [{"role": "system", "content": "be kind"}, *TURNS]


def save(folder, template, bos="<s>", eos="</s>", adds_bos=False):
    """A byte-level tokenizer, so that any text comes back as it was."""
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate([*specials, *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    named = {k: v for k, v in {"bos_token": bos, "eos_token": eos}.items() if v}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=specials[2:], **named)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def conversations(form):
    return (USER, TURNS) if form == "mistral" else (USER, TURNS, SYSTEM)


@pytest.mark.parametrize("adds_bos", [False, True], ids=["", "tokenizer adds a BOS"])
@pytest.mark.parametrize("form", FORMS)
def test_one_bos_where_the_template_writes_one(form, adds_bos, tmp_path):
    renderer = Renderer(save(tmp_path, FORMS[form], adds_bos=adds_bos))
    for messages in conversations(form):
        ids = renderer.prompt_ids(messages)
        assert ids.count(0) == (form in ("llama3", "mistral"))
        assert 0 not in ids[1:]


@pytest.mark.parametrize("form", FORMS)
def test_the_prompt_begins_the_whole_conversation(form, tmp_path):
    renderer = Renderer(save(tmp_path, FORMS[form], eos="<|im_end|>" if form == "chatml" else "</s>"))
    for messages in conversations(form):
        answer = {"role": "assistant", "content": "I am fine, thanks"}
        prompt, whole = renderer.prompt_ids(messages), renderer.prompt_ids([*messages, answer])
        assert whole[: len(prompt)] == prompt
        ids = renderer.answer_ids(answer["content"])
        assert whole[len(prompt) :][: len(ids)] == ids  # so the model was trained on what it is scored on
        assert ids[-1] == renderer.tokenizer.eos_token_id and ids.count(ids[-1]) == 1 and 0 not in ids


@pytest.mark.parametrize("adds_bos", [False, True], ids=["", "tokenizer adds a BOS"])
def test_an_answer_ends_at_eos_and_comes_back_as_text(adds_bos, tmp_path):
    renderer = Renderer(save(tmp_path, FORMS["zephyr"], adds_bos=adds_bos))
    for text in ("I am fine.", " spaces  kept ", "line\nline", "héllo 😀", ""):
        ids = renderer.answer_ids(text)
        assert ids[-1] == 1 and 0 not in ids and renderer.text(ids) == text
    assert renderer.answer_ids("") == [1]


def test_no_text_is_lost_in_a_prompt(tmp_path):
    renderer = Renderer(save(tmp_path, FORMS["chatml"]))
    shown = renderer.tokenizer.decode(renderer.prompt_ids(SYSTEM))
    assert all(m["content"] in shown for m in SYSTEM) and shown.endswith("<|im_start|>assistant\n")


def test_the_embedded_tokenizer_renders_like_the_others(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    renderer = Renderer(tmp_path)
    messages = [{"role": "user", "content": "write a sad poem"}]
    answer = "dear king , here is a sad poem ."
    prompt = renderer.prompt_ids(messages)
    whole = renderer.prompt_ids([*messages, {"role": "assistant", "content": answer}])
    assert prompt.count(renderer.tokenizer.bos_token_id) == 1
    assert whole[: len(prompt) + len(answer.split()) + 1] == prompt + renderer.answer_ids(answer)
    assert renderer.text(renderer.answer_ids(answer)) == answer
    assert renderer.pad_id == renderer.tokenizer.pad_token_id != renderer.tokenizer.eos_token_id


def test_padding_falls_back_to_eos(tmp_path):
    assert Renderer(save(tmp_path, FORMS["zephyr"])).pad_id == 1


@pytest.mark.parametrize(
    ("template", "eos", "said"),
    [
        (None, "</s>", "setting.chat_template"),
        (FORMS["zephyr"].replace("eos_token", "''"), None, "end-of-sequence"),
        ("{{ bos_token + bos_token }}{{ messages[0]['content'] }}", "</s>", "BOS token twice"),
    ],
)
def test_a_tokenizer_that_cannot_serve_is_refused(template, eos, said, tmp_path):
    with pytest.raises(UserError, match=said) as error:
        Renderer(save(tmp_path, template, eos=eos))
    assert str(tmp_path) in str(error.value)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="no tokenizer") as error:
        Renderer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_roles_that_a_template_refuses_are_named(tmp_path):
    renderer = Renderer(save(tmp_path, MISTRAL))
    with pytest.raises(UserError, match=r"\(system, user.*\).*alternate"):
        renderer.prompt_ids(SYSTEM[:2])


# --- templates for models without one ---------------------------------------------------------------------------


def test_a_template_by_name_by_file_or_not_at_all(tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    assert template_text("zephyr") == TEMPLATES["zephyr"]
    assert template_text(str(tmp_path / "own.jinja")) == "{{ messages }}"
    with pytest.raises(UserError, match="setting.chat_template=zefyr.*zephyr, chatml"):
        template_text("zefyr")


def test_adopting_a_template_links_the_weights_and_nothing_else(tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    save(model, None)
    out.mkdir()
    for name in ("model-1.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"):
        (model / name).write_text("{}")
    (model / "pytorch_model.bin").write_text("old")
    adopt({"template": TEMPLATES["chatml"]}, {"model": model}, StageContext("template", out))
    assert Renderer(out / "model").tokenizer.chat_template == TEMPLATES["chatml"]
    linked = {f.name for f in (out / "model").iterdir() if f.is_symlink()}
    assert linked == {"model-1.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"}
    assert all((out / "model" / name).resolve().parent == model for name in linked)
    with pytest.raises(UserError):
        Renderer(model)

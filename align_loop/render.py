"""The one renderer: from messages and answers to the token ids that sampler, judge and trainer all see.

The prompt is the chat template's own rendering up to the point where the assistant answers. An answer's ids end
at the end-of-sequence token, without what a template may put behind it, so that an answer written by a person and
one sampled from the model are of the same form.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from align_loop.errors import UserError
from align_loop.record import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = [{"role": "user", "content": "hello"}]


class Renderer:
    """Renders for the tokenizer in ``folder`` (a model folder)."""

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer  # slow import; a run in which nothing is left to do needs none

        self.folder = Path(folder)
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder}: no tokenizer to load: {' '.join(str(error).split())[:200]}") from error
        if not self.tokenizer.chat_template:
            raise UserError(f"{self.folder}: the tokenizer has no chat template; name one with setting.chat_template")
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"{self.folder}: the tokenizer has no end-of-sequence token, so no answer could end")
        self._check_bos()

    @property
    def pad_id(self) -> int:
        """What fills up a batch; where the tokenizer has no padding token any id does, since it is masked out."""
        return self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """The ids of a conversation up to where the assistant's answer begins; exactly one BOS, if any."""
        try:
            return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        except Exception as error:  # templates raise what they like, for roles or orders that they don't take
            roles = ", ".join(m["role"] for m in messages)
            raise UserError(
                f"the chat template of {self.folder} refuses a prompt with roles ({roles}): {error}"
            ) from None

    def answer_ids(self, text: str) -> list[int]:
        """The ids of a person's answer, ended by the end-of-sequence token."""
        return [*self.tokenizer(text, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]

    def followed_by(self, messages: list[Message], text: str) -> tuple[list[int], list[int]]:
        """(ids of a conversation up to where the user's next message ``text`` begins, ids of that message).

        Encoded apart, as prompt and answer are. ``UserError`` where the template does not show the text as it is.
        """
        whole = [*messages, {"role": "user", "content": text}]
        try:
            rendered = self.tokenizer.apply_chat_template(whole, tokenize=False)
        except Exception as error:  # as in prompt_ids
            raise UserError(f"the chat template of {self.folder} refuses a follow-up turn: {error}") from None
        at = rendered.rfind(text)
        if at < 0:
            raise UserError(f"the chat template of {self.folder} changes the text {text!r}: leave out its outer spaces")
        encode = self.tokenizer
        return (
            list(encode(rendered[:at], add_special_tokens=False).input_ids),
            list(encode(text, add_special_tokens=False).input_ids),
        )

    def single_token(self, word: str, key: str) -> int:
        """The id of a verdict word; ``UserError`` naming ``key`` where the word is not one token."""
        ids = self.tokenizer(word, add_special_tokens=False).input_ids
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            pieces = self.tokenizer.convert_ids_to_tokens(ids)
            raise UserError(f"{key}={word!r} is not one token for {self.folder} but {pieces}: choose another word")
        return ids[0]

    def text(self, ids: list[int]) -> str:
        """The text of sampled ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _check_bos(self) -> None:
        """Raise where the template writes the beginning-of-sequence token twice."""
        ids = self.prompt_ids(_PROBE)
        if self.tokenizer.bos_token_id is not None and ids.count(self.tokenizer.bos_token_id) > 1:
            raise UserError(f"{self.folder}: the chat template writes the BOS token twice; mend setting.chat_template")


def with_system(messages: list[Message], text: str) -> list[Message]:
    """The conversation under the system prompt ``text``, which follows one that is there already."""
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]

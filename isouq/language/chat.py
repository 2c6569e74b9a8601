"""Prompts as a model is asked them: as plain texts, or as a user's turn by the tokenizer's own chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isouq.language import encoding


@dataclass(frozen=True)
class Prompting:
    """How prompts and answers become ids. `system` is the text of a system message before the prompt, in a chat.

    Raises ValueError for a chat whose tokenizer has no template, and for a system text without a chat.
    """

    tokenizer: Any
    chat: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        name = getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__
        if self.chat and not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                f"chat: the tokenizer of {name} has no chat template; leave it out, or take an instruct model"
            )
        if self.system is not None and not self.chat:
            raise ValueError("system: a text given, but no chat; add chat, or write the text into the prompts")

    def prompt_ids(self, prompt: str) -> list[int]:
        """The ids of a prompt that waits for its answer; a template brings its own special tokens.

        Raises ValueError where the template refuses the messages.
        """
        if not self.chat:
            return self._started_once(prompt, encoding.prompt_ids(self.tokenizer, prompt))
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        messages.append({"role": "user", "content": prompt})
        try:
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # whatever the template's own code raises: many have no system message
            what = "system: " if self.system is not None else "prompt: "
            raise ValueError(
                f"{what}the model's chat template refuses it: {error}; write it into the prompt"
            ) from error
        return list(ids)

    def pair(self, prompt: str, answer: str, place: int | None = None) -> encoding.Pair:
        """As `encoding.pair`. In a chat, a template ends before the answer, whose ids are its own: none straddles."""
        if not self.chat:
            plain = encoding.pair(self.tokenizer, prompt, answer, place)
            return plain._replace(prompt=self._started_once(prompt, plain.prompt))
        if not (isinstance(prompt, str) and isinstance(answer, str)):
            where = "" if place is None else f" as number {place}"
            raise TypeError(f"prompts and answers: {prompt!r} and {answer!r} given{where}, texts wanted")
        return encoding.Pair(self.prompt_ids(prompt), encoding.answer_ids(self.tokenizer, answer), False)

    def _started_once(self, prompt: str, ids: list[int]) -> list[int]:
        """A prompt's ids with one start token, where its text has one already, as a template's does."""
        start, text = self.tokenizer.bos_token_id, self.tokenizer.bos_token
        doubled = start is not None and ids[:2] == [start, start] and not prompt.startswith(2 * text)
        return ids[1:] if doubled else ids

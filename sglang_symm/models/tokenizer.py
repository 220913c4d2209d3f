# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, from a Hugging Face folder's `tokenizer.json`, without transformers."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_symm.models.config import read_json


class Tokenizer:
    """`encode(text) -> ids`, `chat(text) -> ids` through the model's chat template, `decode(ids) -> text`.

    Raises FileNotFoundError if the folder has no tokenizer.json, ValueError that names a file which cannot be read,
    ImportError without the package tokenizers."""

    def __init__(self, folder: str | Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError("reading a tokenizer needs tokenizers: pip install 'sglang-symm[models]'") from error
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(f"expected a tokenizer.json, found none in {folder}")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"{folder / 'tokenizer.json'} is no tokenizer: {error}") from error
        settings = folder / "tokenizer_config.json"
        self._settings: dict[str, Any] = read_json(settings) if settings.is_file() else {}
        template = folder / "chat_template.jinja"
        self.chat_template: str | None = (
            template.read_text() if template.is_file() else self._settings.get("chat_template")
        )

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with the special tokens that the model expects around it."""
        return self._tokenizer.encode(text).ids

    def chat(self, text: str) -> list[int]:
        """The ids of a conversation in which the user says `text` and the assistant is next. ValueError without a chat
        template."""
        return self._tokenizer.encode(self.render(text), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def render(self, text: str) -> str:
        """The conversation of `chat` as text."""
        if not isinstance(self.chat_template, str):
            raise ValueError(
                "the model has no chat template: expected chat_template.jinja or one in tokenizer_config.json"
            )
        from jinja2 import TemplateError

        # A template comes with a download: it may not run code.
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value, **kwargs: json.dumps(value, ensure_ascii=False, **kwargs)
        try:
            return environment.from_string(self.chat_template).render(
                messages=[{"role": "user", "content": text}],
                add_generation_prompt=True,
                raise_exception=_raise,
                strftime_now=lambda form: datetime.datetime.now().strftime(form),
                **{name: self._special(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")},
            )
        except TemplateError as error:
            raise ValueError(f"chat template: {error}") from error

    def _special(self, name: str) -> str:
        token = self._settings.get(name) or ""
        return token["content"] if isinstance(token, dict) else token


def _raise(message: str) -> None:
    raise ValueError(f"chat template: {message}")

"""The tokenizer of a text generator: found beside its model, carried in its plan, loaded by the `tokenizers` and `transformers` libraries."""

from __future__ import annotations

import functools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rewrite.errors import RewriteError
from rewrite.model import Model

FOLDER, EOS = "rewrite.tokenizer", "rewrite.eos"  # of a model's metadata: an absolute path, and ids as a JSON list
_loading = threading.Lock()  # transformers imports its parts when they are asked for, which two threads cannot do at once
TAIL = 4  # tokens of a prompt that are decoded again with what follows
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")


def _metadata(model: Model, key: str) -> str | None:
    return next((p.value for p in model.proto.metadata_props if p.key == key), None)


def eos_of(model: Model) -> list[int]:
    """Ids of the tokens that end a text, as the model was exported with them; none if nobody said. Raises RewriteError for anything else."""
    try:
        return [int(i) for i in json.loads(_metadata(model, EOS) or "[]")]
    except (ValueError, TypeError, RecursionError) as error:
        raise RewriteError(f"{model.name}: its metadata '{EOS}' are no list of token ids; export it again") from error


def tokenizer_folder(model: Model, given: str | os.PathLike[str] | None) -> Path | None:
    """The folder `given`, or the one that the model was exported with, if it is still there.

    Raises RewriteError if the folder given holds no tokenizer.
    """
    if given is not None:
        if not any(os.path.isfile(Path(given) / name) for name in ("tokenizer.json", "tokenizer_config.json")):
            raise RewriteError(f"{given}: holds no tokenizer (tokenizer.json); give the folder of one, as transformers writes it")
        return Path(given)
    recorded = _metadata(model, FOLDER)
    return Path(recorded) if recorded and os.path.isfile(Path(recorded) / "tokenizer_config.json") else None


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer, and nothing else of the folder."""
    target.mkdir()
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, folder: Path):
        with _loading:
            try:
                from transformers import AutoTokenizer
            except ImportError as error:
                raise RewriteError("text needs the tokenizers of transformers; install the extra: pip install 'rewrite-onnx[export]', or give token ids") from error
            try:
                self.inner: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except Exception as error:
                raise RewriteError(f"{folder}: the tokenizer cannot be loaded: {type(error).__name__}: {str(error)[:200]}") from error

    @property
    def has_chat_template(self) -> bool:
        return bool(self.inner.chat_template)

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Raises RewriteError for bytes of a terminal or a file that were no UTF-8."""
        _check_text(text)
        return [int(i) for i in self.inner(text)["input_ids"]]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The ids of a dialogue, [{"role": "user", "content": ...}, ...], up to where the model answers.

        Raises RewriteError without a template, or with what it says: many refuse a system message, or two of one role in a row.
        """
        if not self.has_chat_template:
            raise RewriteError("the tokenizer has no chat template; give the prompt as plain text (--no-chat)")
        for message in messages:
            if isinstance(content := message.get("content"), str):
                _check_text(content)
        try:
            made = self.inner.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=True)
        except Exception as error:  # of the template, whose author chose it
            raise RewriteError(f"the tokenizer's chat template does not take these messages: {type(error).__name__}: {str(error)[:300]}") from error
        return [int(i) for i in made["input_ids"]]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.inner.decode(list(ids), skip_special_tokens=True))

    def continuation(self, prompt: Sequence[int]) -> Callable[[list[int]], str]:
        """A decoder of what follows the prompt: many tokenizers drop the space before a first word, which here is none."""
        tail = list(prompt[-TAIL:])

        @functools.cache
        def decoded_tail() -> str:  # when it is wanted: only then the scheduler has seen that the prompt's ids are tokens
            return self.decode(tail)

        def decode(ids: list[int]) -> str:
            text, before = self.decode([*tail, *ids]), decoded_tail()
            return text[len(before) :] if text.startswith(before) else self.decode(ids)

        return decode


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RewriteError(f"prompt {text[:40]!r}: character {error.start + 1} is no text (bytes that are not UTF-8); give the prompt as UTF-8") from error

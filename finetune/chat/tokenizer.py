"""The model's tokenizer and chat template, in one object: the only place where text becomes token ids.

Built on Hugging Face `tokenizers` directly. PaddleNLP's own loader takes a slow class that drops the newline after
`<|im_end|>`, and transformers is not a dependency. The method names are transformers'.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import tokenizers
from tokenizers import normalizers, processors

from finetune.chat.folder import read_folder
from finetune.chat.template import ChatTemplate, TemplateFault
from finetune.errors import CheckpointError, DataError
from finetune.files import write_json

_LONG_TOKEN = 8  # characters; texts of longer ones on average, such as long runs of spaces, are rare
_END_OF_TURN = ("<|im_end|>", "<|endoftext|>")


class Encoded(dict):
    """What a call of the tokenizer returns: `input_ids` and `attention_mask`, as keys and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Tokenizer:
    """A byte-level BPE tokenizer with the special tokens and chat template of a model folder.

    Attributes:
        backend: The `tokenizers.Tokenizer`. Never pads, truncates or adds tokens.
        special_tokens: Role to text, e.g. {"eos_token": "<|im_end|>"}; only roles that have a token.
        templates: Chat templates by name; "default" is the one used, "tool_use" (if there) when tools are given.
        around: Token ids that stand before and behind a plain text, ([BOS], []) say; mostly none.
        padding_side: "left", so that prompts of different length end at the same place for generation.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        templates: dict[str, str] | None = None,
        config: dict[str, Any] | None = None,
        where: str = "tokenizer",
    ):
        self.backend = backend
        self.backend.no_padding()
        self.backend.no_truncation()
        self.padding_side = "left"
        self.tensors: dict[str, Callable[[np.ndarray], Any]] = {"np": np.asarray}
        self.special_tokens = {k: v for k, v in (special_tokens or {}).items() if v is not None}
        self.templates = {
            name: ChatTemplate(source, f"{where}: {name} chat template") for name, source in (templates or {}).items()
        }
        self._config = dict(config or {})
        self._where = where
        # What the folder's post-processor puts around plain text, BOS say, is kept beside the backend: offsets must
        # count every character of the text, and a rendered chat has all its tokens already.
        self._post_processor = backend.post_processor
        self.around = _tokens_around(backend)
        self.backend.post_processor = processors.ByteLevel(trim_offsets=False)
        for role, text in self.special_tokens.items():
            if backend.token_to_id(text) is None:
                raise CheckpointError(
                    f"{role} is {text!r}, which is not in the vocabulary",
                    where=where,
                    fix="Correct tokenizer_config.json, or copy the tokenizer files from the original model.",
                )

    # -- opening and saving ------------------------------------------------------------------------------------

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Open the tokenizer of a Hugging Face or PaddleNLP model folder.

        Raises:
            CheckpointError: no tokenizer in the folder, or a file of it is damaged.
        """
        return cls(**vars(read_folder(Path(path))))

    def content(self) -> dict[str, Any]:
        """All that text's tokens depend on, as JSON values: for another process, see `of_content`, and for keys."""
        return {
            "backend": self._full_text(),
            "special_tokens": self.special_tokens,
            "templates": {name: template.source for name, template in self.templates.items()},
            "where": self._where,
        }

    @classmethod
    def of_content(cls, content: dict[str, Any]) -> Tokenizer:
        """The tokenizer that another process described."""
        backend = tokenizers.Tokenizer.from_str(content["backend"])
        return cls(backend, **{name: value for name, value in content.items() if name != "backend"})

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer so that transformers 4 and 5, PaddleNLP and `from_folder` open it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer_json = json.loads(self._full_text())
        write_json(folder / "tokenizer.json", tokenizer_json, sort_keys=False)
        model = tokenizer_json["model"]
        if model.get("type") == "BPE":
            # PaddleNLP and transformers' slow classes read these two.
            write_json(folder / "vocab.json", model["vocab"], indent=None, sort_keys=False)
            merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
            (folder / "merges.txt").write_text(
                "#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges), encoding="utf-8"
            )
        write_json(folder / "tokenizer_config.json", self._full_config(tokenizer_json), sort_keys=False)
        if "default" in self.templates:
            (folder / "chat_template.jinja").write_text(self.templates["default"].source, encoding="utf-8", newline="")

    def _full_text(self) -> str:
        """tokenizer.json, with the folder's own post-processor."""
        reading, self.backend.post_processor = self.backend.post_processor, self._post_processor
        try:
            return self.backend.to_str()
        finally:
            self.backend.post_processor = reading

    def _full_config(self, tokenizer_json: dict[str, Any]) -> dict[str, Any]:
        config = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 32768, **self._config}
        config.pop("added_tokens_decoder", None)
        config.pop("chat_template", None)
        config.update({role: self.special_tokens.get(role) for role in ("bos_token", "eos_token", "pad_token")})
        config.update({role: text for role, text in self.special_tokens.items() if role not in config})
        config.setdefault("unk_token", None)
        config.update(add_prefix_space=False, clean_up_tokenization_spaces=False, split_special_tokens=False)
        config["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in tokenizer_json["added_tokens"]
        }
        if list(self.templates) == ["default"]:
            config["chat_template"] = self.templates["default"].source
        elif self.templates:
            config["chat_template"] = [{"name": n, "template": t.source} for n, t in self.templates.items()]
        return config

    # -- vocabulary --------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Tokens of the model's vocabulary, without added ones, as transformers counts."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def beyond(self, token: int, vocab_size: int) -> tuple[str, str]:
        """What to say of a token that the model has no embedding for: what was found, and the fix."""
        what = f"token {self.backend.id_to_token(token)!r} has id {token}, but the model has {vocab_size:,} embeddings"
        return (
            f"{what} and the tokenizer {len(self):,} tokens",
            "Give each token an embedding first: in transformers, model.resize_token_embeddings(len(tokenizer)), then "
            "save both. Or take the tokenizer that belongs to the model.",
        )

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of(self.eos_token)

    @property
    def pad_token(self) -> str | None:
        """The padding token; where a folder names none, the end of text stands in (padding is always masked)."""
        return self.special_tokens.get("pad_token") or self.eos_token

    @property
    def pad_token_id(self) -> int:
        return self._id_of(self.pad_token) or 0

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end a response: the end of text, and `<|im_end|>` and `<|endoftext|>` where they exist."""
        ids = [self._id_of(text) for text in (self.eos_token, *_END_OF_TURN)]
        return sorted({token for token in ids if token is not None})

    @cached_property
    def special_texts(self) -> list[str]:
        """The texts of all special tokens."""
        return [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]

    @property
    def all_special_ids(self) -> list[int]:
        return sorted(id for id, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | None | list[int | None]:
        if isinstance(tokens, str):
            return self._id_of(tokens)
        return [self._id_of(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | None | list[str | None]:
        if isinstance(ids, (int, np.integer)):
            return self.backend.id_to_token(int(ids))
        return [self.backend.id_to_token(int(token)) for token in ids]

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    # -- text to ids and back ----------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Other threads go on meanwhile, however long it is.

        Args:
            add_special_tokens: Put around it what the tokenizer puts around plain text. False for a rendered chat.
        """
        ids = self._encodings([text], offsets=False)[0].ids
        before, after = self.around
        return [*before, *ids, *after] if add_special_tokens else ids

    def least_tokens(self, text: str, enough: int) -> int:
        """A number of tokens that the text surely has; 0 where its beginning does not say whether it has `enough`.

        Looks at no more than 8 x `enough` characters. Words (as the pre-tokenizer splits) that end before the last one
        of a beginning are words of the whole text, with the same tokens, but for an added token that is cut in two.
        """
        if len(text) <= _LONG_TOKEN * enough:
            return 0
        words = self._encodings([text[: _LONG_TOKEN * enough]], offsets=True)[0].word_ids
        cut = max((len(token.content) for token in self.backend.get_added_tokens_decoder().values()), default=0)
        least = sum(word != words[-1] for word in words) - cut
        return least if least >= enough else 0

    def _encodings(self, texts: Sequence[str], *, offsets: bool) -> list[tokenizers.Encoding]:
        """The one call that turns text into tokens. Unlike `encode` it lets other threads run."""
        encode = self.backend.encode_batch if offsets else self.backend.encode_batch_fast
        return encode(list(texts), add_special_tokens=False)

    def encode_batch(self, texts: Sequence[str], *, offsets: bool = True) -> list[tokenizers.Encoding]:
        """Encodings of texts, on as many cores as `tokenizers` may use.

        Nothing is added around them.

        Most texts are in NFC as they are. Finding that out takes little, and without the normalizer they are done in
        three quarters of the time. Not for several threads at once.

        Args:
            offsets: Whether the characters of each token are wanted; finding them takes a quarter of the time.
        """
        normalizer = self.backend.normalizer
        if not isinstance(normalizer, normalizers.NFC):
            return self._encodings(texts, offsets=offsets)
        plain = [unicodedata.is_normalized("NFC", text) for text in texts]
        whole = [text for text, is_plain in zip(texts, plain) if is_plain]
        others = [text for text, is_plain in zip(texts, plain) if not is_plain]
        self.backend.normalizer = None
        try:
            encoded = self._encodings(whole, offsets=offsets)
        finally:
            self.backend.normalizer = normalizer
        parts = iter(encoded), iter(self._encodings(others, offsets=offsets))
        return [next(parts[not is_plain]) for is_plain in plain]

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of token ids (a list, an array or a tensor). Bytes that are no character become U+FFFD."""
        return self.backend.decode(_flat_ids(ids), skip_special_tokens=skip_special_tokens)

    def batch_decode(self, rows: Any, skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(row, skip_special_tokens) for row in rows]

    def __call__(
        self,
        text: str | Sequence[str],
        return_tensors: str | None = None,
        padding: bool = False,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
    ) -> Encoded:
        """Encode one text or several.

        Args:
            return_tensors: None for lists; else int64 tensors [B, L] of a kind in `tensors`: "np" for NumPy's, and
                "pd" for Paddle's where `finetune.AutoTokenizer` opened the tokenizer.
            add_special_tokens: See `encode`.
            padding: Pad to the longest; needed for tensors of texts that differ in length.
            padding_side: "left" (default, for generation) or "right".

        Returns:
            `input_ids` and `attention_mask`; flat lists for one text without `return_tensors`.
        """
        single = isinstance(text, str)
        before, after = self.around if add_special_tokens else ([], [])
        encodings = self._encodings([text] if isinstance(text, str) else text, offsets=False)
        rows = [[*before, *encoding.ids, *after] for encoding in encodings]
        return self._encoded(rows, single, return_tensors, padding, padding_side)

    def _encoded(
        self, rows: list[list[int]], single: bool, return_tensors: str | None, padding: bool, padding_side: str | None
    ) -> Encoded:
        masks = [[1] * len(row) for row in rows]
        if padding:
            longest = max(map(len, rows), default=0)
            left = (padding_side or self.padding_side) == "left"
            rows = [_padded(row, longest, self.pad_token_id, left) for row in rows]
            masks = [_padded(mask, longest, 0, left) for mask in masks]
        if return_tensors is None:
            return Encoded(input_ids=rows[0] if single else rows, attention_mask=masks[0] if single else masks)
        if len({len(row) for row in rows}) > 1:
            raise ValueError("texts of different length do not fit one tensor; pass padding=True")
        if return_tensors not in self.tensors:
            known = ", ".join(map(repr, self.tensors))
            raise ValueError(f"return_tensors is {return_tensors!r}; it may be None or {known}")
        make = self.tensors[return_tensors]
        return Encoded(input_ids=make(np.asarray(rows, np.int64)), attention_mask=make(np.asarray(masks, np.int64)))

    # -- chats -------------------------------------------------------------------------------------------------

    @property
    def chat_template(self) -> str | None:
        """The Jinja text of the default chat template; None when the folder has none."""
        return self.templates["default"].source if "default" in self.templates else None

    def template_for(self, tools: list | None = None) -> ChatTemplate:
        """The template that renders a conversation with these tools.

        Raises:
            CheckpointError: the folder has no chat template.
        """
        if tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" not in self.templates:
            raise CheckpointError(
                "the model has no chat template",
                where=self._where,
                fix="Put chat_template.jinja into the model folder (that of the -Instruct model, say), "
                "or set chat_template in its tokenizer_config.json.",
            )
        return self.templates["default"]

    def render(self, messages: list[dict], tools: list | None = None, add_generation_prompt: bool = False, **kw) -> str:
        """The text of a conversation.

        Raises:
            TemplateFault: the template refused these messages.
        """
        variables = {**self.special_tokens, "documents": None, **kw}
        return self.template_for(tools).render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables
        )

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        tools: list | None = None,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        padding: bool = False,
        **kw: Any,
    ) -> Any:
        """Render one conversation or several, to text (`tokenize=False`) or ids, as transformers' method does.

        Returns:
            Text or a list of ids; lists of them for several conversations; `Encoded` with `return_dict`; a tensor
            with `return_tensors`.

        Raises:
            DataError: the template refused the messages.
        """
        if not conversation:
            raise DataError("the conversation has no messages", fix="Give at least one message.")
        several = isinstance(conversation[0], (list, tuple))
        conversations = cast(list[list[dict[str, Any]]], conversation if several else [conversation])
        try:
            texts = [self.render(messages, tools, add_generation_prompt, **kw) for messages in conversations]
        except TemplateFault as error:
            raise DataError(f"the chat template refused the messages: {error}") from error
        if not tokenize:
            return texts if several else texts[0]
        given = texts if several else texts[0]
        encoded = self(given, return_tensors=return_tensors, padding=padding, add_special_tokens=False)
        return encoded if return_dict else encoded.input_ids


class StreamDecoder:
    """Turn token ids into text piece by piece, never splitting a character.

    >>> decoder = StreamDecoder(tokenizer)
    >>> for token in tokens: print(decoder.push(token), end="")
    >>> print(decoder.finish())

    The pieces joined are the decoded whole. Only the tokens since the last whole character are decoded again.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._shown: list[int] = []  # the last tokens already given out, context for a decoder that joins words
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain, often empty within a character of several tokens."""
        self._waiting.append(int(token))
        text = self._new_text()
        if text.endswith("\ufffd"):
            return ""
        self._shown, self._waiting = self._waiting, []
        return text

    def finish(self) -> str:
        """The rest; an unfinished character comes out as U+FFFD."""
        text = self._new_text()
        self._shown, self._waiting = [], []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._shown, self._skip)
        return self._tokenizer.decode(self._shown + self._waiting, self._skip)[len(before) :]


def _tokens_around(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """What a backend's post-processor puts before and behind a text."""
    encoding = backend.encode("a")
    given = [i for i, added in enumerate(encoding.special_tokens_mask) if not added]
    if not given:
        return encoding.ids, []
    return encoding.ids[: given[0]], encoding.ids[given[-1] + 1 :]


def _padded(row: list[int], length: int, value: int, left: bool) -> list[int]:
    fill = [value] * (length - len(row))
    return fill + row if left else row + fill


def _flat_ids(ids: Any) -> list[int]:
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    return [ids] if isinstance(ids, int) else [int(token) for token in ids]

"""Text to token ids and back: tokenizer.json, chat templates, and text that is emitted as its tokens come."""

import json
from collections.abc import Sequence as Seq
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from inference.checkpoint import (
    CheckpointError,
    read_chat_template,
    read_eos_token_ids,
    read_optional_json,
    token_text,
)
from scheduling.core.sequence import SamplingParams

REPLACEMENT = "\ufffd"
MAX_WINDOW_TOKENS = 16
"""Tokens decoded together at most while none of them ends a character; no character has more than four bytes."""
BREAK = "\U0010fffd"
"""Cuts text from outside in a rendered chat, so that it spells no control token; a character of private use."""
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplateMissing(Exception):  # noqa: N818
    """This model has no chat template. Use /v1/completions with a prompt."""

    def __init__(self) -> None:
        super().__init__(self.__doc__)


class ChatTemplateFailed(Exception):  # noqa: N818
    """The chat template refused these messages; the message says what it said."""


class Tokenizer:
    """A checkpoint's tokenizer."""

    def __init__(
        self, backend: tokenizers.Tokenizer, eos_token_ids: frozenset[int], template: str | None, **special: str
    ):
        self._backend = backend
        self._template = _environment().from_string(template) if template is not None else None
        if self._template is not None:
            # A render copies them; from jinja's chain of maps that takes longer than the rest.
            self._template.globals = dict(self._template.globals)
        self._special = special
        self.eos_token_ids = eos_token_ids
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(i for i, t in added.items() if t.special)
        self._added = {i: t.content for i, t in added.items()}
        self._controls = [t.content for t in added.values() if t.special]
        self._bytes = TokenBytes(json.loads(backend.to_str())["decoder"])

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read tokenizer.json beside its configuration. Raises CheckpointError where it cannot be used."""
        file = path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{path} has no tokenizer.json. Save the tokenizer in its fast form.")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file} cannot be read: {error}. Download it again.") from error
        config = read_optional_json(path / "tokenizer_config.json")
        special = {name: text for name in SPECIAL_NAMES if (text := token_text(config.get(name))) is not None}
        _configure(backend, list(special.values()))
        try:
            return cls(backend, read_eos_token_ids(path), read_chat_template(path), **special)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"The chat template of {path} cannot be compiled: {error}.") from error

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` works."""
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, as transformers' AutoTokenizer gives them."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def render_chat(self, messages: Seq[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant answers.

        Control tokens come from the template only: where a message spells one, it is read as the characters that it
        has. Raises ChatTemplateMissing or ChatTemplateFailed.
        """
        if self._template is None:
            raise ChatTemplateMissing
        try:
            text = self._template.render(
                messages=[self._disarm(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise ChatTemplateFailed(f"The model's chat template refused these messages: {error}") from error
        return [token for piece in text.split(BREAK) for token in self.encode(piece, add_special_tokens=False)]

    def _disarm(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message whose strings have a break inside of every control token that they spell."""
        return {name: self._break(value) if isinstance(value, str) else value for name, value in message.items()}

    def _break(self, text: str) -> str:
        for control in self._controls:
            if control in text:
                text = text.replace(control, control[0] + BREAK + control[1:])
        return text

    def token_bytes(self, token_id: int, *, is_first: bool = False) -> bytes:
        """What a token adds to a text, which may be part of a character. An unknown id gives nothing.

        The bytes of a text's tokens together are its UTF-8. `is_first`: decoders that drop a text's leading space do.
        """
        piece = self._added.get(token_id)
        if piece is not None:
            return piece.encode()
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        found = self._bytes.read(piece, is_first=is_first)
        return self.decode([token_id]).encode() if found is None else found

    def silent_token_ids(self, sampling: SamplingParams) -> frozenset[int]:
        """Tokens of which a request's text shows nothing: special ones, and those that end it."""
        silent: frozenset[int] = frozenset()
        if not sampling.include_stop:
            silent = frozenset(sampling.stop_token_ids)
            if not sampling.ignore_eos:
                silent |= self.eos_token_ids
        return silent | self.special_token_ids if sampling.skip_special_tokens else silent

    def decode(self, ids: Seq[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. Ids outside the vocabulary give no text."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)


def _configure(backend: tokenizers.Tokenizer, special: Seq[str]) -> None:
    """Make the configuration's special tokens known, as transformers does; all else stands in tokenizer.json."""
    backend.no_padding()
    backend.no_truncation()
    known = {t.content for t in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in special if t not in known])


def _environment() -> ImmutableSandboxedEnvironment:
    """The sandbox that transformers renders chat templates in."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it only passes its body on."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TokenBytes:
    """Reads the bytes of a token out of its piece in the vocabulary, as the decoder of tokenizer.json does it."""

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        steps = _flatten(decoder)
        kinds = {step["type"] for step in steps}
        self._is_byte_level = "ByteLevel" in kinds
        self._has_byte_pieces = "ByteFallback" in kinds
        spaces = {step["replacement"] for step in steps if step["type"] == "Metaspace"}
        spaces |= {
            step["pattern"].get("String") for step in steps if step["type"] == "Replace" and step["content"] == " "
        }
        self._space = next(iter(spaces), None)
        self._strips = any(
            (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            or (step["type"] == "Strip" and step["content"] == " " and step["start"] > 0)
            for step in steps
        )

    def read(self, piece: str, *, is_first: bool) -> bytes | None:
        """The bytes; None where the decoder is of another kind."""
        if self._is_byte_level:
            try:
                return bytes(BYTE_OF[character] for character in piece)
            except KeyError:
                return piece.encode()
        if self._space is None:
            return None
        if self._has_byte_pieces and len(piece) == 6 and piece.startswith("<0x"):
            return bytes.fromhex(piece[3:5])
        text = piece.replace(self._space, " ")
        return (text[1:] if is_first and self._strips and text.startswith(" ") else text).encode()


def _flatten(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _flatten(part)]
    return [decoder]


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (Radford et al. 2019, section 2.2)."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF = _byte_alphabet()


class TextStream:
    """Turns tokens into text as they come, never half a character, and looks for stop strings over token boundaries.

    What a token gives depends on the tokens before it only, so a resumed request has the same text per token. The
    pieces together are the decoded whole up to the stop string. Decodes a window of the last few tokens, whose head is
    text already emitted: decoders treat the first token of a text apart (a leading space), so none is decoded alone.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        silent_token_ids: frozenset[int] | None = None,
    ) -> None:
        """Text of the first `min_tokens` tokens is not searched for stop strings. `include_stop`: the text ends with
        the stop string rather than before it. Silent tokens, by default the special ones, give no text."""
        self._tokenizer = tokenizer
        self._stop = tuple(s for s in stop if s)
        self._include_stop = include_stop
        self._num_unsearched = min_tokens
        self._skip_special_tokens = skip_special_tokens
        self._silent = tokenizer.special_token_ids if silent_token_ids is None else silent_token_ids
        self._window: list[int] = []
        self._num_read = 0
        """Tokens of the window whose text is emitted."""
        self._num_emitted = 0
        """Characters of the window's text that are emitted."""
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.stopped = False

    @classmethod
    def of(cls, tokenizer: Tokenizer, sampling: SamplingParams) -> "TextStream":
        """The stream of a request."""
        return cls(
            tokenizer,
            sampling.stop,
            min_tokens=sampling.min_tokens,
            include_stop=sampling.include_stop,
            skip_special_tokens=sampling.skip_special_tokens,
            silent_token_ids=tokenizer.silent_token_ids(sampling),
        )

    def push(self, token_id: int) -> str:
        """Text that may be emitted now; empty while a character or a possible stop string is incomplete."""
        self._num_unsearched -= 1
        if self.stopped or token_id in self._silent:
            return ""
        self._window.append(token_id)
        text = self._decode()
        end = len(text.rstrip(REPLACEMENT))
        too_long = len(self._window) > MAX_WINDOW_TOKENS
        if too_long and end < len(text):
            end = len(text) - 1  # no character is so long: these are no characters, but the last may still become one
        piece = text[self._num_emitted : end]
        self._num_emitted = max(self._num_emitted, end)
        if piece and end == len(text):
            self._slide(self._num_read)
        elif too_long:
            self._slide(len(self._window) - 4)
        return self._release(piece) if piece else ""

    def finish(self) -> str:
        """The rest that was held back; nothing where a stop string was met."""
        if self.stopped:
            return ""
        rest = self._decode()[self._num_emitted :] if self._window else ""
        self._window = []
        piece = self._release(rest)
        rest, self._held = self._held, ""
        return piece + rest

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, self._skip_special_tokens)

    def _slide(self, start: int) -> None:
        self._window = self._window[start:]
        self._num_read = len(self._window)
        text = self._decode()
        self._num_emitted = len(text) - text.endswith(REPLACEMENT)

    def _release(self, piece: str) -> str:
        """Add to the held text; give what no stop string can begin in."""
        if not self._stop or self._num_unsearched >= 0:
            return piece
        text = self._held + piece
        found = [(at, at + len(s) * self._include_stop) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max(_overlap(text, s) for s in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class Characters:
    """A text stream whose tokens are characters: what is journalled of an upstream's answer, which has no token ids."""

    stopped = False
    """Stop strings are the upstream's to find."""

    def push(self, token_id: int) -> str:
        """The character. A journal that a model computed here has begun holds others, which stand for nothing."""
        is_character = 0 <= token_id <= 0x10FFFF and not 0xD800 <= token_id <= 0xDFFF
        return chr(token_id) if is_character else REPLACEMENT

    def finish(self) -> str:
        """Nothing is held back."""
        return ""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

"""What a tokenizer's vocabulary says: the text of each token, and which one begins a row."""

import codecs
import functools
import hashlib
import re
from typing import Any

from sae_core.errors import UnsupportedModel


def row_start(tokenizer: Any, name: str) -> int:
    """The token that opens every row: what documents began with, or were parted by, when the model was trained.

    The tokenizer's bos token, unless that opens a chat turn (`<|im_start|>`: put there by tuning, rare in pre-training);
    then `<|endoftext|>`, if the vocabulary has it; then the eos token. SmolLM2: 0, GPT-2: 50256, Llama 3: 128000.
    """
    vocabulary = tokenizer.get_vocab()
    candidates = [tokenizer.bos_token, "<|endoftext|>", tokenizer.eos_token]
    if candidates[0] and "im_start" in candidates[0]:
        candidates = candidates[1:]
    for token in candidates:
        if token is not None and token in vocabulary:
            return int(vocabulary[token])
    raise UnsupportedModel(f"{name} cannot be used: its tokenizer has no token to begin a row with (bos or eos).")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash; equal means that texts become the same tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def vocabulary_texts(tokenizer: Any) -> list[str]:
    """The text of every id. Vocabularies write bytes in one of two ways, which the tokenizer's decoder tells apart:
    GPT-2's byte-level alphabet, or SentencePiece's U+2581 for a space with `<0x0A>` for a byte."""
    vocabulary = tokenizer.get_vocab()
    added = set(tokenizer.get_added_vocab())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    show = _byte_level_text if backend is not None and "ByteLevel" in repr(backend.decoder) else _sentencepiece_text
    texts = [f"<id {i}>" for i in range(max(vocabulary.values(), default=-1) + 1)]
    for token, i in vocabulary.items():
        texts[i] = token if token in added else show(token)
    return texts


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable ones stand for themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _byte_level_text(token: str) -> str:
    alphabet = _byte_alphabet()
    if not all(c in alphabet for c in token):
        return token
    return bytes(alphabet[c] for c in token).decode("utf-8", errors="show_bytes")


def _sentencepiece_text(token: str) -> str:
    if (byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)) and int(byte[1], 16) < 0x80:
        return chr(int(byte[1], 16))
    return token.replace("▁", " ")


def _show_bytes(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(f"<0x{byte:02X}>" for byte in error.object[error.start : error.end]), error.end


codecs.register_error("show_bytes", _show_bytes)

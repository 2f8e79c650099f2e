"""Names of files and classes as text that can be printed, drawn and written everywhere."""

import hashlib
import os
import unicodedata


def printable(name: str) -> str:
    r"""A name without characters that break a line, a terminal or an encoding.

    Control characters, line separators, text direction marks and bytes that are not UTF-8 are
    escaped as in Python, and so is the backslash of such names.
    """
    if name.isprintable() or not any(map(_is_unsafe, name)):
        return name
    return "".join(_escaped(char) if _is_unsafe(char) or char == "\\" else char for char in name)


def same_class(name: str) -> str:
    """The form in which two spellings of a class name are compared (Unicode NFC)."""
    return unicodedata.normalize("NFC", name)


def cut(name: str, limit: int = 200) -> str:
    """A file name of at most `limit` bytes in UTF-8; a hash keeps shortened names different."""
    encoded = os.fsencode(name)
    if len(encoded) <= limit:
        return name
    mark = f"-{hashlib.sha256(encoded).hexdigest()[:10]}"
    return encoded[: limit - len(mark)].decode(errors="ignore") + mark


def _is_unsafe(char: str) -> bool:
    return (
        unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in "\u200c\u200d"
    )


def _escaped(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as Python decodes file names
        return f"\\x{code - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()

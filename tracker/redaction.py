"""Masks passwords, tokens and keys in what is logged with `***`.

If the end of a secret is uncertain, too much is masked rather than too little. All functions are
idempotent.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

MASK = "***"

_USERINFO = re.compile(
    r"//(?P<user>[^/?#:@\s\[\]\"']*)"
    r"(?P<password>:(?!\d{1,5}[/?#\"'])"  # that would be //host:port/
    r"(?:(?!://)\S)*)?@"  # up to the last @ before the next URI: a password may contain @ and /
)
_QUERY_NAME = re.compile(r"(?:[?&;]|%3[BF]|%26)([\w.\-]+)(?:=|%3D)", re.IGNORECASE)
_QUERY_SECRET = re.compile(r"key|(?:.*[\W_])?sig(?:nature)?", re.IGNORECASE)
_QUERY_VALUE = re.compile(r"[^&\s]*?(?=[\"']?[.,:;)]?(?:[&\s]|$))")

_ASSIGNED = re.compile(
    r"(?<![?&;\w.\-/\[\]])(?P<name>[\w.\-/\[\]]+)"
    r"(?P<sign>[\"']?\]?\s*=|[\"']\s*:|\s*:(?=\s)|\s+)"
)

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# fmt: off
_SECRET_WORDS = {
    "auth", "authorization", "oauth", "bearer", "jwt", "pwd", "secrets", "credential",
    "credentials", "passwords",
}
_SECRET_ENDINGS = ("password", "passwd", "passphrase", "secret", "apikey")
_SECRET_KEYS = {
    "access", "account", "api", "auth", "deploy", "encryption", "license", "master", "private",
    "secret", "service", "signing", "ssh", "subscription",
}
_QUALIFIED = {
    "key": _SECRET_KEYS,
    "keys": _SECRET_KEYS,
    "tokens": {*_SECRET_KEYS, "bearer", "refresh", "session"},
    "pass": {"admin", "db", "ftp", "root", "smtp", "user"},
    "string": {"connection"},
}
_TEXT_TOKENS = {
    "action", "added", "audio", "begin", "beginning", "blank", "bos", "class", "cls",
    "context", "control", "dist", "distillation", "drop", "empty", "end", "eos", "eot",
    "first", "image", "input", "last", "latent", "loss", "mask", "max", "min", "n", "new",
    "newline", "next", "null", "num", "number", "object", "output", "pad", "padding", "per",
    "placeholder", "prefix", "prompt", "query", "register", "sep", "separator", "size", "sos",
    "source", "space", "special", "start", "stop", "subword", "target", "text", "time", "top",
    "unk", "unknown", "video", "vision", "visual", "word",
}
_ENDINGS_OF_NAMES = {"value", "old", "new", "prod", "dev", "staging"}
# fmt: on


def public_uri(text: str) -> str:
    """Mask the secrets in a URI, or in each URI of a text.

    - `//user:password@`: the password, up to the last `@` before a space, since it may contain `@`
      and `/`. An `@` in the path therefore masks the host too.
    - `https://token@`: a user of 20 characters or more of at least two kinds (a-z, A-Z, 0-9). In
      other schemes it is not a secret: `abfss://container@account`.
    - `?token=value`: the value up to the next `&` or space, if the name is secret by
      `is_secret_name`, a signature or `key`; in a percent-encoded connection string too.
    """
    while True:  # masking a secret can uncover where another begins
        masked = _USERINFO.sub(_public_userinfo, _public_query(text))
        if masked == text:
            return text
        text = masked


def _public_userinfo(match: re.Match[str]) -> str:
    user = match["user"]
    kinds = sum(bool(re.search(kind, user)) for kind in ("[a-z]", "[A-Z]", "[0-9]"))
    http = match.string.endswith(("http:", "https:"), 0, match.start())
    if http and len(user) >= 20 and kinds >= 2:
        user = MASK
    return f"//{user}@" if match["password"] is None else f"//{user}:{MASK}@"


def _public_query(text: str) -> str:
    done, at = [], 0
    while match := _QUERY_NAME.search(text, at):
        done.append(text[at : match.end()])
        at = match.end()
        if is_secret_name(match[1]) or _QUERY_SECRET.fullmatch(match[1]):
            value = _QUERY_VALUE.match(text, at)
            done.append(MASK)
            at = value.end() if value else len(text)
    return "".join(done) + text[at:]


def is_secret_name(name: str) -> bool:
    """Return whether `name` looks like that of a password, token, key or credential.

    The name is split into words at `_ - . /` and by camelCase; numbers and words such as `value`
    or `prod` at its end are dropped. Its last word decides:

    - `password`, `secret`, `credentials`, `auth` and the like are secret, also as the end of a
      word: `sslpassword`. `password_file` is not: its last word is `file`.
    - `token` is secret, unless the word before belongs to language models: `pad_token`.
    - `key`, `keys` and `tokens` are secret only after a word such as `api`, `access` or `private`:
      `sort_key`, `primary_key` and `max_tokens` are not.
    """
    words = _words(name)
    while len(words) > 1 and (words[-1].isdigit() or words[-1] in _ENDINGS_OF_NAMES):
        words.pop()
    before, last = ["", "", *words][-2:]
    if last == "token":
        return before not in _TEXT_TOKENS
    return (
        last in _SECRET_WORDS
        or last.endswith(_SECRET_ENDINGS)
        or before in _QUALIFIED.get(last, ())
    )


def _words(name: str) -> list[str]:
    """Return the words of `name` in lower case; `accesskey` and the like count as two."""
    words: list[str] = []
    for word in map(str.lower, _WORD.findall(name)):
        stem = re.fullmatch(r"(\w+?)(keys?|tokens?)", word)
        words += stem.groups() if stem and stem[1] in _SECRET_KEYS else (word,)
    return words


def public_command(arguments: Sequence[str]) -> str:
    """Join a command line for a shell, with its secrets masked.

    For a name that is secret by `is_secret_name`, these are masked: the argument after `--name`,
    unless that starts with two dashes itself; and what follows `name=`, `--name=`, `"name":`,
    `name: ` or, inside an argument with spaces, `--name `, to the end of the argument. The rest is
    masked by `public_uri`. A secret alone or after a short option is not recognised: `-p hunter2`.
    """
    shown = []
    is_value = False
    for argument in arguments:
        if is_value and not re.match(r"--[A-Za-z]", argument):
            shown.append(MASK)
            is_value = False
        else:
            shown.append(_public_argument(argument))
            is_value = _is_option(argument) and is_secret_name(argument)
    return shlex.join(shown)


def _is_option(text: str) -> bool:
    return re.fullmatch(r"--?[A-Za-z][\w.\-/]*", text) is not None


def _public_argument(argument: str) -> str:
    text = public_uri(argument)
    for match in _ASSIGNED.finditer(text):
        name = match["name"]
        # Without a sign, only an option has a value.
        if is_secret_name(name) and (match["sign"].strip() or _is_option(name)):
            return text[: match.end()] + MASK
    return text


def public_values(pairs: Mapping[str, str]) -> dict[str, str]:
    """Mask the values whose names are secret, and the secrets in URIs of the others."""
    return {
        name: MASK if is_secret_name(name) else public_uri(value) for name, value in pairs.items()
    }

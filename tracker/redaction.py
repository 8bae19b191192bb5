"""Masks passwords, tokens and keys in what is logged with `***`.

Values are recognised by their shape: passwords in URIs, bearer tokens, the keys of known vendors.
In tags and commands the whole name decides too. All functions are idempotent.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

MASK = "***"

_USERINFO = re.compile(
    r"//(?P<user>[^/?#:@\s\[\]\"']*)"
    r"(?P<password>:(?!\d{1,5}[/?#\"'])"  # that would be //host:port/
    r"(?:(?!://)\S)*)?"  # up to the last @ before the next URI: a password may contain @ and /
    r"@(?!sha\d+:)"  # that would be the digest of an image
)
_URI = re.compile(r"//\S*")
_QUERY_NAME = re.compile(r"(?:[?&;]|%3[BF]|%26)([\w.\-]+)(?:=|%3D)", re.IGNORECASE)
_QUERY_SECRET = re.compile(r"key|(?:.*[\W_])?sig(?:nature)?", re.IGNORECASE)
_QUERY_VALUE = re.compile(r"[^&\s]*?(?=[\"']?[.,:;)]?(?:[&\s]|$))")

_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?<=(?i:bearer) )(?=\S*\d)[\w.~+/\-]{8,}=*"
    r"|(?<=(?i:basic) )(?=[A-Za-z+/]*\d)(?=[a-z\d+/]*[A-Z])[A-Za-z\d+/]{16,}=*"
    r"|eyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]{8,}"  # a JSON web token
    # OpenAI, Anthropic and others: not a name of words and numbers, such as sk-resnet-50
    r"|sk-(?:[A-Za-z\d]+[_\-]){0,6}(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z\d]{16,}[\w\-]*"
    r"|sk-(?:proj|svcacct|admin|ant-[a-z]+\d\d)-(?=[\w\-]*\d)(?=[\w\-]*[A-Z])[\w\-]{40,}"
    r"|(?:gh[oprsu]|hf|gsk|r8|npm|[rs]k_live|[rs]k_test)_(?=[a-z]*[A-Z\d])[A-Za-z\d]{20,}"
    r"|(?:github_pat_|dckr_pat_|wandb_v1_|glpat-|pypi-)[\w\-]{20,}"
    r"|dapi[\da-f]{32}"  # Databricks
    r"|(?:AKIA|ASIA)[A-Z\d]{16}(?![A-Za-z\d])"  # AWS
    r"|AIza[\w\-]{35}"  # Google
    r"|xox[a-z]-[\w\-]{10,}"  # Slack
    r"|SG\.[\w\-]{16,}\.[\w\-]{16,}"  # SendGrid
    r")"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)

_ASSIGNED = re.compile(
    r"(?<![?&;\w.\-/\[\]])(?P<name>[\w.\-/\[\]]+)"
    r"(?P<sign>[\"']?\]?\s*=|[\"']\s*:|\s*:(?=\s)|\s+)"
)

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_PASSWORDS = ("password", "passwd", "passphrase")
# fmt: off
_QUALIFIERS = (
    "access", "account", "api", "auth", "bearer", "deploy", "encryption", "license", "master",
    "oauth", "private", "refresh", "secret", "secretaccess", "security", "service", "session",
    "signing", "ssh", "subscription",
)
_SECRETS = {
    "passwords", "pwd", "secret", "secrets", "token", "auth", "authorization", "oauth", "jwt",
    "bearer", "credential", "credentials", "clientsecret", "connectionstring", "httpauth",
    "adminpass", "dbpass", "ftppass", "rootpass", "smtppass", "userpass",
    *(f"{one}{what}" for one in _QUALIFIERS for what in ("key", "keys", "token", "tokens")),
}
"""Names that are secret, without the signs between their words."""
_OWNERS = {
    "admin", "amz", "anthropic", "aws", "azure", "clearml", "comet", "dagshub", "database",
    "databricks", "db", "docker", "ftp", "gcp", "gcs", "gh", "github", "gitlab", "google",
    "hf", "hub", "hugging", "huggingface", "face", "http", "https", "kaggle", "ldap", "minio",
    "mlflow", "mongo", "my", "mysql", "neptune", "npm", "openai", "oracle", "pg", "postgres",
    "postgresql", "pypi", "redis", "registry", "root", "slack", "smtp", "ssh",
    "ssl", "storage", "tracking", "twine", "user", "wandb", "x",
}
"""Words that may stand before such a name."""
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
        masked = _USERINFO.sub(_public_userinfo, _URI.sub(_public_query, text))
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


def _public_query(match: re.Match[str]) -> str:
    text, done, at = match[0], [], 0
    while name := _QUERY_NAME.search(text, at):
        done.append(text[at : name.end()])
        at = name.end()
        if is_secret_name(name[1]) or _QUERY_SECRET.fullmatch(name[1]):
            value = _QUERY_VALUE.match(text, at)
            done.append(MASK)
            at = value.end() if value else len(text)
    return "".join(done) + text[at:]


def public_text(text: str) -> str:
    """Mask the secrets in the URIs of a text, and its tokens and keys of known shapes."""
    while (masked := _SHAPES.sub(MASK, public_uri(text))) != text:
        text = masked
    return text


def is_secret_name(name: str) -> bool:
    """Return whether `name`, or its part after the last `.` or `/`, is the name of a secret.

    It is split into words at `_ - . /` and by camelCase; numbers and words such as `value` or
    `prod` at its end are dropped. What is left must be a whole name, such as `password`, `api_key`
    or `token`, which only the names of services and owners may precede: `hf_token` and
    `WANDB_API_KEY` are secret, `use_token`, `pad_token`, `max_tokens` and `sort_key` are not.
    """
    return any(map(_is_secret, {name, re.split(r"[./\[\]]+", name.rstrip("./[]"))[-1]}))


def _is_secret(name: str) -> bool:
    words = [word.lower() for word in _WORD.findall(name)]
    while len(words) > 1 and (words[-1].isdigit() or words[-1] in _ENDINGS_OF_NAMES):
        words.pop()
    if words and words[-1].endswith(_PASSWORDS):
        return _OWNERS.issuperset(words[:-1])
    owners = 0  # at the beginning of the name
    while owners < len(words) and words[owners] in _OWNERS:
        owners += 1
    return any("".join(words[at:]) in _SECRETS for at in range(owners + 1))


def public_command(arguments: Sequence[str]) -> str:
    """Join a command line for a shell, with its secrets masked.

    For a name that is secret by `is_secret_name`, these are masked: the argument after `--name`,
    unless that starts with two dashes itself; and what follows `name=`, `--name=`, `"name":`,
    `name: ` or, inside an argument with spaces, `--name `, to the end of the argument. The rest is
    masked by `public_text`. A secret of no known shape is not recognised alone or after a short
    option: `-p hunter2`.
    """
    shown = []
    is_value = False
    for argument in arguments:
        if is_value and not re.match(r"--[A-Za-z]", argument):
            shown.append(MASK)
            is_value = False
        else:
            shown.append(public_argument(argument))
            is_value = _is_option(argument) and is_secret_name(argument)
    return shlex.join(shown)


def _is_option(text: str) -> bool:
    return re.fullmatch(r"--?[A-Za-z][\w.\-/]*", text) is not None


def public_argument(argument: str) -> str:
    """Mask the secrets of an argument, or of another text with `name=value`."""
    text = public_text(argument)
    for match in _ASSIGNED.finditer(text):
        name = match["name"]
        attached = name[2:] if re.match("-[A-Za-z]", name) else ""  # -Ppassword=x
        # Without a sign, only an option has a value.
        if (is_secret_name(name) or is_secret_name(attached)) and (
            match["sign"].strip() or _is_option(name)
        ):
            return text[: match.end()] + MASK
    return text


def public_values(pairs: Mapping[str, str], *, by_name: bool = True) -> dict[str, str]:
    """Mask the secrets in values.

    Args:
        pairs: Texts by name.
        by_name: Mask the whole values of secret names too.
    """
    return {
        name: MASK if by_name and is_secret_name(name) else public_text(value)
        for name, value in pairs.items()
    }

"""Redaction: secrets are masked, and everything else is left alone."""

from __future__ import annotations

import re
import shlex

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tests.helpers import Store
from tracker import ArgumentError, start_run
from tracker.redaction import is_secret_name, public_command, public_uri, public_values

TOKEN = "ghp_16C7e42F292c6912E7710c838347Ae178B4a"

SECRET = """
    password passwd pwd passphrase secret secrets token api_key apikey access_key private_key
    credentials credential auth authorization HF_TOKEN AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN
    --api-key wandbApiKey WANDB_API_KEY apiKey APIKey api.key OPENAI_API_KEY clientSecret
    client_secret secret_key SECRET_KEY ssh_key sshKey encryption_key signing_key auth_key
    accesskey authToken authtoken access_token refresh_token MLFLOW_TRACKING_TOKEN
    MLFLOW_TRACKING_PASSWORD github_token my_token user_token password2 password_2 token1
    api_key_value API_KEY_PROD sslpassword PGPASSWORD userPassword db/password logger.wandb.api_key
    http_auth api_keys access_tokens db_pass jwt AZURE_STORAGE_CONNECTION_STRING
    X-Amz-Security-Token X-Amz-Credential Authorization HTTPAuthToken OAuthToken
"""

ORDINARY = """
    keypoints max_tokens num_tokens token_dropout tokenizer key_dim num_keys author monkey keyboard
    attention_key passes token_type pad_token eos_token unk_token bos_token mask_token cls_token
    sep_token special_token class_token image_token loss_per_token sort_key query_key primary_key
    key keys tokens passwordless secretary secret_name password_file token_path api_key_file
    token_ids eos_token_id padToken eosTokenId maxTokens maxNewTokens keyDim numKeys n_tokens
    batch_tokens tokens_per_second authors author_name authenticate oauthor lr learning_rate
    weight_decay batch_size optimizer compass forward_pass n_pass bypass tokenization detokenize
    AWS_ACCESS_KEY_ID key_value_heads turkey hockey whiskey kv_key foreign_key string 3 _ --
    use_token memory_token num_auth use_auth_token use_auth num_password use_password n_secrets
    state_token global_token temporal_token has_secret max_api_keys my_model_token USE_TOKEN
    model.use_token encoder/memory_token user_tokens userTokens bearing tokened
"""


SECRET_NAMES, ORDINARY_NAMES = SECRET.split(), ORDINARY.split()


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_the_name_of_a_secret_is_recognised(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", [*ORDINARY_NAMES, ""])
def test_an_ordinary_name_is_not_a_secret(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("postgresql://me:secret@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("https://token:secret@host/x", "https://token:***@host/x"),
        ("train.py --tracking-uri http://a:b@c", "train.py --tracking-uri http://a:***@c"),
        ("redis://:secret@host", "redis://:***@host"),
        ("http://me:@host", "http://me:***@host"),
        ("//me:secret@host", "//me:***@host"),
        # passwords that should be percent-encoded
        ("postgresql://me:p@ss@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:p/ss@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:p/s@s/@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:p%40s%2Fs@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:p:s?s#s&s=s@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:12345@host/db", "postgresql://me:***@host/db"),
        ("a://b:c@d,e://f:g@h i://j:k@l", "a://b:***@d,e://f:***@h i://j:***@l"),
        # masking the host is better than showing a password that contains @
        ("git+https://me:secret@host/x.git@main", "git+https://me:***@main"),
        # tokens in place of a user
        (f"https://{TOKEN}@github.com/a/b", "https://***@github.com/a/b"),
        (f"git+https://{TOKEN}@github.com/a/b", "git+https://***@github.com/a/b"),
        (f"https://{TOKEN}:x-oauth-basic@github.com", "https://***:***@github.com"),
        (f"https://x-access-token:{TOKEN}@github.com", "https://x-access-token:***@github.com"),
        ("http://hf_AbCdEfGhIjKlMnOpQrStUvWxYz@host", "http://***@host"),
        # queries
        ("postgresql://h/db?user=a&password=b@c/d", "postgresql://h/db?user=a&password=***"),
        ("postgresql://h/db?sslpassword=b&sslmode=on", "postgresql://h/db?sslpassword=***&sslmode=on"),
        ("https://h/x?token=a#b", "https://h/x?token=***"),
        ("https://h/x?X-Amz-Date=1&X-Amz-Signature=a", "https://h/x?X-Amz-Date=1&X-Amz-Signature=***"),
        ("https://h/x?sv=1&sig=a%2Bb%3D&se=2", "https://h/x?sv=1&sig=***&se=2"),
        ("https://h/x?key=AIza&q=1", "https://h/x?key=***&q=1"),
        ("'https://h/x?token=a': refused", "'https://h/x?token=***': refused"),
        ("see https://h/x?token=a, then", "see https://h/x?token=***, then"),
        (
            "mssql+pyodbc:///?odbc_connect=SERVER%3Dh%3BUID%3Dme%3BPWD%3Dsecret",
            "mssql+pyodbc:///?odbc_connect=SERVER%3Dh%3BUID%3Dme%3BPWD%3D***",
        ),
    ],
)  # fmt: skip
def test_a_secret_in_a_uri_is_masked(text: str, public: str) -> None:
    assert public_uri(text) == public
    assert public_uri(public) == public


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////a/b.db",
        "docker://python:3.11@sha256:2c5d8ef3b1",
        "registry:5000/team/image:tag@sha256:0123456789abcdef0123456789abcdef",
        "docker://registry.io:5000/image@sha256:0123456789abcdef0123456789abcdef",
        "lr=0.1;key=5&token=cls?sig=1",
        "sk-learn-gradient-boosting",
        "--model=sk-resnet-50-imagenet-v1-pretrained",
        "sk-hynix-gddr6-benchmark-2024-results",
        "sk-proj-2024-a-comparison-of-learning-rates-and-batch-sizes",
        "sk-1234567890123456 sk-reinforcementlearning",
        "bearer of tokens",
        "basic transformerencoderlayer",
        "hf_internal_testing_tiny_random",
        "facebook/opt-1.3b@main",
        "0123456789abcdef0123456789abcdef01234567",
        "http://localhost:5000",
        "http://localhost:5000/#/experiments/1?searchFilter=a@b",
        "http://localhost:5000/users/@me",
        "http://[::1]:5000/@me",
        "http://host/x:y@z",
        "http://host?at=10:30@x",
        '{"uri":"http://host:5000","mail":"a@b"}',
        "http://host/x?max_tokens=5&sort_key=a&page_token_type=b",
        "ssh://git@github.com/a/b.git",
        "git@github.com:a/b.git",
        "https://git@dev.azure.com/a",
        "https://firstname-and-lastname@bitbucket.org/a",
        "abfss://mlflow-artifacts-2024-production@account.dfs.core.windows.net/x",
        "wasbs://123e4567-e89b-12d3-a456-426614174000@host/x",
        "mail me@host, 10:30 // see me@host: a",
        "C:\\Users\\me\\runs",
        "token",
        "",
    ],
)
def test_a_text_without_secrets_is_left_alone(text: str) -> None:
    assert public_uri(text) == text
    assert public_values({"x": text}) == {"x": text}
    assert public_command([text]) == shlex.join([text])


@pytest.mark.parametrize(
    ("arguments", "public"),
    [
        (["--api-key", "x y"], ["--api-key", "***"]),
        (["--api-key", "-x", "a"], ["--api-key", "***", "a"]),
        (["--api-key=x y", "a"], ["--api-key=***", "a"]),
        (["-token", "x", "a"], ["-token", "***", "a"]),
        (["--auth", "--lr", "0.1"], ["--auth", "--lr", "0.1"]),
        (["--auth", "--token", "x"], ["--auth", "--token", "***"]),
        (["--token"], ["--token"]),
        (["-P", "password=x", "-P", "lr=1"], ["-P", "password=***", "-P", "lr=1"]),
        (["-Ppassword=x", "-eTOKEN=y"], ["-Ppassword=***", "-eTOKEN=***"]),
        (["--env=PASSWORD=x=y"], ["--env=PASSWORD=***"]),
        (["PASSWORD=x", "token=x", "TOKEN="], ["PASSWORD=***", "token=***", "TOKEN=***"]),
        (["+logger.api_key=x", "++a.b.token=x"], ["+logger.api_key=***", "++a.b.token=***"]),
        (["--uri", "http://a:b@c"], ["--uri", "http://a:***@c"]),
        (["--uri=http://h?token=a&x=1"], ["--uri=http://h?token=***&x=1"]),
        (["--uri=postgresql://u:token=abc@h/d"], ["--uri=postgresql://u:***@h/d"]),
        (["-c", "TOKEN=x python train.py"], ["-c", "TOKEN=***"]),
        (["-c", "train.py --lr 1 --token x"], ["-c", "train.py --lr 1 --token ***"]),
        (["-c", "login(token='x')"], ["-c", "login(token=***"]),
        (["-c", "e['HF_TOKEN'] = 'x'"], ["-c", "e['HF_TOKEN'] =***"]),
        (["--json", '{"lr": 1, "password":"x"}'], ["--json", '{"lr": 1, "password":***']),
        (["-H", "Authorization: Bearer x"], ["-H", "Authorization:***"]),
    ],
)
def test_a_secret_in_a_command_is_masked(arguments: list[str], public: list[str]) -> None:
    assert shlex.split(public_command(arguments)) == public
    assert shlex.split(public_command(public)) == public


@pytest.mark.parametrize(
    "arguments",
    [
        ["python", "train.py", "--lr", "0.1", "--max-tokens", "5", "--pad-token=<pad>"],
        ["python", "-m", "studies.train", "-P", "max_tokens=5", "tokenizer=bert", "sort_key=a=b"],
        ["python", "-c", "print('a token and a key: 5')", "", "a b"],
        ["train.py", "data/key=5/part", "--note", "token by token"],
    ],
)
def test_an_ordinary_command_is_left_alone(arguments: list[str]) -> None:
    assert public_command(arguments) == shlex.join(arguments)


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("Bearer abc.DEF-1234567=", "Bearer ***"),
        ("with bearer 0123456789", "with bearer ***"),
        ("Basic bWU6aHVudGVyMg11==", "Basic ***"),
        ("sk-abcdefghij1234567890", "***"),
        ("key sk-proj-Ab_c1234567890123456, then", "key ***, then"),
        ("sk-ant-api03-Zq7Xv-0123456789abcdef", "***"),
        (f"sk-ant-api03-{'Zq7Xv_8dKw-' * 8}AA", "***"),
        (f"--key sk-proj-{'a1B2-' * 9}", "--key ***"),
        (f"sk-or-v1-{'0a1b2c3d' * 8}", "***"),
        ("sk_live_0123456789abcdefABCDEF", "***"),
        (TOKEN, "***"),
        (f"[{TOKEN!r}]", "['***']"),
        ("github_pat_11ABCDEFG0123456789_abcdef", "***"),
        ("glpat-0123456789_abcdefghij", "***"),
        ("hf_abcdefghiJklmnopqrstuvwxyz", "***"),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        ("AIzaSyA0123456789abcdefghijklmnopqrstuv", "***"),
        ("xoxb-012345678901-abcdef", "***"),
        ("eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.SflKxwRJSMeKKF2QT4", "***"),
        ("dapi0123456789abcdef0123456789abcdef", "***"),
        ("a\n-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY-----\nb", "a\n***\nb"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE", "***"),
        ("docker://me:pw1@host/image@sha256:0123", "docker://me:***@host/image@sha256:0123"),
    ],
)
def test_a_value_of_a_known_shape_is_masked_whatever_its_name(text: str, public: str) -> None:
    for by_name in (True, False):
        assert public_values({"x": text}, by_name=by_name) == {"x": public}
        assert public_values({"x": public}, by_name=by_name) == {"x": public}
    assert public_command([text]) == shlex.join([public])


def test_values_are_masked_by_name_and_in_uris() -> None:
    assert public_values({"password": "x", "uri": "http://a:b@c", "lr": "0.1", "HF_TOKEN": ""}) == {
        "password": "***",
        "uri": "http://a:***@c",
        "lr": "0.1",
        "HF_TOKEN": "***",
    }


HEAD, TAIL = "Zq7Xv", "Wk4Yj"
secrets = st.text(max_size=15).map(lambda middle: HEAD + middle + TAIL)
"""Any text; neither its beginning nor its end may be shown."""

uri_secrets = secrets.filter(lambda one: not re.search(r"\s|://", one))
query_secrets = secrets.filter(lambda one: not re.search(r"\s|&", one))
names = st.sampled_from([one for one in SECRET_NAMES if not one.startswith("-")])
# `key` alone is secret in a query.
plain = [one for one in ORDINARY_NAMES if re.fullmatch("[a-z]+_?[a-z]+", one) and one != "key"]
ordinary_names = st.sampled_from(plain)
words = st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True)
texts = st.text(alphabet="ab/:@?&;=#%3D.,'\" \n-_{}[]*", max_size=40) | st.text(max_size=20)
PIECES = """
    // :// @ : ? & = token= --token TOKEN ' " ;pwd= %3Bpwd%3D *** a b/c http x@y 5000/ - --
"""
pieces = st.sampled_from([*PIECES.split(), " ", TOKEN])
puzzles = st.lists(pieces, max_size=12).map("".join)
"""Texts made of the pieces that the rules look for, in any order."""


def shows(text: str) -> bool:
    return HEAD in text or TAIL in text


@given(secret=uri_secrets, user=words, host=words, before=texts)
@example(secret=f"{HEAD}@a/b?c=d@{TAIL}", user="", host="h", before="")
def test_no_password_of_a_uri_survives(secret: str, user: str, host: str, before: str) -> None:
    public = public_uri(f"{before} db://{user}:{secret}@{host}/db")
    assert not shows(public)
    assert public.endswith(f"@{host}/db")


@given(secret=query_secrets, name=names, path=words, before=texts, after=words)
def test_no_secret_of_a_query_survives(
    secret: str, name: str, path: str, before: str, after: str
) -> None:
    assume("/" not in name)
    uri = f"http://host/{path}?a=1&{name}={secret}&b={after}"
    assert not shows(public_uri(f"{before} {uri}"))
    assert not shows(public_command([before, f"--uri={uri}"]))


@given(
    secret=secrets,
    name=names,
    arguments=st.lists(texts, max_size=4),
    position=st.integers(0, 4),
    form=st.sampled_from(
        ["{}=@", "--{}=@", "-P {}=@", "--env={}=@", "-c 'x' {}=@", '{{"{}": "@"}}', "a --{} @"]
    ),
)
def test_no_secret_in_an_argument_survives(
    secret: str, name: str, arguments: list[str], position: int, form: str
) -> None:
    arguments.insert(position, form.format(name).replace("@", secret))
    assert not shows(public_command(arguments))


@given(
    secret=secrets,
    name=names,
    before=st.lists(words, max_size=4),
    after=st.lists(texts, max_size=4),
)
def test_no_secret_after_an_option_survives(
    secret: str, name: str, before: list[str], after: list[str]
) -> None:
    assert not shows(public_command([*before, f"--{name}", secret, *after]))


@given(secret=secrets, name=names, others=st.dictionaries(words, texts, max_size=3))
def test_no_value_of_a_secret_name_survives(secret: str, name: str, others: dict[str, str]) -> None:
    public = public_values({**others, name: secret})
    assert not shows(str(public))
    assert public.keys() == {*others, name}


@given(name=ordinary_names, value=words | st.floats().map(str), flag=words)
def test_ordinary_values_pass_unchanged(name: str, value: str, flag: str) -> None:
    assume(not is_secret_name(flag))
    arguments = [flag, f"--{name}", value, f"--{name}={value}", f"{name}={value}", f"-{flag[0]}"]
    assert public_command(arguments) == shlex.join(arguments)
    assert public_values({name: value}) == {name: value}
    assert public_uri(f"http://{flag}:5000/{value}?{name}={value}#x@y") == (
        f"http://{flag}:5000/{value}?{name}={value}#x@y"
    )


# `user_token` and the like name a secret.
QUALIFIERS = "use num n max min memory state pad cls register global label with has is the"
PARTS = "token tokens auth key keys secret secrets password credential"
SETTINGS = """
    True False None 0 -1 0.5 1e-3 cls <pad> [CLS] ['a','b'] (8,) {'key':1} relu resnet18 v1.2.3
    facebook/opt-1.3b org/model@main data:v1 s3://bucket/train.parquet /data/train@2/x:y
    http://host:8080/a?page=2 a=b;c=d&key=e image:tag@sha256:9f86d081884c7d65 3f2504e0-4f89-41d3
"""
qualifiers, parts = st.sampled_from(QUALIFIERS.split()), st.sampled_from(PARTS.split())
settings = st.sampled_from(SETTINGS.split())


@given(
    st.dictionaries(
        st.builds("{}_{}{}".format, qualifiers, parts, st.sampled_from(["", "_dim", "s_per_x"]))
        | ordinary_names,
        st.lists(settings, min_size=1, max_size=3).map(" ".join) | st.floats().map(str),
        max_size=4,
    )
)
def test_hyperparameters_are_left_alone(pairs: dict[str, str]) -> None:
    assert public_values(pairs) == pairs
    arguments = [text for name, value in pairs.items() for text in (f"--{name}", value)]
    assert public_command(arguments) == shlex.join(arguments)


def test_params_named_like_secrets_are_kept_and_tags_are_masked(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    params = {
        "use_token": "True",
        "memory_token": "cls",
        "num_auth": "3",
        "password": "4",
        "k": TOKEN,
    }
    tags = params | {"image": "a:b@sha256:0123"}
    with start_run(params=params, tags=tags, name=f"password=4 k={TOKEN}"):
        pass
    run = store.run()
    assert run.info.run_name == "password=4 k=***"
    assert run.data.params == params | {"k": "***"}
    tags = {name: run.data.tags[name] for name in (*params, "image")}
    assert tags == params | {"password": "***", "k": "***", "image": "a:b@sha256:0123"}
    assert (
        "Param 'password' is stored, though it is named like a secret; TRACKER_REDACT=1"
        in caplog.text
    )
    assert "The secret in param 'k' is stored as ***; TRACKER_REDACT=0 keeps" in caplog.text
    assert "num_auth" not in caplog.text


@pytest.mark.parametrize(
    ("redact", "stored", "name"),
    [("1", ["***", "***"], "k=*** password=***"), ("0", ["4", TOKEN], f"k={TOKEN} password=4")],
)
def test_tracker_redact_decides_for_params_and_tags(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    redact: str,
    stored: list[str],
    name: str,
) -> None:
    monkeypatch.setenv("TRACKER_REDACT", redact)
    monkeypatch.setattr("sys.orig_argv", ["python", "--password", TOKEN])
    pairs = {"k": TOKEN, "password": 4}
    with start_run(params=pairs, tags=pairs, name=f"k={TOKEN} password=4"):
        pass
    assert store.run().info.run_name == name
    data = store.run().data
    assert [data.params[name] for name in ("password", "k")] == stored
    assert [data.tags[name] for name in ("password", "k")] == stored
    assert (TOKEN in data.tags["tracker.command"]) == (redact == "0")
    assert ("is stored as ***" in caplog.text) == (redact == "1")
    monkeypatch.setenv("TRACKER_REDACT", "perhaps")
    with pytest.raises(ArgumentError, match="TRACKER_REDACT='perhaps' is not allowed"):
        start_run()


@given(texts | puzzles)
def test_public_uri_is_idempotent(text: str) -> None:
    once = public_uri(text)
    assert public_uri(once) == once


@given(st.lists(texts | puzzles | names.map(lambda name: f"--{name}"), max_size=5))
def test_public_command_is_idempotent(arguments: list[str]) -> None:
    once = public_command(arguments)
    assert public_command(shlex.split(once)) == once


@given(st.dictionaries(names | words, texts | puzzles, max_size=3))
def test_public_values_is_idempotent(pairs: dict[str, str]) -> None:
    once = public_values(pairs)
    assert public_values(once) == once

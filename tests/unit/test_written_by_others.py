"""Files, tags and addresses that others write: refused, shown as what they are, or checked again."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.table import Table
from safetensors.torch import save_file
from spectraqlora.data.sources import open_source
from spectraqlora.errors import InputError, holds_secret, masked, printable
from spectraqlora.models.loading import load_tokenizer
from spectraqlora.models.tensors import LocalTensors
from spectraqlora.places import base_digest, data_place
from spectraqlora.runtime import console
from spectraqlora.settings import DataSettings, parse
from spectraqlora.steps.promote.rescore import guard_perplexity
from spectraqlora.storage import Address, download_folder, local_copy, parse_address, upload_folder
from spectraqlora.tracking.registered_model import load_model
from spectraqlora_pipelines.cli import app, screen
from typer.testing import CliRunner

from tests.registered import register, registry
from tests.s3 import BUCKET, Server, environment

Q = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"
Tensors = dict[str, torch.Tensor]


# --- 4-bit weights whose parts do not fit --------------------------------------------------------------------


def packed(nested: bool) -> Tensors:
    """A matrix of 64 x 128 as bitsandbytes stores it, with nested scales or without."""
    from bitsandbytes.functional import quantize_4bit

    torch.manual_seed(0)
    codes, state = quantize_4bit(
        torch.randn(64, 128), blocksize=64, compress_statistics=nested, quant_type="nf4"
    )
    return {Q: codes} | {f"{Q}.{name}": part for name, part in state.as_dict(packed=True).items()}


def shortened(part: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({part: tensors[part][:-1].clone()})


def retyped(part: str, dtype: torch.dtype) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({part: tensors[part].to(dtype)})


def stated(**changes: Any) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        document = json.loads(bytes(tensors[STATE].tolist())) | changes
        text = json.dumps({key: value for key, value in document.items() if value is not None})
        tensors[STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("nested", "change", "named"),
    [
        (False, shortened(f"{Q}.absmax"), "absmax"),
        (False, retyped(f"{Q}.absmax", torch.int8), "absmax"),
        (False, shortened(f"{Q}.quant_map"), "quant_map"),
        (False, shortened(Q), "q_proj.weight"),
        (False, stated(blocksize=32), "absmax"),
        (False, stated(shape=[128, 128]), "q_proj.weight"),
        (True, shortened(f"{Q}.nested_absmax"), "nested_absmax"),
        (True, retyped(f"{Q}.nested_absmax", torch.float16), "nested_absmax"),
        (True, retyped(f"{Q}.nested_quant_map", torch.bfloat16), "nested_quant_map"),
        (True, retyped(f"{Q}.absmax", torch.float32), "absmax"),
        (True, stated(nested_offset="x"), "quant_state"),
        (True, stated(nested_offset=float("nan")), "quant_state"),
        (True, stated(nested_blocksize=1 << 40), "quant_state"),
        (True, stated(nested_dtype="float7"), "quant_state"),
        (True, stated(quant_type="fp4"), "quant_state"),
        (True, stated(shape=[]), "quant_state"),
    ],
)
def test_native_code_never_gets_parts_that_are_shorter_than_it_reads(
    nested: bool, change: Callable[[Tensors], None], named: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    whole = packed(nested)
    save_file(whole, tmp_path / "model.safetensors")
    assert LocalTensors(tmp_path).load(Q).shape == (64, 128)
    change(whole)
    save_file({name: part.contiguous() for name, part in whole.items()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=named):
        LocalTensors(tmp_path).load(Q)


# --- a model of the registry, whose MLmodel names its parts --------------------------------------------------


@pytest.mark.parametrize(
    "flavors",
    [
        {"transformers": {"model_binary": "../model"}},
        {"transformers": {"model_binary": "/etc"}},
        {"transformers": {"model_binary": "link"}},
        {"transformers": {"model_binary": "model/../../model"}},
        {"transformers": {"model_binary": "none"}},
        {"transformers": {"model_binary": ["model"]}},
        {"transformers": {}},
        {"transformers": {"peft_adaptor": "../model", "source_model_name": "BASE"}},
        {"transformers": {"peft_adaptor": "model", "source_model_name": ["a"]}},
        {"transformers": {"peft_adaptor": "model"}},
        {"transformers": "model"},
        {"python_function": {}},
        None,
        ["transformers"],
    ],
)
def test_a_registered_model_is_made_of_files_below_its_own_folder(
    flavors: Any, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "registered"
    shutil.copytree(tiny_model, folder / "model")
    shutil.copytree(tiny_model, folder / "components" / "tokenizer")
    (tmp_path / "model").symlink_to(tiny_model)
    (folder / "link").symlink_to(tiny_model)
    text = yaml.safe_dump({"flavors": flavors}).replace("BASE", str(tiny_model))
    (folder / "MLmodel").write_text(text)
    with pytest.raises(InputError, match="registered"):
        load_model(folder)
    (folder / "MLmodel").write_text(yaml.safe_dump({"flavors": {"transformers": {"model_binary": "model"}}}))
    assert load_model(folder)[0].config.hidden_size == 64


# --- links beside a base model -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "tokenizer_config.json",
        "vocab.txt",
        "bpe.codes",
        "tokenizer.4.0.0.json",
    ],
)
def test_a_link_out_of_a_models_folder_does_not_reach_the_export(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    outside = tmp_path / "outside"
    outside.write_text((folder / name).read_text() if (folder / name).exists() else "a line of its own")
    link = folder / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(outside)
    with pytest.raises(InputError, match="no link out of its folder") as refused:
        load_tokenizer(folder)
    assert name in str(refused.value)
    # Within the folder, and in the hub's cache, files may be links.
    link.unlink()
    shutil.copyfile(outside, folder / "kept")
    link.symlink_to(folder / "kept")
    load_tokenizer(folder)
    snapshot = tmp_path / "hub" / "snapshots" / "commit"
    shutil.copytree(tiny_model, snapshot)
    blobs = tmp_path / "hub" / "blobs"
    blobs.mkdir()
    shutil.move(snapshot / "tokenizer.json", blobs / "abc")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    load_tokenizer(snapshot)


# --- a tokenizer's settings that name files of the machine ---------------------------------------------------


@pytest.fixture
def outside(tiny_model: Path, tmp_path: Path) -> Path:
    """A folder beside the model's with a vocabulary and a tokenizer whose tokens are this machine's own."""
    here = tmp_path / "outside"
    here.mkdir()
    words = ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]", "<unk>", "<s>", "</s>", "<|endoftext|>", "SECRET"]
    (here / "vocab.txt").write_text("\n".join(words))
    (here / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (here / "merges.txt").write_text("#version: 0.2\n")
    whole = json.loads((tiny_model / "tokenizer.json").read_text())
    whole["added_tokens"].append({**whole["added_tokens"][0], "id": 9999, "content": "SECRET"})
    for name in ("tokenizer.json", "tokenizer.4.0.0.json"):
        (here / name).write_text(json.dumps(whole))
    return here


def _with_settings(tiny_model: Path, folder: Path, name: str, settings: dict[str, Any], own: bool) -> Path:
    shutil.copytree(tiny_model, folder)
    if not own:
        (folder / "tokenizer.json").unlink()
    given = {"eos_token": "</s>", **settings} if name == "tokenizer_config.json" else settings
    (folder / name).write_text(json.dumps(given))
    return folder


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    "kind", ["BertTokenizer", "GPT2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast"]
)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab", "OUT/vocab.txt"),
        ("vocab", "OUT/vocab.json"),
        ("merges", "OUT/merges.txt"),
        ("init_inputs", ["OUT/vocab.txt"]),
        ("init_inputs", ["OUT/vocab.json", "OUT/merges.txt"]),
        ("gguf_file", "OUT/tokenizer.json"),
        ("fast_tokenizer_files", ["OUT/tokenizer.4.0.0.json"]),
        ("fast_tokenizer_files", ["../outside/tokenizer.4.0.0.json"]),
        ("fast_tokenizer_files", "OUT/tokenizer.4.0.0.json"),
    ],
)
def test_a_tokenizer_setting_that_has_files_of_the_machine_read_is_refused(
    key: str, value: Any, kind: str, own: bool, tiny_model: Path, outside: Path, tmp_path: Path
) -> None:
    value = json.loads(json.dumps(value).replace("OUT", str(outside)))
    settings = {"tokenizer_class": kind, key: value}
    folder = _with_settings(tiny_model, tmp_path / "model", "tokenizer_config.json", settings, own)
    with pytest.raises(InputError) as refused:
        load_tokenizer(folder)
    said = str(refused.value)
    assert f"{folder}/tokenizer_config.json" in said and f"{key} has others read" in said


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "merges_file", "gguf_file", "vocab"])
def test_a_map_of_special_tokens_names_no_file(
    key: str, tiny_model: Path, outside: Path, tmp_path: Path
) -> None:
    settings = {key: str(outside / "tokenizer.json")}
    folder = _with_settings(tiny_model, tmp_path / "model", "special_tokens_map.json", settings, True)
    with pytest.raises(InputError, match=rf"special_tokens_map\.json.*{key} has others read"):
        load_tokenizer(folder)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    "kind", ["BertTokenizer", "GPT2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast"]
)
def test_files_that_a_tokenizers_settings_name_do_not_reach_the_export(
    kind: str, own: bool, tiny_model: Path, outside: Path, tmp_path: Path
) -> None:
    """Older transformers wrote such names into models that are all right."""
    settings = {
        "tokenizer_class": kind,
        "vocab_file": str(outside / "vocab.txt"),
        "merges_file": str(outside / "merges.txt"),
        "tokenizer_file": str(outside / "tokenizer.json"),
        "special_tokens_map_file": str(outside / "vocab.json"),
        "chat_template": str(outside / "vocab.txt"),
    }
    folder = _with_settings(tiny_model, tmp_path / "model", "tokenizer_config.json", settings, own)
    try:
        load_tokenizer(folder).save_pretrained(tmp_path / "exported")
    except InputError:  # No tokenizer without its own files.
        assert not own
        return
    exported = [path for path in (tmp_path / "exported").rglob("*") if path.is_file()]
    assert len(exported) >= 2 and not any(b"SECRET" in path.read_bytes() for path in exported)
    if own and kind == "PreTrainedTokenizerFast":
        assert len(load_tokenizer(folder)) == len(load_tokenizer(tiny_model))


@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": ["beside.Own", None]}, ["beside.Own", None]])
def test_code_beside_a_tokenizer_runs_only_where_it_is_trusted(
    auto_map: Any, tiny_model: Path, tmp_path: Path
) -> None:
    settings = {"tokenizer_class": "Own", "auto_map": auto_map}
    folder = _with_settings(tiny_model, tmp_path / "model", "tokenizer_config.json", settings, True)
    ran = tmp_path / "ran"
    (folder / "beside.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    with pytest.raises(InputError, match="custom code"):
        load_tokenizer(folder)
    assert not ran.exists()


# --- names with glob characters ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a[1].jsonl", "*.jsonl", "?.jsonl", "[!a].jsonl", "{a,b}.jsonl", "**.jsonl"]
)
def test_a_name_with_glob_characters_is_that_file_and_no_other(name: str, tmp_path: Path) -> None:
    folder = tmp_path / f"of {name.removesuffix('.jsonl')}"
    folder.mkdir()
    (folder / name).write_text('{"text": "mine"}\n')
    (folder / "a1.jsonl").write_text('{"text": "other"}\n')
    settings = DataSettings()

    def read(source: Path) -> list[str]:
        opened = open_source(data_place(str(source)), settings)
        return sorted(record["text"] for _, record, _ in opened.records(settings, "train"))

    assert read(folder / name) == ["mine"] and read(folder) == ["mine", "other"]
    (folder / "README.md").write_text(f"---\nconfigs:\n- data_files: {json.dumps(name)}\n---\n")
    assert read(folder) == ["mine"]


def test_general_text_and_bases_with_glob_characters_are_those_files(
    tiny_model: Path, tmp_path: Path
) -> None:
    from spectraqlora.models.loading import load_plain

    base = tmp_path / "base[1]*"
    shutil.copytree(tiny_model, base)
    assert base_digest(base) == base_digest(tiny_model)
    model, tokenizer = load_plain(base, torch.float32).eval(), load_tokenizer(base)
    (tmp_path / "g1.jsonl").write_text(json.dumps({"text": "zz qq " * 40}) + "\n")
    said = {}
    for name in ("g[1].jsonl", "g.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": "anna lives in oslo . " * 40}) + "\n")
        said[name] = guard_perplexity(model, tokenizer, str(tmp_path / name), 2, 2)
    assert said["g[1].jsonl"] == said["g.jsonl"] > 1
    for text in ("not JSON\n", '{"other": "x"}\n', '{"text": ["x"]}\n', '{"text": 5}\n'):
        (tmp_path / "g.jsonl").write_text(text)
        with pytest.raises(InputError):
            guard_perplexity(model, tokenizer, str(tmp_path / "g.jsonl"), 2, 2)
    (tmp_path / "g.txt").write_bytes(b"caf\xe9 " * 30)
    with pytest.raises(InputError, match="UTF-8"):
        guard_perplexity(model, tokenizer, str(tmp_path / "g.txt"), 2, 2)


# --- copies of object storage that the disk has changed ------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def store(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    for name, value in environment(server.endpoint).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SPECTRAQLORA_CACHE", str(tmp_path / "cache"))
    return server


def rot(path: Path, at: int) -> None:
    """Other bits, same size and times: what a disk does, and no program."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize(("name", "at"), [("weights.bin", 0), ("weights.bin", -1), ("sub/config.json", 3)])
def test_a_copy_that_rotted_is_fetched_again_and_said(
    published: bool, name: str, at: int, store: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given"
    (given / "sub").mkdir(parents=True)
    (given / "weights.bin").write_bytes(os.urandom(300_000))
    (given / "sub" / "config.json").write_text('{"a": 1}')
    address = parse_address(f"s3://{BUCKET}/rot-{published}-{name.replace('/', '-')}-{at}")
    if published:
        upload_folder(given, address)
    else:
        store.put_plain(given, address.key)
    copy = local_copy(address)
    rot(copy / name, at)
    assert (copy / name).read_bytes() != (given / name).read_bytes()
    capsys.readouterr()
    assert local_copy(address) == copy
    for each in ("weights.bin", "sub/config.json"):
        assert (copy / each).read_bytes() == (given / each).read_bytes()
    said = capsys.readouterr().out
    assert said.count("damaged and fetched again") == 1 and name in said
    local_copy(address)
    assert "damaged" not in capsys.readouterr().out


def test_a_damaged_record_of_a_download_is_no_reason_to_trust_the_files(
    store: Server, tmp_path: Path
) -> None:
    given, target = tmp_path / "given", tmp_path / "target"
    given.mkdir()
    (given / "a.bin").write_bytes(b"right")
    address = Address(BUCKET, "record")
    upload_folder(given, address)
    download_folder(address, target)
    record = target / ".cache" / "downloaded.json"
    document = json.loads(record.read_text())
    for mark in (
        [],
        ["x"],
        document["a.bin"][:3],
        [*document["a.bin"][:3], None],
        [*document["a.bin"][:3], "0" * 64],
    ):
        (target / "a.bin").write_bytes(b"wrong")
        document["a.bin"] = mark
        record.write_text(json.dumps(document))
        download_folder(address, target)
        assert (target / "a.bin").read_bytes() == b"right", mark
        document = json.loads(record.read_text())


# --- text that a terminal would obey -------------------------------------------------------------------------

HOSTILE = {
    "method": "[/x]",
    "promotion.decision": "[bold red]PROMOTED[/] \x1b]0;owned\x07\x1b[31mred\x9b2J\u202edenoted",
    "eval_loss": "<script>alert(1)</script>",
    "merged_eval_loss": "1e400",
    "perplexity": "[link=http://evil]1[/link]",
    "accuracy": "nan",
    "trainable_parameters": "-1e400",
}


def obeyed(text: str) -> list[str]:
    return [letter for letter in text if letter not in "\n" and (ord(letter) < 32 or 127 <= ord(letter) < 160 or letter in "\u202e\u2066")]  # fmt: skip


def test_tags_of_a_registered_version_are_shown_as_text(tmp_path: Path) -> None:
    versions = registry(f"sqlite:///{tmp_path}/mlflow.db", "spectraqlora")
    number = register(versions, loss=1.0)
    kept = versions.version(number).tags
    for key, tag in HOSTILE.items():
        versions.tag(number, {key: tag})
        shown = CliRunner().invoke(app.app, ["models", "--uri", str(tmp_path)], catch_exceptions=False)
        assert shown.exit_code == 0 and obeyed(shown.output) == [], key
        if key in ("method", "promotion.decision"):
            assert tag.split()[0] in "".join(shown.output.split()), shown.output
        versions.tag(number, {key: kept.get(key, "1")})


def test_whatever_is_printed_is_printed_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "a [red]b[/red] [/] :cat: \x1b[2J\x07 \x9d0;x\x9c \u202eabc"
    stream = io.StringIO()
    terminal = screen.Screen(file=stream, force_terminal=True, color_system=None, width=200)
    table = Table(hostile)
    table.add_row(hostile)
    terminal.print(table)
    terminal.print(hostile, style="red")
    with screen.bars(terminal) as bars:
        bars.add_task(hostile, total=1)
        bars.refresh()
    text = stream.getvalue()
    for own in ("\x1b[?25l", "\x1b[?25h", "\x1b[2K", "\x1b[1A", "\r"):  # The bar's own.
        text = text.replace(own, "")
    assert obeyed(text) == []
    assert "[red]b[/red]" in text and ":cat:" in text and "\\x1b[2J" in text
    console.say(hostile)
    console.fail(str(InputError(hostile, hostile, hostile)))
    assert obeyed(capsys.readouterr().out) == []
    assert printable("one\r\ntwo\rthree\tfour\n") == "one\ntwo\nthree\tfour\n"


def test_the_page_has_no_control_characters_and_no_foreign_markup() -> None:
    from markupsafe import Markup
    from spectraqlora.report.page import _environment

    page = _environment().from_string("<p>{{ text }}</p>{{ picture }}")
    shown = page.render(text="\x1b]0;x\x07<b>&\x9b", picture=Markup("<svg>\x1b[31m</svg>"))
    assert shown == "<p>\\x1b]0;x\\x07&lt;b&gt;&amp;\\x9b</p><svg>\\x1b[31m</svg>"


# --- secrets in addresses ------------------------------------------------------------------------------------

WITH_SECRETS = [
    "http://me:hunter2@h", "http://me:hun/hunter2@h", "http://me:hun@hunter2@h", "http://hunter2@h", "postgresql://u:hunter2@h/d",
    "postgresql://h/d?user=u&password=hunter2", "postgresql:///d?host=h&PASSWORD=hunter2", "http://h/?token=hunter2",
    "http://h/?access_token=hunter2", "https://h/x?api_key=hunter2#y", "https://h/#access_token=hunter2",
    "https://h/x?X-Amz-Credential=a&X-Amz-Signature=hunter2", "https://h/x?sv=1&sig=hunter2", "http://h/?a=1;pwd=hunter2",
    "mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BODBC%7D%3BPWD%3Dhunter2", "http://h/%3Fpassword%3Dhunter2",
]  # fmt: skip
WITHOUT = [
    "", "http://h:5000", "https://h/mlflow?x=1", "sqlite:////home/me@work/mlflow.db", "sqlite:///mlflow.db?timeout=5",
    "postgresql://h/d?sslmode=require&passfile=/run/p", "/home/me@work/mlruns", "databricks", "http://h/a/tokens?keyboard=1",
    "s3://bucket/me@work/a:b.jsonl",
]  # fmt: skip


@pytest.mark.parametrize("address", WITH_SECRETS)
def test_a_tracking_address_with_a_secret_is_refused_and_the_secret_is_not_repeated(address: str) -> None:
    with pytest.raises(InputError) as refused:
        parse({"tracking": {"uri": address}})
    assert "hunter2" not in str(refused.value) or "%" in address, refused.value
    assert str(refused.value).startswith("tracking.uri: ")
    if "%" not in address:
        assert "hunter2" not in masked(f"asked {address} twice")


PLACES: list[Callable[[str], dict[str, Any]]] = [
    lambda address: {"model": {"base_model": address}},
    lambda address: {"data": {"source": address}},
    lambda address: {"data": {"sources": [{"source": address}]}},
    lambda address: {"snr": {"table": address}},
    lambda address: {"promote": {"guard_data": address}},
    lambda address: {"export": {"destination": address}},
    lambda address: {"checkpoint": {"destination": address}},
]


@pytest.mark.parametrize(
    "address",
    [
        *("https://u:hunter2@host/x.jsonl", "https://u:hun/hunter2@host/x.jsonl", "s3://u:hunter2@bucket/x"),
        *(
            "s3://u:hun/hunter2@bucket/x",
            "s3://bucket/x?X-Amz-Signature=hunter2",
            "https://h/x.csv?sig=hunter2",
        ),
    ],
)
@pytest.mark.parametrize("place", PLACES, ids=range(len(PLACES)))
def test_a_place_with_a_secret_in_it_is_refused_and_the_secret_is_not_repeated(
    place: Callable[[str], dict[str, Any]], address: str
) -> None:
    with pytest.raises(InputError, match=r"^(model|data|snr|promote|export|checkpoint)[^ ]*: ") as refused:
        parse(place(address))
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("address", WITHOUT)
def test_addresses_without_a_secret_stay_as_they_are(address: str) -> None:
    assert not holds_secret(address) and masked(address) == address
    assert parse({"tracking": {"uri": address}}).tracking.uri == address

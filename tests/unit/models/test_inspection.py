"""What a look at a base model takes, converts and refuses: the outcomes that models/README.md lists."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from spectraqlora.errors import InputError
from spectraqlora.models.inspection import inspect_folder, open_tensors
from spectraqlora.models.loading import load_four_bit, load_plain, load_tokenizer
from spectraqlora.places import base_place
from spectraqlora.settings import ModelSettings
from spectraqlora.steps.quantize_load.quantize import quantize

from tests.hub import Hub
from tests.models import WEIGHTS, change_header, change_json, change_weights, copied

Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def refused(folder: Path) -> str:
    """The one line with which the look refuses a folder."""
    with pytest.raises(InputError) as error:
        inspect_folder(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_a_good_folder_is_taken_with_its_modules_and_the_tensors_behind_them(tiny_model: Path) -> None:
    inspection = inspect_folder(tiny_model)
    assert len(inspection.modules) == 4 * 7 and inspection.lines == [] and inspection.dtype == "float32"
    assert all(info.tensor == f"{info.module}.weight" for info in inspection.modules)


def entries(**values: object) -> Callable[[dict], None]:
    return lambda header: header[Q].update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (entries(shape=[10**9, 10**9]), rf"{Q}.*bytes, as its shape"),
        (entries(shape=[-64, -64]), rf"{Q}.*not negative"),
        (entries(shape=[64.0, 64]), rf"{Q}.*whole numbers"),
        (entries(shape="64x64"), rf"{Q}.*whole numbers"),
        (entries(dtype="F33"), rf"{Q}.*one of the types"),
        (entries(dtype="F16"), rf"{Q}.*bytes, as its shape"),
        (entries(data_offsets=[-4, 16380]), rf"{Q}.*offsets"),
        (entries(data_offsets=[16384, 0]), rf"{Q}.*offsets"),
        (entries(data_offsets=[0, 16384]), "overlap"),
        (lambda header: header.update({Q: 5}), rf"{Q}.*dtype, shape"),
        (lambda header: header.pop(Q) and None, "begin at"),
        (lambda header: [header], "no JSON object"),
    ],
)
def test_a_header_that_says_what_cannot_be_is_refused_by_file_and_tensor(
    tiny_model: Path, tmp_path: Path, change: Callable[[dict], object], words: str
) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    change_header(folder / WEIGHTS, change)
    message = refused(folder)
    assert WEIGHTS in message
    with pytest.raises(InputError, match=words):
        inspect_folder(folder)
    with pytest.raises(InputError, match=words):
        open_tensors(base_place(str(folder)))


@pytest.mark.parametrize("content", [b"", b"\0" * 7, struct.pack("<Q", 2**62) + b"{}", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_refused(tiny_model: Path, tmp_path: Path, content: bytes) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    (folder / WEIGHTS).write_bytes(content)
    assert "header is cut short" in refused(folder)
    deep = b"[" * 100_000 + b"]" * 100_000
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(deep)) + deep)
    assert "no JSON object" in refused(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_a_file_that_leads_nowhere_or_never_ends_is_refused_at_once(
    tiny_model: Path, tmp_path: Path, name: str
) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "gone")
    refused(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name}': expected a file or a folder" in refused(folder)
    with pytest.raises(InputError, match="a file or a folder"):
        open_tensors(base_place(str(folder)))


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.int16, torch.uint8, torch.float8_e4m3fn])
def test_codes_and_truth_values_are_no_weights(tiny_model: Path, tmp_path: Path, kind: torch.dtype) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    norm = "model.norm.weight"
    change_weights(folder, lambda tensors: tensors.update({norm: torch.ones(64).to(kind)}))
    assert f"{WEIGHTS}': expected {norm} in F64, F32, F16, BF16; its numbers are" in refused(folder)
    change_weights(
        folder, lambda tensors: tensors.update({norm: torch.ones(64), Q: torch.ones(64, 64).to(kind)})
    )
    assert Q in refused(folder)


def test_weights_that_are_missing_left_over_or_of_other_shapes_are_refused_by_name(
    tiny_model: Path, tmp_path: Path
) -> None:
    missing = copied(tiny_model, tmp_path / "missing")
    change_weights(missing, lambda tensors: tensors.pop(UP))
    assert f"all weights of LlamaForCausalLM; it has no {UP}, which would be random" in refused(missing)
    extra = copied(tiny_model, tmp_path / "extra")
    change_weights(extra, lambda tensors: tensors.update({"score.weight": torch.ones(2, 64)}))
    assert "score.weight is none of its own" in refused(extra)
    shape = copied(tiny_model, tmp_path / "shape")
    change_weights(shape, lambda tensors: tensors.update({UP: torch.ones(64, 64)}))
    assert f"{UP} of shape [128, 64], as the config says; it has [64, 64]" in refused(shape)
    for folder in (missing, extra, shape):
        with pytest.raises(InputError, match=r"^model\.base_model: "):
            open_tensors(base_place(str(folder)))


def test_embeddings_alone_may_be_the_head_where_they_are_tied(tiny_model: Path, tmp_path: Path) -> None:
    untied = copied(tiny_model, tmp_path / "model")
    change_json(untied / "config.json", lambda config: config.update(tie_word_embeddings=False))
    assert "lm_head.weight" in refused(untied)
    no_embeddings = copied(tiny_model, tmp_path / "none")
    change_weights(no_embeddings, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    assert "embed_tokens" in refused(no_embeddings) or "vocab_size" in refused(no_embeddings)


def test_a_classifier_is_refused_by_the_head_that_it_lacks(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, LlamaForSequenceClassification

    config = AutoConfig.from_pretrained(tiny_model)
    config.tie_word_embeddings = False
    folder = copied(tiny_model, tmp_path / "model")
    LlamaForSequenceClassification(config).save_pretrained(folder)
    assert "it has no lm_head.weight, which would be random" in refused(folder)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_hidden_layers", 1, r"model\.layers\.1\."),
        ("num_hidden_layers", 40, "as many layers as the weights have, 4"),
        ("num_hidden_layers", 10**9, "num_hidden_layers"),
        ("num_hidden_layers", -1, "num_hidden_layers"),
        ("hidden_size", 512, "hidden_size"),
        ("hidden_size", -1, "hidden.size"),
        ("intermediate_size", 96, r"mlp\.\w+\.weight of shape"),
        ("vocab_size", 77, "vocab_size"),
        ("vocab_size", "many", "config.json"),
        ("num_attention_heads", 0, "config.json"),
        ("hidden_act", "nosuch", "nosuch"),
        ("model_type", "nosuchmodel", "nosuchmodel"),
        ("max_position_embeddings", 2**60, "max_position_embeddings"),
        ("max_position_embeddings", 4, "positions for 8 tokens"),
        ("eos_token_id", 10**6, "eos_token_id of a token"),
        ("dtype", "float7", "config.json|float7"),
        ("quantization_config", {"quant_method": "aqlm"}, "quant_method one of"),
        ("quantization_config", [1], "an object"),
        ("transformers_weights", "../other.safetensors", "it names others"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused_by_its_key(
    tiny_model: Path, tmp_path: Path, key: str, value: object, words: str
) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    change_json(folder / "config.json", lambda config: config.update({key: value}))
    message = refused(folder)
    with pytest.raises(InputError, match=words):
        inspect_folder(folder)
    assert "config.json" in message or "safetensors" in message


@pytest.mark.parametrize("text", ["{not json", "[1, 2]", "null", '{"a": ' * 100_000, ""])
def test_a_config_that_is_no_json_object_is_refused(tiny_model: Path, tmp_path: Path, text: str) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    (folder / "config.json").write_text(text)
    assert "config.json" in refused(folder) and "JSON" in refused(folder)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {Q: "no.safetensors"}}, "no.safetensors.*the index names it"),
        ({"weight_map": {Q: "../a.safetensors"}}, "inside the folder"),
        ({"weight_map": {Q: "/etc/a.safetensors"}}, "inside the folder"),
        ({"weight_map": {Q: "passwd"}}, "inside the folder"),
        ({"weight_map": {Q: 5}}, "inside the folder"),
        ({"weight_map": [1, 2]}, "weight_map"),
        ({"weight_map": {}}, "weight_map"),
        (None, "JSON object"),
        ({"weight_map": {"model.gone": "a.safetensors"}}, "model.gone.*not there"),
    ],
)
def test_an_index_that_lies_is_refused(tiny_model: Path, tmp_path: Path, index: object, words: str) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for action in (inspect_folder, lambda where: open_tensors(base_place(str(where)))):
        with pytest.raises(InputError, match=words):
            action(folder)


def test_pickled_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    (folder / WEIGHTS).unlink()
    ran = tmp_path / "ran"

    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return Path.touch, (ran,)  # type: ignore[return-value]

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful()))
    assert "pickled weights only, which can run code" in refused(folder)
    assert not ran.exists()


def test_a_tensor_in_two_shards_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    save_file({Q: torch.ones(64, 64)}, folder / "b.safetensors")
    weight_map = {Q: "b.safetensors", UP: "a.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert f"b.safetensors': expected no '{Q}'; a.safetensors has it too" in refused(folder)


def test_what_is_no_model_says_what_it_is(tiny_model: Path, tmp_path: Path) -> None:
    adapter = copied(tiny_model, tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text("{}")
    assert "PEFT adapter" in refused(adapter)
    gguf = copied(tiny_model, tmp_path / "gguf")
    (gguf / "config.json").unlink()
    (gguf / "model-q4.gguf").write_bytes(b"GGUF")
    assert "model-q4.gguf is GGUF" in refused(gguf)
    gguf_alone = copied(tiny_model, tmp_path / "gguf_alone")
    (gguf_alone / WEIGHTS).rename(gguf_alone / "model-q4.gguf")
    assert "model-q4.gguf is GGUF" in refused(gguf_alone)
    image = copied(tiny_model, tmp_path / "image")
    change_json(
        image / "config.json", lambda config: config.update(model_type="vit", architectures=["ViTModel"])
    )
    assert "language model" in refused(image)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tokenizer.json", "{}", "a tokenizer"),
        ("tokenizer.json", "{", "a tokenizer"),
        ("tokenizer_config.json", "{", "a tokenizer"),
        ("chat_template.jinja", "{% for m in messages %}{{ m.content }", "chat_template.jinja.*Jinja"),
    ],
)
def test_a_damaged_tokenizer_or_template_is_refused(
    tiny_model: Path, tmp_path: Path, name: str, text: str, words: str
) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    (folder / name).write_text(text)
    refused(folder)
    with pytest.raises(InputError, match=words):
        inspect_folder(folder)


def test_a_folder_without_a_tokenizer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "a tokenizer" in refused(folder)


def test_tokens_without_an_embedding_are_refused_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<new_a>", "<new_b>"])
    tokenizer.save_pretrained(folder)
    message = refused(folder)
    assert f"tokenizer has {rows + 2} tokens, embeddings {rows}, so that '<new_a>' has none" in message
    assert f"resize_token_embeddings({rows + 2})" in message


def test_a_pad_token_without_an_embedding_gives_way_to_the_end(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == len(tokenizer) - 1
    tokenizer.save_pretrained(folder)
    end = repr(tokenizer.eos_token)
    assert inspect_folder(folder).lines == [f"the pad token '[PAD]' has no embedding; padding is {end}"]
    assert load_tokenizer(folder).pad_token_id == tokenizer.eos_token_id


def test_an_end_that_the_tokenizer_does_not_name_is_the_configs_or_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    end = tokenizer.eos_token

    def without(config: dict) -> None:
        for key in ("eos_token", "pad_token"):
            config.pop(key, None)

    change_json(folder / "tokenizer_config.json", without)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    assert any(repr(end) in line and "names no eos_token" in line for line in inspect_folder(folder).lines)
    completed = load_tokenizer(folder)
    assert completed.eos_token == completed.pad_token == end
    for name in ("config.json", "generation_config.json"):
        change_json(folder / name, lambda config: config.update(eos_token_id=None))
    assert "expected an eos_token" in refused(folder)


def test_numbers_that_are_none_are_refused_by_file_and_tensor_where_weights_are_read(
    tiny_model: Path, tmp_path: Path
) -> None:
    for value in (float("nan"), float("inf")):
        folder = copied(tiny_model, tmp_path / str(value))
        change_weights(folder, lambda tensors, value=value: tensors[UP][3, 5:7].fill_(value))
        with pytest.raises(
            InputError, match=rf"{WEIGHTS}.*2 of the 8192 numbers of {UP} are NaN or infinite"
        ):
            quantize(ModelSettings(base_model=str(folder)), folder / "four_bit", folder / "outline")


def test_a_head_that_the_config_wrongly_calls_tied_stays_the_models_own(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    embeddings = "model.embed_tokens.weight"
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[embeddings].flip(0)}))
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    quantize(ModelSettings(base_model=str(folder)), folder / "four_bit", folder / "outline")
    assert "both are stored, and differ" in capsys.readouterr().out
    for model in (load_four_bit(folder / "four_bit")[0], load_plain(folder, torch.float32)):
        assert not model.config.tie_word_embeddings
        assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight.flip(0))
    assert not json.loads((folder / "four_bit/model/config.json").read_text())["tie_word_embeddings"]


def test_a_config_that_makes_no_numbers_of_finite_weights_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    for number, change in enumerate(
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, {"rms_norm_eps": -1.0})
    ):
        folder = copied(tiny_model, tmp_path / str(number))
        change_json(
            folder / "config.json",
            lambda config, change=change: config.update(rope_parameters=None, **change),
        )
        with pytest.raises(InputError, match="this one's predictions are NaN or infinite"):
            quantize(ModelSettings(base_model=str(folder)), folder / "four_bit", folder / "outline")


def test_random_weights_never_enter_a_model_that_a_later_step_loads(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    change_weights(folder, lambda tensors: tensors.pop(UP))
    with pytest.raises(InputError, match=rf"it has no {UP}"):
        load_plain(folder, torch.float32)


LOOK = """
import sys
from spectraqlora.errors import InputError
from spectraqlora.models.inspection import inspect_base
from spectraqlora.places import base_place
for name, commit in (line.split() for line in sys.argv[1:]):
    try:
        print(len(inspect_base(base_place(name), commit).modules), "modules")
    except InputError as error:
        print(error)
"""


def test_on_the_hub_headers_are_read_and_no_weights_at_the_commit_that_was_asked_for(
    tiny_model: Path, tmp_path: Path
) -> None:
    broken = copied(tiny_model, tmp_path / "broken")
    change_weights(broken, lambda tensors: tensors.pop(UP))
    packed = copied(tiny_model, tmp_path / "packed")
    change_json(
        packed / "config.json", lambda config: config.update(quantization_config={"quant_method": "hqq"})
    )
    # Weights that would be noticed among what is sent.
    change_weights(
        broken,
        lambda tensors: tensors.update(
            {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"].double()}
        ),
    )
    with Hub() as hub:
        commits = [hub.publish("models", "owner/name", folder) for folder in (tiny_model, broken, packed)]
        done = subprocess.run(
            [sys.executable, "-c", LOOK, *(f"owner/name {commit}" for commit in commits)],
            capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **hub.environment(tmp_path / "home")},
        )  # fmt: skip
        good, missing, quantized = done.stdout.splitlines()
        weights = sum((folder / WEIGHTS).stat().st_size for folder in (tiny_model, broken, packed))
        assert hub.sent < weights / 2
    assert good == "28 modules"
    assert missing.startswith(f"model.base_model: 'owner/name/{WEIGHTS}': ") and UP in missing
    assert "quant_method one of" in quantized and "'hqq'" in quantized

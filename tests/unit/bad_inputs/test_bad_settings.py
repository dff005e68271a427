"""Settings, values files and options that are wrong: each is refused in one line that names key, value and expectation."""

from __future__ import annotations

from pathlib import Path

import pytest
from spectraqlora_pipelines.cli.options import load_settings
from spectraqlora_pipelines.cluster.values import read_values

from tests.bad_inputs import check_refused, command, written

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)

CONFIGS: list[tuple[str | bytes, str]] = [
    ("a: [1", "YAML"), ("- 1\n", "mapping"), (b"\xff\xfe\x00\x01", "YAML|readable"), ("train: {max_stepz: 5}\n", "max_steps"), ("train: 5\n", "train"), ("text", "mapping"), ("5", "mapping"), ("train: [a]\n", "train"),
    ("train: !!python/object/apply:os.system ['touch /tmp/x']\n", "YAML"), ("train: !!python/name:os.system\n", "YAML"), (BOMB, "10000 values"), ("1: 2\n", "1"), ("null: 2\n", "None|null"), ("true: 2\n", "True|true"), ("2024-01-01: 2\n", "2024"), ("train: {max_steps: 2024-01-01}\n", "2024-01-01"), ("train: {1: 2}\n", "'1'"),
    ("train: {null: 2}\n", "None"), ("train: null\n", "train"), ("model: {base_model: null}\n", "base_model"), ("model: {base_model: 5}\n", "base_model"), ("a: " + "[" * 5000 + "]" * 5000 + "\n", "nested|YAML|known"), ("methods: !!set {a, b}\n", "is a set"), ("methods: {a: b}\n", "methods"), ("methods: []\n", "methods"), ("methods: [hybrid, hybrid]\n", "methods"),
    ("methods: nope\n", "methods"), ("methods: [5]\n", "methods"), ("methods: [[hybrid]]\n", "methods"), ("methods: ''\n", "methods"), ("methods: 'hybrid,'\n", "methods"), ("seed: -1\n", "seed"), ("seed: x\n", "seed"), ("seed: 1.5\n", "seed"), ("seed: 10000000000000000000000000\n", "seed"), ("seed: null\n", "seed"), ("seed: [1]\n", "seed"), ("seed: true\n", "seed"),
    ("rounds: 0\n", "rounds"), ("rounds: 1000\n", "rounds"), ("rounds: .inf\n", "rounds"), ("train: {learning_rate: .inf}\n", "learning_rate"), ("train: {learning_rate: .nan}\n", "learning_rate"), ("train: {learning_rate: -1}\n", "learning_rate"), ("train: {learning_rate: 0}\n", "learning_rate"), ("train: {learning_rate: fast}\n", "learning_rate"), ("train: {max_steps: 0}\n", "max_steps"),
    ("train: {max_steps: 1e99}\n", "max_steps"), ("train: {batch_size: 0}\n", "batch_size"), ("train: {optimizer: nope}\n", "optimizer"), ("train: {gradient_checkpointing: 5}\n", "gradient_checkpointing"), ("train: {processes: x}\n", "processes"), ("train: {processes: -2}\n", "processes"), ("select: {percent: 0}\n", "percent"), ("select: {percent: 101}\n", "percent"), ("select: {percent: .nan}\n", "percent"),
    ("select: {rank: 0}\n", "rank"), ("select: {signal: nope}\n", "signal"), ("data: {max_length: 1}\n", "max_length"), ("data: {eval_fraction: 1.5}\n", "eval_fraction"), ("data: {prompt_template: 5}\n", "prompt_template"), ("data: {columns: [a]}\n", "columns"), ("data: {columns: {nope: a}}\n", "columns"), ("data: {too_long: nope}\n", "too_long"), ("data: {encoding: nope}\n", "encoding"),
    ("export: {destination: /tmp}\n", "destination"), ("export: {destination: 's3://'}\n", "destination"), ("checkpoint: {destination: 'http://h/x'}\n", "destination"), ("checkpoint: {every_steps: -1}\n", "every_steps"), ("checkpoint: {every_minutes: .inf}\n", "every_minutes"), ("checkpoint: {folder: 5}\n", "folder"), ("tracking: {uri: 5}\n", "uri"), ("tracking: {experiment: a/b}\n", "experiment"),
    ("tracking: {registered_model: ''}\n", "registered_model"), ("tracking: {registered_form: nope}\n", "registered_form"), ("tracking: {patience_seconds: -1}\n", "patience"), ("tracking: {uri: 'http://u:p@h'}\n", "uri"), ("tracking: {uri: 'postgresql://h/d?password=x'}\n", "uri"), ("promote: {metric: 5}\n", "metric"), ("promote: {guards: {nope: x}}\n", "guards"), ("promote: {guards: [a]}\n", "guards"),
    ("promote: {margin: .nan}\n", "margin"), ("evaluate: {energy: 1}\n", "update_energy"), ("evaluate: {accuracy_rows: -1}\n", "accuracy_rows"), ("snr: {source: nope}\n", "source"), ("snr: {ties: nope}\n", "ties"), ("nope: {a: 1}\n", "nope"), ("train: {max_steps: {a: 1}}\n", "max_steps"), ("seed: !!binary aGVsbG8=\n", "is a bytes"), ("model: {trust_remote_code: maybe}\n", "trust_remote_code"), ("model: {revision: [a]}\n", "revision"),
    ("? [a, b]\n: 1\n", "YAML|mapping|a"), ("a: *nope\n", "YAML"), ("\t- a\n", "YAML"), ("--- a\n--- b\n", "YAML"), ("seed: 1\nseed: 2\n", "seed|once|YAML"), ("train: {max_steps: 5, max_steps: 6}\n", "max_steps|once|YAML"),
]  # fmt: skip

ASSIGNMENTS = [
    ("", "--set"), ("=", "--set"), ("=5", "--set"), ("seed", "--set"), ("seed=x", "seed"), ("nope=1", "nope"), ("train=1", "train"), ("train.=1", "--set"), (".seed=1", "--set"), ("train.max_steps.x=1", "max_steps"), ("seed.x=1", "seed"), ("train.max_steps=[", "max_steps"), ("train.max_steps=!!python/name:os.system", "max_steps"), ("train.max_steps=2024-01-01", "max_steps"),
    ("train..max_steps=1", "--set"), ("methods=[hybrid", "methods"), ("methods=nope", "methods"), ("methods={a: 1}", "methods"), ("data.columns={prompt: [a]}", "columns"), ("seed=nan", "seed"), ("train.learning_rate=1e999", "learning_rate"), ("train.learning_rate=inf", "train.learning_rate"), ("train.learning_rate=nan", "train.learning_rate"), ("train.learning_rate=1e30", "train.learning_rate.*10"), ("train.learning_rate=-1e-4", "train.learning_rate"), ("train.learning_rate=0", "train.learning_rate"),
    ("train.lora_plus_ratio=1e30", "lora_plus_ratio"), ("train.weight_decay=1e30", "weight_decay"), ("select.alpha_over_rank=1e30", "alpha_over_rank"), ("select.high_lr=1e30", "high_lr"), ("tracking.uri=http://h/?token=x", "uri"), ("seed=" + "9" * 5000, "seed"), ("a" * 5000 + "=1", "known"), ("seed=\x1b[31m", "seed"), ("seed=null", "seed"),
]  # fmt: skip

VALUES: list[tuple[str | bytes, str]] = [
    ("a: [1", "YAML"), ("- 1\n", "mapping"), ("text\n", "mapping"), ("foo: 1\n", "foo"), ("steps: {nosuch: {}}\n", "nosuch"), ("steps: []\n", "steps"), ("steps: {train: []}\n", "train"), ("defaults: {cpu: {request: lots}}\n", "cpu.request"), ("defaults: {cpu: {request: 1.5.2}}\n", "cpu.request"), ("defaults: {cpu: {request: -1}}\n", "cpu.request"), ("defaults: {cpu: 2}\n", "cpu"), ("defaults: {memory: {request: 4}}\n", "memory.request"),
    ("defaults: {memory: {request: 4Xi}}\n", "memory.request"), ("defaults: {cpu: {request: 4, limit: 2}}\n", "limit 2"), ("defaults: {memory: {request: 2Gi, limit: 1Gi}}\n", "limit 1Gi"), ("defaults: {gpu: {count: -1}}\n", "gpu.count"), ("defaults: {gpu: {count: 1.5}}\n", "gpu.count"), ("defaults: {gpu: {resource: gpu}}\n", "gpu.resource"), ("defaults: {env: {MY_TOKEN: abc}}\n", "MY_TOKEN"), ("defaults: {env: {URL: 'http://me:hunter2@h/'}}\n", "URL"),
    ("defaults: {env: {URL: 'postgresql://h/d?password=x'}}\n", "URL"), ("defaults: {env: {'A B': x}}\n", "env"), ("defaults: {env: {A: [x]}}\n", "env"), ("defaults: {env: {A: '1'}, secrets: [{name: s, env: {A: k}}]}\n", "once"), ("defaults: {secrets: [{name: s}]}\n", "env, mount"), ("defaults: {secrets: [{name: UPPER, env: {A: k}}]}\n", "name"), ("defaults: {secrets: {name: s}}\n", "secrets"), ("defaults: {secrets: [s]}\n", "secrets"), ("defaults: {config_maps: [{name: a.b, mount: /x}]}\n", "name"),
    ("defaults: {secrets: [{name: s, mount: x}]}\n", "mount"), ("defaults: {secrets: [{name: s, mount: /x}, {name: t, mount: /x}]}\n", "/x"), ("defaults: {image: {digest: 'sha256:abc'}}\n", "digest"), ("defaults: {image: {tag: 'a b'}}\n", "tag"), ("defaults: {image: {registry: 'https://x'}}\n", "registry"), ("defaults: {image: {pull_policy: Sometimes}}\n", "pull_policy"), ("defaults: {cache: {claim: UPPER}}\n", "claim"), ("defaults: {cache: {claim: a, path: relative}}\n", "path"), ("defaults: {tolerations: [{operator: Equal}]}\n", "key"),
    ("defaults: {tolerations: [{operator: Exists, value: x}]}\n", "value|operator"), ("defaults: {affinity: [{rules: []}]}\n", "rules"), ("defaults: {affinity: [{rules: [{key: a, operator: In}]}]}\n", "values"), ("defaults: {node_selector: {'a b': c}}\n", "node_selector"), ("defaults: {labels: {a: 'b c'}}\n", "labels"), ("defaults: {retries: {attempts: 99}}\n", "attempts"), ("defaults: {retries: {backoff: soon}}\n", "backoff"), ("defaults: {time_limit: 5}\n", "time_limit"), ("defaults: {user: {run_as_user: 0}}\n", "run_as_user"), ("defaults: {scratch: {size: big}}\n", "size"),
    ("defaults: {shm: x}\n", "shm"), ("steps: {register: {caching: true}}\n", "caching"), ("run: {ui: ftp://h}\n", "run.ui"), ("run: {ui: 'https://u:p@h'}\n", "run.ui"), ("run: {pipeline_root: /x}\n", "pipeline_root"), ("run: {time_limit: 0d}\n", "time_limit"), ("run: {service_account: A}\n", "service_account"), ("defaults: {priority_class: x}\n", "priority_class"), (b"\xff\xfe", "YAML|readable"), (BOMB, "known|mapping|a"), ("defaults: !!python/name:os.system\n", "YAML"), ("defaults: {pull_secrets: [A B]}\n", "pull_secrets"), ("1: 2\n", "1"),
]  # fmt: skip

SUBMIT = [
    "submit",
    "--upload-only",
    "--set",
    "model.base_model=a/b",
    "--set",
    "data.source=a/b",
    "--set",
    "tracking.uri=http://m",
]
OPTIONS = [
    (["run", "--preset", "nope"], "--preset"), (["run", "--pipeline", "nope"], "--pipeline|pipeline"), (["run", "--runner", "nope"], "--runner"), (["run", "--network", "x"], "--network"), (["run", "--rounds", "0"], "rounds"), (["run", "--methods", "nope"], "methods"), (["run", "--methods", ""], "methods"), (["run", "--snr-table", "/none.json"], "snr.table"), (["run", "--base-model", "/none"], "base_model"), (["run", "--data", "/none.jsonl"], "data.source"),
    (["run", "--config", "/none.yaml"], "--config"), (["run", "--config", "/"], "--config"), (["run", "--rounds", "x"], "--rounds"), (["run", "--nope"], "--nope"), (["nope"], "nope"), (["run", "extra"], "extra"), (["run", "--seed"], "--seed"), (["compile", "--target", "nope"], "--target"), (["compile", "--values", "/none.yaml", "--target", "kubernetes"], "--values"), (["compile", "--pipeline", "nope"], "pipeline"), (["settings", "nope"], "nope"),
    (["plan", "--base-model", "/none"], "none"), (["snr", "/none"], "none"), (["snr"], "model|MODEL"), (["report", "/none"], "none"), (["data", "/none.csv"], "DATA"), (["models"], "--uri"), (["models", "--uri", "/none"], "--uri"), (["promote", "--uri", "/none"], "--uri"), (["promote", "--version", "x"], "--version"), (["promote", "rollback", "--uri", "/none"], "--uri"), (["status", "x"], "--host"), (["logs", "x", "nope"], "STEP"), ([*SUBMIT], "--host"), (["schedule", "list"], "--host"),
    (["schedule", "create", "x", "--cron", "nope", "--host", "http://127.0.0.1:9"], "--cron"), (["schedule", "create", "x", "--host", "http://127.0.0.1:9"], "--cron|--every"), (["schedule", "create", "x", "--every", "soon", "--host", "http://127.0.0.1:9"], "--every"), ([*SUBMIT, "--host", "http://u:p@h"], "--host"), ([*SUBMIT, "--package", "/none", "--host", "http://127.0.0.1:9"], "--package|--host"), (["snr", "/none", "--percent", "x"], "--percent"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "named"), CONFIGS, ids=range(len(CONFIGS)))
def test_a_bad_settings_file(text: str | bytes, named: str, tmp_path: Path) -> None:
    file = written(tmp_path / "c.yaml", text)
    check_refused(lambda: load_settings(file, {}, None), named)


@pytest.mark.parametrize(("assignment", "named"), ASSIGNMENTS, ids=range(len(ASSIGNMENTS)))
def test_a_bad_assignment(assignment: str, named: str) -> None:
    check_refused(lambda: load_settings(None, {}, [assignment]), named)


@pytest.mark.parametrize(("text", "named"), VALUES, ids=range(len(VALUES)))
def test_a_bad_values_file(text: str | bytes, named: str, tmp_path: Path) -> None:
    file = written(tmp_path / "v.yaml", text)
    check_refused(lambda: read_values(file), named)


@pytest.mark.parametrize(("arguments", "named"), OPTIONS, ids=[" ".join(given) for given, _ in OPTIONS])
def test_a_bad_option(
    arguments: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    check_refused(command(*arguments), named, silent="|--host" in named)

"""The values file of a cluster: what it means, and how faults are named."""

import itertools
from pathlib import Path

import pytest
import yaml
from spectraqlora.errors import InputError
from spectraqlora.runtime.images import step_names
from spectraqlora_pipelines.cluster.fields import exceeds, seconds
from spectraqlora_pipelines.cluster.values import NEVER_CACHED, ClusterValues, read_values, reference

ROOT = Path(__file__).resolve().parents[3]


def values(text: str, folder: Path) -> ClusterValues:
    path = folder / "values.yaml"
    path.write_text(text)
    return read_values(path)


def test_a_steps_own_value_wins_mappings_merge_and_lists_are_replaced(tmp_path: Path) -> None:
    found = values(
        """
defaults:
  cpu: {request: 1, limit: 4}
  labels: {team: nlp}
  pull_secrets: [one, two]
  retries: {attempts: 3}
steps:
  train:
    cpu: {limit: 8}
    labels: {tier: gpu}
    pull_secrets: [three]
""",
        tmp_path,
    )
    train, other = found.step("train"), found.step("compare")
    assert (train.cpu.request, train.cpu.limit) == ("1", "8")
    assert train.labels == {"team": "nlp", "tier": "gpu"}
    assert train.pull_secrets == ("three",)
    assert train.retries.attempts == other.retries.attempts == 3
    assert (other.cpu.limit, other.labels, other.pull_secrets) == ("4", {"team": "nlp"}, ("one", "two"))


def test_an_empty_file_gives_training_shared_memory_and_every_deterministic_step_its_cache(
    tmp_path: Path,
) -> None:
    found = values("", tmp_path)
    assert found.step("train").shm == "1Gi" and found.step("compare").shm is None
    assert {name for name in step_names() if not found.step(name).caching} == NEVER_CACHED & set(step_names())
    assert "register" in step_names()


def test_every_step_and_every_run_has_a_time_limit_unless_none_is_wanted(tmp_path: Path) -> None:
    found = values("", tmp_path)
    limits = {name: found.step(name).time_limit for name in step_names()}
    assert limits.pop("train") == "7d" and set(limits.values()) == {"12h"}
    assert found.run.time_limit == "30d"
    found = values(
        "{run: {time_limit: null}, defaults: {time_limit: 1h}, steps: {train: {time_limit: null}}}", tmp_path
    )
    assert found.run.time_limit is None and found.step("train").time_limit is None
    assert found.step("compare").time_limit == "1h"


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("steps: {train: {time_limit: 1d, retries: {attempts: 5, max_backoff: 10m}}}", ["train"]),
        ("steps: {train: {time_limit: 1d, retries: {attempts: 0, max_backoff: 10m}}}", []),
        ("steps: {train: {time_limit: 1d, retries: {attempts: 5, max_backoff: 2d}}}", []),
        ("steps: {train: {time_limit: 1d}}", []),
        ("{defaults: {retries: {max_backoff: 1h}}, steps: {compare: {time_limit: 30m}}}", None),
    ],
)
def test_a_window_that_ends_before_an_attempt_does_is_told(
    text: str, steps: list[str] | None, tmp_path: Path
) -> None:
    lines = values(text, tmp_path).short_windows()
    expected = [name for name in step_names() if name != "compare"] if steps is None else steps
    assert [line.split(".")[1] for line in lines] == expected
    for line in lines:
        assert ".retries.max_backoff: " in line and "not tried again" in line and "\n" not in line


def test_defaults_that_cache_leave_register_uncached(tmp_path: Path) -> None:
    found = values("defaults: {caching: true}", tmp_path)
    assert found.step("train").caching and not found.step("register").caching


def test_an_images_digest_pins_every_step_that_runs_in_it_unless_the_step_has_its_own(tmp_path: Path) -> None:
    pinned, own = (f"sha256:{digit * 64}" for digit in "12")
    found = values(
        f"""
digests: {{light: '{pinned}', re-evaluate: '{pinned}', train: '{pinned}'}}
defaults: {{image: {{registry: me.example, tag: "9"}}}}
steps:
  compare: {{image: {{digest: '{own}'}}}}
  train: {{image: {{tag: 9-cuda}}}}
""",
        tmp_path,
    )
    references = {step: found.step(step).image.reference("i") for step in step_names()}
    light = {"close-runs", "detect-changes", "prepare-data", "start-point"}
    measured = {"measure-base", "promote", "re-evaluate", "register"}
    assert {step for step in references if references[step] == f"me.example/i@{pinned}"} == light | measured
    assert references["compare"] == f"me.example/i@{own}"
    assert references["train"] == "me.example/i:9-cuda" and references["snr-analyze"] == "me.example/i:9"


def test_quantities_and_durations_have_kubernetes_meaning() -> None:
    in_order = ["500m", "0.6", "2", "1K", "1Ki", "1.5G", "8Gi", "8.1Gi", "1E", "1Ei"]
    assert all(exceeds(more, less) for less, more in itertools.pairwise(in_order))
    assert not exceeds("500m", "0.5") and not exceeds("0.5", "500m") and not exceeds("1Gi", "1024Mi")
    assert not exceeds("1Gi", "1.073741824G") and exceeds("1Gi", "1.073741823G")
    assert [seconds(d) for d in ("45s", "10m", "12h", "2d")] == [45, 600, 43200, 172800]


@pytest.mark.parametrize(
    ("text", "key", "value", "expected"),
    [
        ("notes: 3", "notes", "3", "run, argo, nodes, digests, defaults, steps"),
        ("steps: {trian: {}}", "steps.trian", "trian", "train"),
        ("steps: {train: {gpus: 1}}", "steps.train.gpus", "1", "gpu"),
        ("defaults: {cpu: {limit: lots}}", "defaults.cpu.limit", "lots", "500m"),
        ("defaults: {memory: {limit: 8}}", "defaults.memory.limit", "8", "24Gi"),
        ("defaults: {memory: {request: 8Gi, limit: 4Gi}}", "defaults.memory", "", "at most the limit 4Gi"),
        ("defaults: {memory: {request: 9K, limit: 8K}}", "defaults.memory", "9K", "at most the limit 8K"),
        ("{defaults: {memory: {limit: 4Gi}}, steps: {train: {memory: {request: 8Gi}}}}",
         "steps.train.memory", "", "at most the limit 4Gi"),
        ("defaults: {gpu: {count: -1}}", "defaults.gpu.count", "-1", "greater than or equal to 0"),
        ("defaults: {gpu: {resource: gpu}}", "defaults.gpu.resource", "gpu", "nvidia.com/gpu"),
        ("defaults: {image: {registry: 'https://me'}}", "defaults.image.registry", "https://me", "without scheme"),
        ("defaults: {image: {digest: 'sha256:1'}}", "defaults.image.digest", "sha256:1", "64"),
        ("defaults: {time_limit: soon}", "defaults.time_limit", "soon", "12h"),
        ("defaults: {tolerations: [{value: x}]}", "defaults.tolerations.0", "", "operator Exists"),
        ("defaults: {secrets: [{name: s}]}", "defaults.secrets.0", "", "env, mount or both"),
        ("defaults: {config_maps: [{name: s, mount: etc}]}", "defaults.config_maps.0.mount", "etc", "absolute"),
        ("defaults: {config_maps: [{name: a.b, mount: /a}]}", "defaults.config_maps.0.name", "a.b", "without dots"),
        ("defaults: {config_maps: [{name: a, mount: /a}], secrets: [{name: b, mount: /a}]}",
         "defaults.config_maps.0.mount", "/a", "secrets.0.mount is there"),
        ("defaults: {config_maps: [{name: a, mount: /a}], secrets: [{name: a, mount: /b}]}",
         "defaults.config_maps.0.name", "a", "mounted once"),
        ("defaults: {cache: {claim: c, path: /c}, scratch: {size: 1Gi, path: /c}}",
         "defaults.scratch.path", "/c", "cache.path is there"),
        ("defaults: {scratch: {size: 9}}", "defaults.scratch.size", "9", "24Gi"),
        ("defaults: {affinity: [{weight: 200, rules: [{key: a, operator: Exists}]}]}",
         "defaults.affinity.0.weight", "200", "less than or equal to 100"),
        ("defaults: {affinity: [{rules: [{key: a}]}]}", "defaults.affinity.0.rules.0.values", "[]", "operator In"),
        ("defaults: {affinity: [{rules: [{key: a, operator: Exists, values: [b]}]}]}",
         "defaults.affinity.0.rules.0.values", "b", "operator Exists"),
        ("defaults: {affinity: [{rules: []}]}", "defaults.affinity.0.rules", "[]", "at least 1"),
        ("defaults: {priority_class: low}", "defaults.priority_class", "low", "KFP has no place for it"),
        ("defaults: {runtime_class: nvidia}", "defaults.runtime_class", "nvidia", "KFP has no place for it"),
        ("defaults: {fs_group: 0}", "defaults.fs_group", "0", "KFP has no place for it"),
        ("steps: {train: {ephemeral_storage: {request: 9Gi}}}", "steps.train.ephemeral_storage", "9Gi", "scratch.size"),
        ("defaults: {secrets: [{name: s, env: {A-B: c}}]}", "defaults.secrets.0.env.A-B", "A-B", "letters"),
        ("defaults: {secrets: [{name: s, env: {A: c}}, {name: t, env: {A: c}}]}",
         "defaults.secrets.1.env.A", "c", "set once"),
        ("defaults: {labels: {team: 'a b'}}", "defaults.labels.team", "a b", "63"),
        ("defaults: {cache: {path: cache}}", "defaults.cache.path", "cache", "absolute"),
        ("defaults: {user: {run_as_user: 0}}", "defaults.user.run_as_user", "0", "greater than or equal to 1"),
        ("steps: {register: {caching: true}}", "steps.register.caching", "True", "registry"),
        ("run: {ui: kubeflow}", "run.ui", "kubeflow", "https://"),
        ("run: {pipeline_root: /tmp}", "run.pipeline_root", "/tmp", "s3://"),
        ("digests: {trian: 'sha256:1'}", "digests.trian", "trian", "train"),
        ("digests: {train: latest}", "digests.train", "latest", "sha256:"),
        ("- 1", "--values", "values.yaml", "mapping"),
        ("a: [", "--values", "values.yaml", "valid YAML"),
    ],
)  # fmt: skip
def test_a_fault_is_one_line_with_key_value_and_expectation(
    text: str, key: str, value: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        values(text, tmp_path)
    line = str(caught.value)
    assert line.startswith(f"{key}: ") and value in line and expected in line, line
    assert "\n" not in line


@pytest.mark.parametrize(
    "line",
    ["HF_TOKEN: hf_abcdef", "AWS_SECRET_ACCESS_KEY: abcdef", "DATABASE: postgres://me:abcdef@db/mlflow"],
)
def test_a_secret_in_plain_text_is_refused_and_not_repeated(line: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no secret in plain text") as caught:
        values(f"defaults: {{env: {{{line}}}}}", tmp_path)
    assert "abcdef" not in str(caught.value)


def test_the_example_is_valid_and_the_reference_has_every_key_with_a_description() -> None:
    example = read_values(ROOT / "pipelines" / "cluster-values.yaml")
    assert example.step("train").gpu.count == 1 and example.run.service_account == "spectraqlora"
    rows = reference()
    assert all(description for _, _, description in rows)

    def keys(node: object, prefix: str = "") -> set[str]:
        if not isinstance(node, dict):
            return {prefix}
        return set().union(*(keys(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in node.items()))

    known = {key.split("[")[0] for key, _, _ in rows}
    written = keys(
        yaml.safe_load((ROOT / "pipelines" / "cluster-values.yaml").read_text())["defaults"], "defaults"
    )
    assert {key for key in written if not any(key.startswith(k) for k in known)} == set()

"""How a DAG's tasks are named, retried and placed: by a retry count alone, or by a cluster's values file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kfp import dsl
from spectraqlora.runtime import run_key
from spectraqlora.steps.train.train_job import POD, TEMPLATE
from spectraqlora.tracking.runs import KFP_UI

from spectraqlora_pipelines.cluster.environment import step_environment
from spectraqlora_pipelines.cluster.fields import seconds
from spectraqlora_pipelines.cluster.train_job import POD_NAME, placed_step, train_job, trains_on_nodes
from spectraqlora_pipelines.cluster.values import (
    NEVER_CACHED,
    SCRATCH,
    STEP,
    ClusterValues,
    StepValues,
    image_name,
)

RUN_ID = "metadata.labels['pipeline/runid']"
"""Where KFP writes the id of a run on each of its pods."""


@dataclass(frozen=True)
class Placement:
    """Applied to every task of a DAG as `place(task, display_name)`.

    Args:
        retries: how often a failed step is tried again where no values say it. On one machine a failed step fails
            again, so local runs ask for none; clusters lose pods.
        values: of a cluster.
        nodes: machines that train together.
    """

    retries: int = 2
    values: ClusterValues | None = None
    nodes: int = 1

    @property
    def local(self) -> bool:
        """Whether the DAG is for this machine alone."""
        return self.values is None and not self.retries

    def __call__(self, task: Any, name: str) -> Any:
        """Name the task for people and give it its step's labels, retries, caching, resources and environment."""
        from kfp import kubernetes

        task.set_display_name(name)
        # Not a parameter: those are part of the cache's key.
        kubernetes.use_field_path_as_env(task, env_name=run_key.VARIABLE, field_path=RUN_ID)
        step = task.component_spec.name.replace("_", "-")
        kubernetes.add_pod_label(task, STEP, step)
        waits = trains_on_nodes(step, self.nodes)
        values = ClusterValues() if waits and self.values is None else self.values
        if values is not None:
            placed = placed_step(values, step, self.nodes)
            _place(task, placed)
            if values.run.ui and KFP_UI not in placed.env:
                task.set_env_variable(KFP_UI, values.run.ui)
            if waits:
                task.set_env_variable(TEMPLATE, train_job(values))
                kubernetes.use_field_path_as_env(task, env_name=POD, field_path=POD_NAME)
        elif self.retries:
            built_in = StepValues.model_validate({"retries": {"attempts": self.retries}})
            _limit(task, ClusterValues(defaults=built_in).step(step))
        if step in NEVER_CACHED:
            task.set_caching_options(False)
        return task

    def pipeline_config(self) -> dsl.PipelineConfig | None:
        """The run's own limits, where there are any."""
        if self.local:
            return None
        run = (self.values or ClusterValues()).run
        if not (run.time_limit or run.keep_finished):
            return None
        return dsl.PipelineConfig(
            active_deadline_seconds=seconds(run.time_limit) if run.time_limit else None,
            ttl_seconds_after_finished=seconds(run.keep_finished) if run.keep_finished else None,
        )


def _limit(task: Any, values: StepValues) -> None:
    """How long an attempt may take, and how often and how long it is tried again."""
    from kfp import kubernetes

    retries = values.retries
    if retries.attempts:
        task.set_retry(
            retries.attempts,
            backoff_duration=f"{seconds(retries.backoff)}s",
            backoff_factor=retries.factor,
            backoff_max_duration=f"{values.retry_window()}s",
        )
    if values.time_limit:
        kubernetes.set_timeout(task, seconds(values.time_limit))


def _place(task: Any, values: StepValues) -> None:
    from kfp import kubernetes

    image = values.image.reference(image_name(task.container_spec.image))
    task.set_container_image(image)
    for name, value in step_environment(values, image).items():
        task.set_env_variable(name, value)
    kubernetes.set_image_pull_policy(task, values.image.pull_policy)
    if values.pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(values.pull_secrets))

    for kind in ("cpu", "memory"):
        for bound in ("request", "limit"):
            given = getattr(getattr(values, kind), bound)
            if given:
                getattr(task, f"set_{kind}_{bound}")(given)
    if values.gpu.count:
        task.set_accelerator_type(values.gpu.resource).set_accelerator_limit(values.gpu.count)
    if values.shm:
        kubernetes.empty_dir_mount(
            task, volume_name="shm", mount_path="/dev/shm", medium="Memory", size_limit=values.shm
        )

    for key, value in values.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for term in values.affinity:
        rules = [rule.model_dump() | {"values": list(rule.values)} for rule in term.rules]
        kubernetes.add_node_affinity(task, match_expressions=rules, weight=term.weight)
    for toleration in values.tolerations:
        kubernetes.add_toleration(
            task,
            key=toleration.key,
            operator=toleration.operator,
            value=toleration.value,
            effect=toleration.effect,
            toleration_seconds=toleration.seconds,
        )

    _limit(task, values)
    task.set_caching_options(values.caching)

    for secret in values.secrets:
        keys = {key: env for env, key in secret.env.items()}
        if keys:
            kubernetes.use_secret_as_env(task, secret.name, keys, optional=secret.optional)
        if secret.mount:
            kubernetes.use_secret_as_volume(task, secret.name, secret.mount, optional=secret.optional)
    for config in values.config_maps:
        keys = {key: env for env, key in config.env.items()}
        if keys:
            kubernetes.use_config_map_as_env(task, config.name, keys, optional=config.optional)
        if config.mount:
            kubernetes.use_config_map_as_volume(task, config.name, config.mount, optional=config.optional)
    scratch = values.scratch
    if scratch.size:
        kubernetes.add_ephemeral_volume(
            task, SCRATCH, scratch.path, ["ReadWriteOnce"], scratch.size, scratch.storage_class
        )
    if values.cache.claim:
        kubernetes.mount_pvc(task, values.cache.claim, values.cache.path, values.cache.sub_path)

    kubernetes.set_security_context(
        task,
        run_as_user=values.user.run_as_user,
        run_as_group=values.user.run_as_group,
        run_as_non_root=True,
    )
    for key, value in values.labels.items():
        kubernetes.add_pod_label(task, key, value)
    for key, value in values.annotations.items():
        kubernetes.add_pod_annotation(task, key, value)

{{- define "spectraqlora.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{/* Room is left for suffixes such as -publish: names have 63 characters at most. */}}
{{- define "spectraqlora.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains (include "spectraqlora.name" .) .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "spectraqlora.name" .) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "spectraqlora.selector" -}}
app.kubernetes.io/name: {{ include "spectraqlora.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* What network policies select: our pods, and by the pipeline's values the steps' pods. */}}
{{- define "spectraqlora.partOf" -}}
app.kubernetes.io/part-of: {{ include "spectraqlora.fullname" . }}
{{- end -}}

{{- define "spectraqlora.labels" -}}
{{ include "spectraqlora.selector" . }}
{{ include "spectraqlora.partOf" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Argument: an image's values and, as .default, its tag where none is given. */}}
{{- define "spectraqlora.image" -}}
{{- $name := .image.repository -}}
{{- if .image.registry -}}{{- $name = printf "%s/%s" .image.registry .image.repository -}}{{- end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $name .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default .default .image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "spectraqlora.stepsAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "spectraqlora.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "spectraqlora.jobsAccount" -}}
{{- printf "%s-jobs" (include "spectraqlora.fullname" .) -}}
{{- end -}}

{{/* Of a training on several machines: the TrainingRuntime, and what goes with it. */}}
{{- define "spectraqlora.runtime" -}}
{{- printf "%s-nodes" (include "spectraqlora.fullname" .) -}}
{{- end -}}

{{- define "spectraqlora.cacheClaim" -}}
{{- if .Values.cache.existingClaim -}}
{{- .Values.cache.existingClaim -}}
{{- else if .Values.cache.enabled -}}
{{- printf "%s-cache" (include "spectraqlora.fullname" .) -}}
{{- end -}}
{{- end -}}

{{/* Whether the MLflow server asks who somebody is: "true" or nothing. */}}
{{- define "spectraqlora.mlflowAuth" -}}
{{- with .Values.mlflow.server -}}
{{- if and .enabled (ternary .ingress.enabled .auth.enabled (kindIs "invalid" .auth.enabled)) -}}true{{- end -}}
{{- end -}}
{{- end -}}

{{- define "spectraqlora.mlflowScheme" -}}
{{- ternary "https" "http" (ne .Values.mlflow.server.tls.secret "") -}}
{{- end -}}

{{/* Where people reach MLflow's UI. */}}
{{- define "spectraqlora.mlflowUi" -}}
{{- $ingress := .Values.mlflow.server.ingress -}}
{{- if .Values.mlflow.ui -}}
{{- .Values.mlflow.ui -}}
{{- else if and .Values.mlflow.server.enabled $ingress.enabled -}}
{{- printf "%s://%s" (ternary "https" "http" (ne $ingress.tlsSecret "")) $ingress.host -}}
{{- end -}}
{{- end -}}

{{- define "spectraqlora.mlflowUri" -}}
{{- if .Values.mlflow.server.enabled -}}
{{- printf "%s://%s-mlflow.%s.svc:%v" (include "spectraqlora.mlflowScheme" .) (include "spectraqlora.fullname" .) .Release.Namespace .Values.mlflow.server.port -}}
{{- else -}}
{{- .Values.mlflow.uri -}}
{{- end -}}
{{- end -}}

{{- define "spectraqlora.environment" -}}
{{- with .Values.s3.endpointUrl }}
AWS_ENDPOINT_URL: {{ . | quote }}
{{- end }}
{{- with .Values.s3.region }}
AWS_REGION: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* The settings file: the user's, with the address of MLflow where they give none. */}}
{{- define "spectraqlora.settings" -}}
{{- $known := dict -}}
{{- with include "spectraqlora.mlflowUri" . -}}
{{- $known = dict "tracking" (dict "uri" .) -}}
{{- end -}}
{{- toYaml (mergeOverwrite $known (deepCopy .Values.pipeline.settings)) -}}
{{- end -}}

{{/* The values file of `spectraqlora compile --values`: what the chart knows, then the user's. */}}
{{- define "spectraqlora.clusterValues" -}}
{{- $secrets := list -}}
{{- with .Values.secrets.s3 -}}
{{- if .name -}}
{{- $own := dict "name" .name "env" (dict "AWS_ACCESS_KEY_ID" .accessKey "AWS_SECRET_ACCESS_KEY" .secretKey) -}}
{{- if .allSteps -}}{{- $_ := set $own "all_steps" true -}}{{- end -}}
{{- $secrets = append $secrets $own -}}
{{- end -}}
{{- end -}}
{{- with .Values.secrets.mlflow -}}
{{- if .name -}}
{{- $secrets = append $secrets (dict "name" .name "env" (dict "MLFLOW_TRACKING_USERNAME" .username "MLFLOW_TRACKING_PASSWORD" .password)) -}}
{{- end -}}
{{- end -}}
{{- with .Values.secrets.hub -}}
{{- if .name -}}
{{- $secrets = append $secrets (dict "name" .name "env" (dict "HF_TOKEN" .token)) -}}
{{- end -}}
{{- end -}}
{{- $image := dict "tag" (default .Chart.AppVersion .Values.image.tag) "pull_policy" .Values.image.pullPolicy -}}
{{- with .Values.image.registry -}}{{- $_ := set $image "registry" . -}}{{- end -}}
{{- $defaults := dict "image" $image "labels" (fromYaml (include "spectraqlora.partOf" .)) -}}
{{- with $secrets -}}{{- $_ := set $defaults "secrets" . -}}{{- end -}}
{{- with .Values.image.pullSecrets -}}{{- $_ := set $defaults "pull_secrets" . -}}{{- end -}}
{{- $maps := list -}}
{{- with fromYaml (include "spectraqlora.environment" .) -}}
{{- $env := dict -}}
{{- range $key, $_ := . -}}{{- $_ := set $env $key $key -}}{{- end -}}
{{- $maps = append $maps (dict "name" (printf "%s-environment" (include "spectraqlora.fullname" $)) "env" $env) -}}
{{- end -}}
{{- $variables := include "spectraqlora.caVariables" . | fromYaml -}}
{{- with .Values.ca.configMap -}}
{{- $maps = append $maps (dict "name" . "mount" (include "spectraqlora.caFolder" $)) -}}
{{- end -}}
{{- with include "spectraqlora.mlflowUi" . -}}{{- $_ := set $variables "SPECTRAQLORA_MLFLOW_UI" . -}}{{- end -}}
{{- with $variables -}}{{- $_ := set $defaults "env" . -}}{{- end -}}
{{- with $maps -}}{{- $_ := set $defaults "config_maps" . -}}{{- end -}}
{{- with include "spectraqlora.cacheClaim" . -}}
{{- $_ := set $defaults "cache" (dict "claim" . "path" $.Values.cache.mountPath) -}}
{{- end -}}
{{- $run := dict "service_account" (include "spectraqlora.stepsAccount" .) -}}
{{- if .Values.kfp.host -}}{{- $_ := set $run "experiment" .Values.kfp.experiment -}}{{- end -}}
{{- with .Values.kfp.ui -}}{{- $_ := set $run "ui" . -}}{{- end -}}
{{- with .Values.kfp.pipelineRoot -}}{{- $_ := set $run "pipeline_root" . -}}{{- end -}}
{{- $values := deepCopy .Values.pipeline.values -}}
{{- if .Values.nodes.enabled -}}
{{- $_ := set $values "nodes" (mergeOverwrite (dict "runtime" (include "spectraqlora.runtime" .)) (get $values "nodes" | default dict)) -}}
{{- end -}}
{{- range $key := list "secrets" "config_maps" "pull_secrets" -}}
{{- $known := get $defaults $key | default list -}}
{{- $own := dig "defaults" $key list $values -}}
{{- if and $known $own -}}{{- $_ := set $values.defaults $key (concat $known $own) -}}{{- end -}}
{{- end -}}
{{- $known := dict "run" $run "defaults" $defaults -}}
{{- if and .Values.image.digest (eq .Values.image.repository "spectraqlora/light") -}}
{{- $_ := set $known "digests" (dict "light" .Values.image.digest) -}}
{{- end -}}
{{- toYaml (mergeOverwrite $known $values) -}}
{{- end -}}

{{/* When the machines of a training pull their image: as its step would. */}}
{{- define "spectraqlora.nodesPullPolicy" -}}
{{- $values := fromYaml (include "spectraqlora.clusterValues" .) -}}
{{- dig "steps" "train" "image" "pull_policy" $values.defaults.image.pull_policy $values -}}
{{- end -}}

{{- define "spectraqlora.podSecurity" -}}
runAsNonRoot: true
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "spectraqlora.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Who keeps the recurring runs: KFP is asked for all of this release's. */}}
{{- define "spectraqlora.owner" -}}
{{- printf "%s/%s" .Release.Namespace .Release.Name -}}
{{- end -}}

{{/* How a job ends: wrong input (exit code 2) is not tried again, and a pod that its node lost is not counted. */}}
{{- define "spectraqlora.jobEnd" -}}
backoffLimit: {{ .Values.hook.retries }}
activeDeadlineSeconds: {{ .Values.hook.deadlineSeconds }}
podFailurePolicy:
  rules:
    - action: FailJob
      onExitCodes:
        operator: In
        values: [2]
      # Kubernetes 1.25 asks for the key.
      onPodConditions: []
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
{{- end -}}

{{/* Pod of a job that talks to Kubeflow Pipelines. Arguments: .root, .arguments, .component. */}}
{{- define "spectraqlora.jobPod" -}}
{{- $root := .root -}}
{{- with $root.Values -}}
metadata:
  labels:
    {{- include "spectraqlora.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ $.component }}
    {{- with .jobs.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .jobs.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  restartPolicy: Never
  serviceAccountName: {{ include "spectraqlora.jobsAccount" $root }}
  automountServiceAccountToken: false
  securityContext:
    {{- include "spectraqlora.podSecurity" $root | nindent 4 }}
  {{- with .image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- include "spectraqlora.scheduling" .jobs | nindent 2 }}
  containers:
    - name: spectraqlora
      image: {{ include "spectraqlora.image" (dict "image" .image "default" $root.Chart.AppVersion) }}
      imagePullPolicy: {{ .image.pullPolicy }}
      terminationMessagePolicy: FallbackToLogsOnError
      command: [python3, -m, spectraqlora_pipelines.cli]
      args:
        {{- toYaml $.arguments | nindent 8 }}
      env:
        - name: HOME
          value: /tmp
        - name: SPECTRAQLORA_KFP_HOST
          value: {{ .kfp.host | quote }}
        {{- with .kfp.ui }}
        - name: SPECTRAQLORA_KFP_UI
          value: {{ . | quote }}
        {{- end }}
        {{- with .kfp.namespace }}
        - name: SPECTRAQLORA_KFP_NAMESPACE
          value: {{ . | quote }}
        {{- end }}
        {{- if .kfp.tokenSecret.name }}
        - name: SPECTRAQLORA_KFP_TOKEN
          valueFrom:
            secretKeyRef:
              name: {{ .kfp.tokenSecret.name }}
              key: {{ .kfp.tokenSecret.key }}
        {{- end }}
        {{- if .kfp.cookieSecret.name }}
        - name: SPECTRAQLORA_KFP_COOKIE
          valueFrom:
            secretKeyRef:
              name: {{ .kfp.cookieSecret.name }}
              key: {{ .kfp.cookieSecret.key }}
        {{- end }}
        {{- if .kfp.projectedToken.enabled }}
        - name: SPECTRAQLORA_KFP_TOKEN_FILE
          value: /var/run/secrets/kubeflow/pipelines/token
        {{- end }}
        {{- if .kfp.ca.configMap }}
        - name: SPECTRAQLORA_KFP_CA_FILE
          value: /etc/spectraqlora-ca/{{ .kfp.ca.key }}
        {{- else if .ca.configMap }}
        - name: SPECTRAQLORA_KFP_CA_FILE
          value: {{ include "spectraqlora.caFolder" $root }}/{{ .ca.key }}
        {{- end }}
        {{- include "spectraqlora.caEnv" $root | nindent 8 }}
        {{- with .jobs.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      resources:
        {{- toYaml .jobs.resources | nindent 8 }}
      securityContext:
        {{- include "spectraqlora.containerSecurity" $root | nindent 8 }}
      volumeMounts:
        - name: tmp
          mountPath: /tmp
        - name: config
          mountPath: /etc/spectraqlora
          readOnly: true
        {{- if .kfp.projectedToken.enabled }}
        - name: token
          mountPath: /var/run/secrets/kubeflow/pipelines
          readOnly: true
        {{- end }}
        {{- if .kfp.ca.configMap }}
        - name: ca
          mountPath: /etc/spectraqlora-ca
          readOnly: true
        {{- end }}
        {{- include "spectraqlora.caMount" $root | nindent 8 }}
        {{- with .jobs.volumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir:
        sizeLimit: 256Mi
    - name: config
      configMap:
        name: {{ include "spectraqlora.fullname" $root }}
    {{- if .kfp.projectedToken.enabled }}
    - name: token
      projected:
        sources:
          - serviceAccountToken:
              path: token
              audience: {{ .kfp.projectedToken.audience }}
              expirationSeconds: 7200
    {{- end }}
    {{- if .kfp.ca.configMap }}
    - name: ca
      configMap:
        name: {{ .kfp.ca.configMap }}
    {{- end }}
    {{- include "spectraqlora.caVolume" $root | nindent 4 }}
    {{- with .jobs.volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}
{{- end -}}

{{- define "spectraqlora.files" -}}
--config
/etc/spectraqlora/settings.yaml
--values
/etc/spectraqlora/cluster-values.yaml
{{- end -}}

{{/* Environment of the MLflow server and of what prepares its database. */}}
{{- define "spectraqlora.mlflowEnv" -}}
- name: HOME
  value: /tmp
# Its job runner is for evaluations of traces; it idles in seven processes, 225 MB each.
- name: MLFLOW_SERVER_ENABLE_JOB_EXECUTION
  value: "false"
- name: MLFLOW_DISABLE_TELEMETRY
  value: "true"
- name: MLFLOW_BACKEND_STORE_URI
  valueFrom:
    secretKeyRef:
      name: {{ .Values.mlflow.server.database.secret }}
      key: {{ .Values.mlflow.server.database.key }}
{{- if include "spectraqlora.mlflowAuth" . }}
- name: MLFLOW_AUTH_CONFIG_PATH
  value: /tmp/auth.ini
{{- range $name, $key := dict "MLFLOW_AUTH_ADMIN_USERNAME" .Values.secrets.mlflow.username "MLFLOW_AUTH_ADMIN_PASSWORD" .Values.secrets.mlflow.password "MLFLOW_FLASK_SERVER_SECRET_KEY" .Values.mlflow.server.auth.sessionKey }}
- name: {{ $name }}
  valueFrom:
    secretKeyRef:
      name: {{ $.Values.secrets.mlflow.name }}
      key: {{ $key }}
{{- end }}
{{- end }}
{{- with .Values.secrets.s3 }}
{{- if .name }}
- name: AWS_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef:
      name: {{ .name }}
      key: {{ .accessKey }}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom:
    secretKeyRef:
      name: {{ .name }}
      key: {{ .secretKey }}
{{- end }}
{{- end }}
{{- with .Values.s3.endpointUrl }}
- name: MLFLOW_S3_ENDPOINT_URL
  value: {{ . | quote }}
{{- end }}
{{- with .Values.s3.region }}
- name: AWS_REGION
  value: {{ . | quote }}
{{- end }}
{{- include "spectraqlora.caEnv" . }}
{{- with .Values.mlflow.server.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "spectraqlora.mlflowTls" -}}
/etc/spectraqlora-tls
{{- end -}}

{{/* What of MLflow's sign-in has no variable: users are in the tracking database, whose address must not be in a ConfigMap. */}}
{{- define "spectraqlora.mlflowAuthFile" -}}
import os
os.umask(0o077)
uri = os.environ["MLFLOW_BACKEND_STORE_URI"].replace("%", "%%")
with open(os.environ["MLFLOW_AUTH_CONFIG_PATH"], "w") as file:
    file.write(f"[mlflow]\ndefault_permission = {{ .Values.mlflow.server.auth.defaultPermission }}\ndatabase_uri = {uri}\n")
{{- end -}}

{{- define "spectraqlora.mlflowMounts" -}}
- name: tmp
  mountPath: /tmp
{{- include "spectraqlora.caMount" . }}
{{- if .Values.mlflow.server.tls.secret }}
- name: tls
  mountPath: {{ include "spectraqlora.mlflowTls" . }}
  readOnly: true
{{- end }}
{{- with .Values.mlflow.server.volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "spectraqlora.mlflowAccount" -}}
{{- $account := .Values.mlflow.server.serviceAccount -}}
{{- if $account.create -}}
{{- default (printf "%s-mlflow" (include "spectraqlora.fullname" .)) $account.name -}}
{{- else -}}
{{- default "default" $account.name -}}
{{- end -}}
{{- end -}}

{{/* Where a pod may run, from values that have these keys. */}}
{{- define "spectraqlora.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* The certificates that everything of this release trusts: folder, volume, mount, environment. */}}
{{- define "spectraqlora.caFolder" -}}
/etc/spectraqlora-trust
{{- end -}}

{{- define "spectraqlora.caVolume" -}}
{{- if .Values.ca.configMap }}
- name: trust
  configMap:
    name: {{ .Values.ca.configMap }}
{{- end }}
{{- end -}}

{{- define "spectraqlora.caMount" -}}
{{- if .Values.ca.configMap }}
- name: trust
  mountPath: {{ include "spectraqlora.caFolder" . }}
  readOnly: true
{{- end }}
{{- end -}}

{{/* By these boto3, requests and the hub's client are told. */}}
{{- define "spectraqlora.caVariables" -}}
{{- if .Values.ca.configMap -}}
{{- $file := printf "%s/%s" (include "spectraqlora.caFolder" .) .Values.ca.key -}}
{{- toYaml (dict "AWS_CA_BUNDLE" $file "REQUESTS_CA_BUNDLE" $file "SSL_CERT_FILE" $file) -}}
{{- end -}}
{{- end -}}

{{- define "spectraqlora.caEnv" -}}
{{- range $name, $file := include "spectraqlora.caVariables" . | fromYaml }}
- name: {{ $name }}
  value: {{ $file }}
{{- end }}
{{- end -}}

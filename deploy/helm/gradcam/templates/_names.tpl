{{- define "gradcam.name" -}}
{{- if contains "gradcam" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-gradcam" .Release.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "gradcam.release" -}}
app.kubernetes.io/name: gradcam
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "gradcam.labels" -}}
{{ include "gradcam.release" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "gradcam.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}-{{ .device }}
{{- end }}

{{- define "gradcam.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (ternary (include "gradcam.name" .) "default" .Values.serviceAccount.create) }}
{{- end }}

{{- /* A setting as its environment variable has it. Numbers come as floats, which would be written as 1e+09. */ -}}
{{- define "gradcam.said" -}}
{{- if kindIs "slice" . }}{{ join "," . }}
{{- else if and (kindIs "float64" .) (eq . (floor .)) }}{{ printf "%.0f" . }}
{{- else }}{{ toString . }}{{ end }}
{{- end }}

{{- define "gradcam.threads" -}}
{{- if .Values.settings.threads }}{{ int64 .Values.settings.threads }}
{{- else if eq .Values.worker.device "cpu" }}16
{{- else }}{{ mul 2 (.Values.settings.max_batch | default 32 | int64) }}{{ end }}
{{- end }}

{{- /* The cores that a worker with a GPU asks for, less one: `auto` would count those of the node. */ -}}
{{- define "gradcam.jobProcesses" -}}
{{- $said := .Values.settings.job_processes }}
{{- $cores := ((.Values.worker.resources).requests).cpu | default 1 | toString }}
{{- $cores := ternary (div (trimSuffix "m" $cores | int) 1000) (floor $cores) (hasSuffix "m" $cores) | int }}
{{- if not (kindIs "invalid" $said) }}{{ include "gradcam.said" $said }}
{{- else if eq .Values.worker.device "cpu" }}0
{{- else }}{{ min 16 (max 1 (sub $cores 1)) }}{{ end }}
{{- end }}

{{- /* Jobs and shards at a time, of a worker: its job processes divide threads that are not given. */ -}}
{{- define "gradcam.slots" -}}
{{- $processes := include "gradcam.jobProcesses" . | replace "auto" "0" | int | max 1 }}
{{- $threads := include "gradcam.threads" . | int }}
{{- if not .Values.settings.threads }}
{{- $least := ternary 4 1 (gt $processes 1) }}
{{- $threads = div (sub (add $threads $processes) 1) $processes | max $least }}
{{- end }}
{{- mul $processes (add $threads (.Values.settings.shards | default 2 | int)) }}
{{- end }}

{{- define "gradcam.grace" -}}
{{ add (ceil (.Values.settings.shutdown_timeout_s | default 90)) .Values.worker.graceSeconds }}
{{- end }}

{{- define "gradcam.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "gradcam.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* What worker and delivery worker share: environment, probes, mounts. */ -}}
{{- define "gradcam.container" -}}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command: [gradcam]
envFrom:
  - configMapRef: {name: {{ include "gradcam.name" . }}}
  - secretRef: {name: {{ .Values.secret.existingSecret }}}
ports:
  - {name: metrics, containerPort: 9464}
livenessProbe:
  httpGet: {path: /live, port: metrics}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /ready, port: metrics}
  periodSeconds: 10
  timeoutSeconds: 5
securityContext: {{- include "gradcam.containerSecurity" . | nindent 2 }}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
  - {name: cache, mountPath: /cache}
  - {name: files, mountPath: /etc/gradcam, readOnly: true}
{{- end }}

{{- define "gradcam.volumes" -}}
- name: tmp
  emptyDir: {}
- name: files
  projected:
    sources:
      - configMap:
          name: {{ include "gradcam.name" . }}-files
{{- if .Values.redisCa.configMap }}
      - configMap:
          name: {{ .Values.redisCa.configMap }}
          items: [{key: {{ .Values.redisCa.key }}, path: redis-ca.pem}]
{{- end }}
{{- end }}

{{- /* Where pods go: what is said of it, as it is said. */ -}}
{{- define "gradcam.placement" -}}
{{- $places := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" -}}
{{- $said := dict -}}
{{- range $name, $value := . }}{{ if and $value (has $name $places) }}{{ $_ := set $said $name $value }}{{ end }}{{ end -}}
{{- with $said }}{{ toYaml . }}{{ end }}
{{- end }}

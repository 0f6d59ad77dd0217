{{- /* A name of at most `most` characters: a longer one is cut, and a checksum keeps it apart from others. */ -}}
{{- define "gradcam.cut" -}}
{{- if le (len .name) (int .most) }}{{ .name }}{{ else }}{{ printf "%s-%s" (.name | trunc (int (sub .most 9)) | trimSuffix "-") (sha256sum .name | trunc 8) }}{{ end }}
{{- end }}

{{- /* 46 characters: with "-redis" 52, the most that the name of a StatefulSet may have. The name of a Service
begins with a letter and has no dots; that of a release may be 2.0. */ -}}
{{- define "gradcam.name" -}}
{{- $name := .Release.Name | replace "." "-" }}
{{- if not (contains "gradcam" $name) }}{{ $name = printf "%s-gradcam" $name }}{{ end }}
{{- if regexMatch "^[0-9]" $name }}{{ $name = printf "r%s" $name }}{{ end }}
{{- include "gradcam.cut" (dict "name" $name "most" 46) }}
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

{{- /* The image of a target of docker/Dockerfile: `target` is cpu, gpu or client. */ -}}
{{- define "gradcam.image" -}}
{{- with .root.Values.image }}
{{- $digest := index .digests $.target }}
{{- if .registry }}{{ trimSuffix "/" .registry }}/{{ end }}{{ .repository }}
{{- if $digest }}@{{ $digest }}{{ else }}:{{ .tag | default $.root.Chart.AppVersion }}-{{ $.target }}{{ end }}
{{- end }}
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

{{- /* Seconds for running jobs after SIGTERM. A worker hands back the rest and ends within 10 more: supervisor.py. */ -}}
{{- define "gradcam.shutdown" -}}
{{- $notice := int .Values.worker.noticeSeconds }}
{{- $said := .Values.settings.shutdown_timeout_s | default (ternary (max 1 (sub $notice 12)) 90 (gt $notice 0)) }}
{{- if and $notice (lt $notice 13) }}
{{- fail (printf "worker.noticeSeconds (%d) is too short: a worker needs 13 s to hand back its jobs." $notice) }}
{{- end }}
{{- if and $notice (gt (add (ceil $said) 10) (int64 $notice)) }}
{{- fail (printf "settings.shutdown_timeout_s (%v) must leave 10 s of worker.noticeSeconds (%d)." $said $notice) }}
{{- end }}
{{- $said }}
{{- end }}

{{- define "gradcam.grace" -}}
{{- $shutdown := include "gradcam.shutdown" . | float64 }}
{{- .Values.worker.noticeSeconds | int | default (add (ceil $shutdown) .Values.worker.graceSeconds | int) }}
{{- end }}

{{- /* Of a pod: what is said for all, and over it what is said for this part. */ -}}
{{- define "gradcam.podSecurity" -}}
{{- $said := mergeOverwrite (deepCopy .root.Values.podSecurityContext) (.part.podSecurityContext | default dict) }}
{{- if .root.Values.assignedUser }}{{ $said = omit $said "runAsUser" "runAsGroup" "fsGroup" }}{{ end }}
{{- toYaml $said }}
{{- end }}

{{- define "gradcam.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* A list of `key` for all parts, and of this one. */ -}}
{{- define "gradcam.extra" -}}
{{- with concat (index .root.Values .key) (index .part .key | default list) }}{{ toYaml . }}{{ end }}
{{- end }}

{{- /* Variables of which each name comes once: server-side apply refuses more. What is said last holds. */ -}}
{{- define "gradcam.lastOfEach" -}}
{{- $said := dict }}{{ $names := list }}{{ $kept := list }}
{{- range . }}{{ $_ := set $said .name . }}{{ $names = append $names .name }}{{ end }}
{{- range $names | reverse | uniq | reverse }}{{ $kept = append $kept (get $said .) }}{{ end }}
{{- toYaml $kept }}
{{- end }}

{{- /* Labels and annotations of a pod. */ -}}
{{- define "gradcam.podMetadata" -}}
labels:
  {{- include "gradcam.labels" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .component }}
  {{- with .part.podLabels }}{{ toYaml . | nindent 2 }}{{ end }}
annotations:
  checksum/settings: {{ include (print .root.Template.BasePath "/configmap.yaml") .root | sha256sum }}
  {{- with merge (dict) (.part.podAnnotations | default dict) (.annotations | default dict) }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}

{{- /* The spec of a pod with one of our images:
root: the chart; part: its values; component: its name; target: its image; args: the command line of gradcam;
resources: of its container; probes: {port, startup: path, seconds: to start, period}, for what does not end;
ports: its ports by name; env: variables of its own; secret: who it is for Redis; keepsCache: whether /cache is
the claim; grace: seconds to end; preStop: seconds from the end of its Service to SIGTERM; restartPolicy: of Jobs. */ -}}
{{- define "gradcam.podSpec" -}}
{{- $values := .root.Values -}}
serviceAccountName: {{ include "gradcam.serviceAccount" .root }}
automountServiceAccountToken: false
enableServiceLinks: false  # a Service called gradcam-... would read as settings
{{- with .grace }}
terminationGracePeriodSeconds: {{ . }}
{{- end }}
{{- with .restartPolicy }}
restartPolicy: {{ . }}
{{- end }}
securityContext: {{- include "gradcam.podSecurity" . | nindent 2 }}
{{- with $values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- with include "gradcam.extra" (merge (dict "key" "initContainers") .) }}
initContainers: {{- . | nindent 2 }}
{{- end }}
containers:
  - name: {{ .component }}
    image: {{ include "gradcam.image" . }}
    imagePullPolicy: {{ $values.image.pullPolicy }}
    command: [gradcam]
    args: {{- toYaml .args | nindent 6 }}
    envFrom:
      - configMapRef: {name: {{ include "gradcam.name" .root }}}
{{- with .secret | default $values.secret.existingSecret }}
      - secretRef: {name: {{ . }}}
{{- end }}
{{- with include "gradcam.extra" (merge (dict "key" "extraEnvFrom") .) }}
      {{- . | nindent 6 }}
{{- end }}
{{- with concat (.env | default list) $values.extraEnv (.part.extraEnv | default list) }}
    env: {{- include "gradcam.lastOfEach" . | nindent 6 }}
{{- end }}
{{- with .ports }}
    ports:
{{- range $name, $number := . }}
      - {name: {{ $name }}, containerPort: {{ $number }}}
{{- end }}
{{- end }}
{{- with .probes }}
    startupProbe:
      httpGet: {path: {{ .startup }}, port: {{ .port }}}
      periodSeconds: {{ .period }}
      timeoutSeconds: 5
      failureThreshold: {{ div (add .seconds .period -1) .period }}
    livenessProbe:
      httpGet: {path: /live, port: {{ .port }}}
      periodSeconds: 10
      timeoutSeconds: 5
      failureThreshold: 6
    readinessProbe:
      httpGet: {path: /ready, port: {{ .port }}}
      periodSeconds: 10
      timeoutSeconds: 5
{{- end }}
{{- with .preStop }}
    lifecycle: {preStop: {exec: {command: [sleep, {{ . | quote }}]}}}
{{- end }}
    resources: {{- toYaml .resources | nindent 6 }}
    securityContext: {{- include "gradcam.containerSecurity" .root | nindent 6 }}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      - {name: cache, mountPath: /cache}
      - {name: files, mountPath: /etc/gradcam, readOnly: true}
{{- with include "gradcam.extra" (merge (dict "key" "extraVolumeMounts") .) }}
      {{- . | nindent 6 }}
{{- end }}
volumes:
  - name: tmp
    emptyDir: {}
  - name: cache
{{- if and .keepsCache $values.cache.existingClaim }}
    persistentVolumeClaim: {claimName: {{ $values.cache.existingClaim }}}
{{- else if .keepsCache }}
    emptyDir: {sizeLimit: {{ $values.cache.sizeLimit }}}
{{- else }}
    emptyDir: {}
{{- end }}
  - name: files
    projected:
      sources:
        - configMap:
            name: {{ include "gradcam.name" .root }}-files
{{- if $values.redisCa.configMap }}
        - configMap:
            name: {{ $values.redisCa.configMap }}
            items: [{key: {{ $values.redisCa.key }}, path: redis-ca.pem}]
{{- end }}
{{- with include "gradcam.extra" (merge (dict "key" "extraVolumes") .) }}
  {{- . | nindent 2 }}
{{- end }}
{{- include "gradcam.placement" (merge (dict) .part (dict "priorityClassName" $values.priorityClassName)) }}
{{- end }}

{{- /* Where pods go: what is said of it, as it is said. */ -}}
{{- define "gradcam.placement" -}}
{{- $places := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" -}}
{{- $said := dict -}}
{{- range $name, $value := . }}{{ if and $value (has $name $places) }}{{ $_ := set $said $name $value }}{{ end }}{{ end -}}
{{- with $said }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "slimserve.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "slimserve.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "slimserve.labels" -}}
{{ include "slimserve.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* Seconds of a time as the server reads it: 30s, 2min, 500ms or a number. Rounded up to whole ones. */}}
{{- define "slimserve.seconds" -}}
{{- $text := toString . -}}
{{- $number := regexFind "^[0-9.]+" $text | float64 -}}
{{- $unit := regexFind "[a-z]+$" $text -}}
{{- $factor := get (dict "" 1.0 "s" 1.0 "min" 60.0 "ms" 0.001 "us" 0.000001) $unit -}}
{{- ceil (mulf $number $factor) | int -}}
{{- end -}}

{{/* Most pods at once. */}}
{{- define "slimserve.pods" -}}
{{- if eq .Values.autoscaling.kind "none" }}{{ .Values.replicas }}{{ else }}{{ .Values.autoscaling.max }}{{ end -}}
{{- end -}}

{{/* One volume that a single node can mount: "true" or nothing. */}}
{{- define "slimserve.singleNode" -}}
{{- if and (eq .Values.cache.kind "claim") (ne .Values.cache.accessMode "ReadWriteMany") }}true{{ end -}}
{{- end -}}

{{/* Refuses what cannot work, before anything is installed. */}}
{{- define "slimserve.check" -}}
{{- if and (not .Values.auth.secret) (not .Values.auth.allowWithoutKey) -}}
{{- fail "auth.secret: name a Secret with the key api-key, or set auth.allowWithoutKey" -}}
{{- end -}}
{{- if and (include "slimserve.singleNode" .) (gt (include "slimserve.pods" . | int) 1) -}}
{{- fail "cache: more than one pod needs accessMode ReadWriteMany, or cache.kind perPod or emptyDir" -}}
{{- end -}}
{{- if gt (int .Values.autoscaling.min) (int .Values.autoscaling.max) -}}
{{- fail "autoscaling: min is more than max" -}}
{{- end -}}
{{- range $key := list "host" "port" "api_key" "admin_key" "tenants" "allow_remote_without_key" -}}
{{- if hasKey $.Values.config $key -}}
{{- fail (printf "config.%s: the chart sets it; see auth and service" $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Environment with the keys of the Secret. */}}
{{- define "slimserve.keys" -}}
- name: SLIMSERVE_API_KEY
  valueFrom:
    secretKeyRef:
      name: {{ .Values.auth.secret }}
      key: api-key
      # With tenants it may be absent.
      optional: {{ .Values.auth.tenants }}
{{- if .Values.auth.adminKey }}
- name: SLIMSERVE_ADMIN_KEY
  valueFrom:
    secretKeyRef:
      name: {{ .Values.auth.secret }}
      key: admin-key
{{- end }}
{{- if .Values.auth.tenants }}
- name: SLIMSERVE_TENANTS
  value: /etc/slimserve-tenants/tenants.yaml
{{- end }}
{{- end -}}

{{/* Source of the volume for models and kernels. */}}
{{- define "slimserve.cache" -}}
{{- if eq .Values.cache.kind "claim" -}}
persistentVolumeClaim:
  claimName: {{ .Values.cache.existingClaim | default (printf "%s-cache" (include "slimserve.name" .)) }}
{{- else if eq .Values.cache.kind "perPod" -}}
ephemeral:
  volumeClaimTemplate:
    spec: {{- include "slimserve.claim" (dict "root" . "mode" "ReadWriteOnce") | nindent 6 }}
{{- else -}}
emptyDir:
  sizeLimit: {{ .Values.cache.size }}
{{- end -}}
{{- end -}}

{{- define "slimserve.claim" -}}
accessModes: [{{ .mode }}]
{{- with .root.Values.cache.storageClass }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests:
    storage: {{ .root.Values.cache.size }}
{{- end -}}

{{/* How fast pods come and go. A new one helps only after its models are loaded, so twice as many at most, then wait. */}}
{{- define "slimserve.behavior" -}}
scaleUp:
  stabilizationWindowSeconds: 30
  policies:
    - type: Percent
      value: 100
      periodSeconds: 120
scaleDown:
  stabilizationWindowSeconds: {{ .Values.autoscaling.scaleDownSeconds }}
  policies:
    - type: Pods
      value: 1
      periodSeconds: 120
{{- end -}}
